"""`Parser`: a command-line parser whose errors are InputErrors, which take one line."""

import argparse
from typing import NoReturn

from perception_rt.errors import InputError


class Parser(argparse.ArgumentParser):
    """Raises InputError for a wrong command line, instead of printing the usage and exiting."""

    def error(self, message: str) -> NoReturn:
        """Raises InputError."""
        raise InputError(message)
