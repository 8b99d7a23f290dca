"""Standard streams that the caller closed, or that nothing reads any more."""

import os
import sys
from contextlib import suppress
from pathlib import Path


def reopen_closed() -> None:
    """Replaces standard streams that the caller closed, which Python sets to None."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115


def drop_unwritable() -> None:
    """Leaves nothing in a stream that cannot be written: the interpreter's exit would fail."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
