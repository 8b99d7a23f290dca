"""Counts the rows of a result, and reads rows by number."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.parquet import pyarrow
from perception_rt.bulk.result import Result, ids_path, mapped_rows
from perception_rt.bulk.shards import ParquetShards, columns
from perception_rt.errors import InputError

# Item number, source and row (D).
Row: TypeAlias = tuple[int, str, NDArray[Any]]


def count_rows(result: Result) -> int:
    """Number of rows; InputError if a file is damaged."""
    if result.is_parquet:
        return sum(ParquetShards().head(path).count for path in result.files)
    if result.path.suffix == ".npy":
        return len(mapped_rows(result))
    recorded = result.origin.get("rows")
    if type(recorded) is int:
        return recorded
    with result.path.open("rb") as file:
        return sum(1 for _ in file)


def rows_at(result: Result, numbers: Sequence[int]) -> dict[int, Row]:
    """Reads some rows.

    Args:
        result: the result.
        numbers: numbers of rows, from 0.

    Returns:
        The rows by number.

    Raises:
        InputError: there is no such row, or a file is damaged.
    """
    wanted = sorted(set(numbers))
    if result.is_parquet:
        found = dict(_parquet_rows(result, wanted))
    else:
        read = _npy_rows if result.path.suffix == ".npy" else _jsonl_rows
        found = dict(read(result, wanted))
    absent = [number for number in wanted if number not in found]
    if absent:
        raise InputError(f"{str(result.path)!r:.200} has no row {absent[0]}")
    return found


def _npy_rows(result: Result, wanted: list[int]) -> Iterator[tuple[int, Row]]:
    rows = mapped_rows(result)
    for number, line in _lines(ids_path(result.path), wanted):
        if number < len(rows):
            name = line.decode("utf-8", "replace").rstrip("\n")
            yield number, (number, name, np.array(rows[number]))


def _jsonl_rows(result: Result, wanted: list[int]) -> Iterator[tuple[int, Row]]:
    dtype = np.dtype(result.origin.get("dtype", "float32"))
    for number, line in _lines(result.path, wanted):
        try:
            fields = json.loads(line)
            row = np.array(fields["embedding"], dtype).reshape(result.dim)
            yield number, (int(fields["id"]), str(fields["source"]), row)
        except (ValueError, KeyError, TypeError):
            raise InputError(f"line {number + 1} of {result.path} is no row") from None


def _lines(path: Path, wanted: list[int]) -> Iterator[tuple[int, bytes]]:
    """Yields some lines of a file, by ascending number."""
    remaining = iter(wanted)
    following = next(remaining, None)
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file):
                if following is None:
                    return
                if number == following:
                    yield number, line
                    following = next(remaining, None)
    except OSError as error:
        raise InputError(f"{str(path)!r:.200} cannot be read: {error.strerror}") from None


def _parquet_rows(result: Result, wanted: list[int]) -> Iterator[tuple[int, Row]]:
    arrow, parquet = pyarrow()
    pending, first = np.array(wanted, np.int64), 0
    for path in result.files:
        try:
            with parquet.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    here = pending[(pending >= first) & (pending < first + count)] - first
                    if len(here):
                        table = file.read_row_group(group, ["id", "source", "embedding"])
                        ids, sources, rows = columns(path, table, result.dim)
                        for n in here:
                            yield first + int(n), (int(ids[n]), sources[n], np.array(rows[n]))
                    first += count
        except (arrow.ArrowException, OSError):
            raise InputError(f"{str(path)!r:.200} is damaged") from None
