"""Lines of jsonl files by number, read when they are needed; only where they begin is in memory.

A dataset is a file, or the files of a directory in the order of their names. Knows nothing of what
a line says.
"""

import json
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.processing.files import open_regular_file

Ints: TypeAlias = NDArray[np.int64]

_SCANNED = 8 * 1024 * 1024  # bytes at once
_MAX_LINE_BYTES = 16 * 1024 * 1024
_NEWLINE = 10


class JsonLines:
    """The lines of a dataset. May be shared between threads.

    Attributes:
        name: of the dataset.
    """

    def __init__(self, path: Path, name: str) -> None:
        """Finds where lines begin, in one pass over the files.

        Args:
            path: a jsonl file, or a directory with `*.jsonl` files.
            name: of the dataset, for messages.

        Raises:
            InputError: there is no such file or directory, or nothing in it.
        """
        self.name = name
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        self._files = [(file, _line_starts(file, name)) for file in files]
        self._totals = np.cumsum([0, *(len(starts) - 1 for _, starts in self._files)])
        if len(self) == 0:
            raise InputError(f"dataset {name!r:.60} is empty: {str(path)!r:.200} has no lines")

    def __len__(self) -> int:
        return int(self._totals[-1])

    def where(self, number: int) -> str:
        """The place of a line, for whoever must find it."""
        file, line = self._locate(number)
        inside = f" {self._files[file][0].name}" if len(self._files) > 1 else ""
        return f"{self.name}{inside} line {line + 1}"

    def load(self, number: int) -> Any:
        """What a line says; InputError if it is not JSON or too long."""
        index, line = self._locate(number)
        file, starts = self._files[index]
        start, end = int(starts[line]), int(starts[line + 1])
        if end - start > _MAX_LINE_BYTES:
            raise InputError(f"it has {end - start} bytes; the limit is {_MAX_LINE_BYTES}")
        with open_regular_file(str(file), f"dataset {self.name!r:.60}") as opened:
            opened.seek(start)
            data = opened.read(end - start)
        try:
            return json.loads(data)
        except (ValueError, RecursionError):
            raise InputError("it is not JSON") from None

    def _locate(self, number: int) -> tuple[int, int]:
        """The file of a line, and its number there from 0."""
        assert 0 <= number < len(self)
        file = int(np.searchsorted(self._totals, number, side="right")) - 1
        return file, number - int(self._totals[file])


def _line_starts(file: Path, name: str) -> Ints:
    """Where each line begins, and the size of what they are in."""
    try:
        status = file.stat()
    except OSError as error:
        message = f"dataset {name!r:.60}: {str(file)!r:.200} cannot be read: {error.strerror}"
        raise InputError(message) from None
    return _scanned(file, name, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _scanned(file: Path, name: str, size: int, changed: int) -> Ints:
    """A file is scanned once: for training, and for evaluation."""
    found = [np.zeros(1, np.int64)]
    at, end = 0, 0  # end: of the last line that is not blank
    with open_regular_file(str(file), f"dataset {name!r:.60}: {str(file)!r:.200}") as opened:
        while data := opened.read(_SCANNED):
            found.append(np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE) + at + 1)
            if text := data.rstrip():
                end = at + len(text)
            at += len(data)
    starts = np.concatenate(found)
    return np.append(starts[starts < end], end)
