"""Reads lines of jsonl files by number. Only the line offsets are kept in memory.

A dataset is one file, or all files of a directory in the order of their names. Blank lines are left
out. The others are parsed as JSON; `records.py` interprets them.
"""

import io
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.processing.files import open_regular_file

Ints: TypeAlias = NDArray[np.int64]

SCAN_BYTES = 8 * 1024 * 1024  # read at once
_MAX_LINE_BYTES = 16 * 1024 * 1024
_NEWLINE = 10


@dataclass(frozen=True, slots=True)
class _Lines:
    """The lines of a file that are not blank.

    Attributes:
        starts: byte offset of each line, and of the end of the last one.
        places: number of each line in the file, from 0; None if no line is blank.
    """

    starts: Ints
    places: Ints | None


class JsonLines:
    """The lines of a dataset. Threads may share it.

    Args:
        path: a jsonl file, or a directory with `*.jsonl` files.
        name: dataset name for messages.

    Raises:
        InputError: the file or directory does not exist, or has no lines.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.name = name
        files = sorted(path.glob("*.jsonl")) if path.is_dir() else [path]
        self._files = [(file, _find_lines(file, name)) for file in files]
        self._totals = np.cumsum([0, *(len(lines.starts) - 1 for _, lines in self._files)])
        if len(self) == 0:
            raise InputError(f"dataset {name!r:.60} is empty: {str(path)!r:.200} has no lines")

    def __len__(self) -> int:
        return int(self._totals[-1])

    def where(self, number: int) -> str:
        """Returns file and line number of a line for messages."""
        file, line = self._locate(number)
        path, lines = self._files[file]
        inside = f" {path.name}" if len(self._files) > 1 else ""
        place = line if lines.places is None else int(lines.places[line])
        return f"{self.name}{inside} line {place + 1}"

    def load(self, number: int) -> Any:
        """Parses a line; InputError if it is too long or not JSON."""
        index, line = self._locate(number)
        file, lines = self._files[index]
        start, end = int(lines.starts[line]), int(lines.starts[line + 1])
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
        """Index of a line's file, and the line's number in it from 0."""
        assert 0 <= number < len(self)
        file = int(np.searchsorted(self._totals, number, side="right")) - 1
        return file, number - int(self._totals[file])


def refuse_array(text: bytes, file: Path) -> None:
    """Raises an InputError if the start of a file shows a JSON array instead of lines."""
    if text.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        raise InputError(
            f"{str(file)!r:.200} is a JSON array; write one object per line, for example with "
            "`jq -c '.[]' data.json > data.jsonl`"
        )


def _find_lines(file: Path, name: str) -> _Lines:
    try:
        status = file.stat()
    except OSError as error:
        message = f"dataset {name!r:.60}: {str(file)!r:.200} cannot be read: {error.strerror}"
        raise InputError(message) from None
    return _scanned(file, name, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=1024)
def _scanned(file: Path, name: str, size: int, changed: int) -> _Lines:
    """Scans a file once, although training and evaluation both open it."""
    found = [np.zeros(1, np.int64)]
    at, end = 0, 0  # `end` is where the last line that is not blank ends
    with open_regular_file(str(file), f"dataset {name!r:.60}: {str(file)!r:.200}") as opened:
        while data := opened.read(SCAN_BYTES):
            if at == 0:
                refuse_array(data[:1000], file)
            found.append(np.flatnonzero(np.frombuffer(data, np.uint8) == _NEWLINE) + at + 1)
            if text := data.rstrip():
                end = at + len(text)
            at += len(data)
        starts = np.concatenate(found)
        starts = np.append(starts[starts < end], end)
        blank = _blank(opened, starts)
    if not blank.any():
        return _Lines(starts, None)
    # A blank line becomes white space at the end of the line before it.
    kept = np.flatnonzero(~blank)
    return _Lines(np.append(starts[kept], end), kept)


def _blank(file: io.FileIO, starts: Ints) -> NDArray[np.bool_]:
    """Which lines are empty, or have a carriage return only."""
    sizes = np.diff(starts)
    blank = sizes == 1
    if len(blank):
        blank[-1] = False  # the last line ends with text
    for line in np.flatnonzero(sizes == 2):
        file.seek(int(starts[line]))
        blank[line] = file.read(2) == b"\r\n"
    return blank
