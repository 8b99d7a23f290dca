"""Writes files that are whole or absent: beside their place, synced, then renamed."""

import glob
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

TEMPORARY = ".tmp"
_RANDOM_BYTES = 6


@contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """Yields a file that takes the name `path` when the block ends without an error.

    Raises:
        OSError: it cannot be written, such as on a full disk; names `path`.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}{TEMPORARY}")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        # The system names the temporary file, or none when a write fails.
        if error.filename in (None, str(temporary)):
            error.filename, error.filename2 = str(path), None
        raise
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def remove_leftovers(path: Path) -> None:
    """Removes what killed processes left of `replacing`; no other process may write `path`."""
    random = "?" * (2 * _RANDOM_BYTES)
    for left in path.parent.glob(f".{glob.escape(path.name)}.{random}{TEMPORARY}"):
        left.unlink(missing_ok=True)


def write_bytes(path: Path, data: bytes) -> None:
    """Writes a file by `replacing`."""
    with replacing(path) as file:
        file.write(data)
