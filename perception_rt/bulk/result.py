"""Reads results, and assembles a single file from shards.

A result is a folder of Parquet shards, or one `.parquet`, `.npy` or `.jsonl` file. Beside
`rows.npy` are `rows.ids.txt`, one source per line, and `rows.meta.json`; beside `rows.jsonl` is
`rows.jsonl.meta.json`.

Legend: N rows, D channels.
"""

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.atomic import replacing, write_bytes
from perception_rt.bulk.parquet import pyarrow
from perception_rt.bulk.shards import (
    DTYPES,
    PARQUET_OPTIONS,
    ParquetShards,
    Shard,
    check_origin,
    parquet_schema,
    parquet_table,
)
from perception_rt.errors import InputError, escaped

SUFFIXES = (".npy", ".jsonl", ".parquet")
_BLOCK_ROWS = 4096

# Ids int64 (N), sources (N) and rows (N, D).
Block: TypeAlias = tuple[NDArray[np.int64], list[str], NDArray[Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """A result on disk; made by `open_result`.

    Attributes:
        path: the file or folder.
        package: id of the package that embedded it.
        model: name of its model.
        dim: channels of a row.
        origin: all facts recorded with it.
    """

    path: Path
    package: str
    model: str
    dim: int
    origin: dict[str, Any]

    def blocks(self) -> Iterator[Block]:
        """Yields the rows in order, at most a few thousand at a time.

        Raises:
            InputError: a file is damaged, or belongs to another package.
        """
        if self.is_parquet:
            for path in self.files:
                yield from self._parquet(path)
        else:
            yield from (_npy_blocks if self.path.suffix == ".npy" else _jsonl_blocks)(self)

    @property
    def is_parquet(self) -> bool:
        """Whether `files` are Parquet files."""
        return self.path.is_dir() or self.path.suffix == ".parquet"

    @property
    def files(self) -> list[Path]:
        """Files with the rows, in order."""
        return _shards(self.path) if self.path.is_dir() else [self.path]

    def _parquet(self, path: Path) -> Iterator[Block]:
        head = ParquetShards().head(path)
        if (head.origin["package"], head.origin["dim"]) != (self.package, self.dim):
            raise InputError(f"{str(path)!r:.200} is of another package or size than {self.path}")
        yield from _parquet_blocks(path, self.dim)


def open_result(path: str | os.PathLike[str]) -> Result:
    """Opens the result of a bulk job.

    Raises:
        InputError: there is none, or it is damaged or was not written by perception_rt.
        BackendError: it needs pyarrow, which is not installed.
    """
    path = Path(path)
    if path.is_dir():
        shards = _shards(path)
        if not shards:
            raise InputError(f"{str(path)!r:.200} has no shards part-*.parquet")
        origin = ParquetShards().head(shards[0]).origin
    elif not path.is_file():
        raise InputError(f"result {str(path)!r:.200} does not exist")
    elif path.suffix == ".parquet":
        origin = ParquetShards().head(path).origin
    elif path.suffix in SUFFIXES:
        origin = _read_meta(path)
    else:
        raise InputError(f"{str(path)!r:.200} must be a folder or end in {', '.join(SUFFIXES)}")
    return Result(
        path=path, package=origin["package"], model=origin["model"], dim=origin["dim"],
        origin=origin,
    )  # fmt: skip


def write_result(out: Path, shards: Iterable[Shard], rows: int, origin: dict[str, Any]) -> None:
    """Writes a single-file result; its main file is renamed last.

    Args:
        out: file that ends in one of `SUFFIXES`.
        shards: the rows in order.
        rows: their number.
        origin: package, model, dim, dtype and further facts to record.
    """
    {".npy": _write_npy, ".jsonl": _write_jsonl, ".parquet": _write_parquet}[out.suffix](
        out, shards, rows, origin
    )


def result_paths(out: Path) -> tuple[Path, ...]:
    """Paths of the files of a single-file result."""
    beside = {".npy": (ids_path(out), meta_path(out)), ".jsonl": (meta_path(out),)}
    return (*beside.get(out.suffix, ()), out)


def meta_path(out: Path) -> Path:
    """Path of the facts beside a `.npy` or `.jsonl` result."""
    return out.with_name((out.stem if out.suffix == ".npy" else out.name) + ".meta.json")


def ids_path(out: Path) -> Path:
    """Path of the sources beside a `.npy` result."""
    return out.with_suffix(".ids.txt")


def _write_npy(out: Path, shards: Iterable[Shard], rows: int, origin: dict[str, Any]) -> None:
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(origin["dtype"])),
        "fortran_order": False,
        "shape": (rows, origin["dim"]),
    }
    with replacing(out) as array:
        np.lib.format.write_array_header_1_0(array, header)
        with replacing(ids_path(out)) as names:
            for shard in shards:
                array.write(np.ascontiguousarray(shard.rows).tobytes())
                names.writelines(_line(source) for source in shard.sources)
        write_bytes(meta_path(out), _meta(origin))


def _write_jsonl(out: Path, shards: Iterable[Shard], rows: int, origin: dict[str, Any]) -> None:
    with replacing(out) as file:
        for shard in shards:
            for number, source, row in zip(shard.ids, shard.sources, shard.rows, strict=True):
                # The shortest digits that give the same number in the row's own dtype.
                values = ", ".join(map(str, row))
                start = f'{{"id": {number}, "source": {json.dumps(source)}'
                file.write(f'{start}, "embedding": [{values}]}}\n'.encode("ascii"))
        write_bytes(meta_path(out), _meta({**origin, "rows": rows}))


def _write_parquet(out: Path, shards: Iterable[Shard], rows: int, origin: dict[str, Any]) -> None:
    _, parquet = pyarrow()
    schema = parquet_schema(origin)
    with replacing(out) as file, parquet.ParquetWriter(file, schema, **PARQUET_OPTIONS) as writer:
        for shard in shards:
            writer.write_table(parquet_table(shard, schema))


def _shards(folder: Path) -> list[Path]:
    # By number: those above 99999 have more digits.
    return sorted(folder.glob("part-*.parquet"), key=lambda path: (len(path.name), path.name))


def _parquet_blocks(path: Path, dim: int) -> Iterator[Block]:
    from perception_rt.bulk.shards import columns

    arrow, parquet = pyarrow()
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(_BLOCK_ROWS, columns=["id", "source", "embedding"]):
                yield columns(path, arrow.Table.from_batches([batch]), dim)
    except (arrow.ArrowException, OSError):
        raise InputError(f"{str(path)!r:.200} is damaged") from None


def mapped_rows(result: Result) -> NDArray[Any]:
    """Maps the rows (N, D) of a `.npy` result into memory; InputError if it is damaged."""
    try:
        rows: NDArray[Any] = np.lib.format.open_memmap(result.path, mode="r")
    except (OSError, ValueError, EOFError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise InputError(f"{str(result.path)!r:.200} cannot be read: {reason}") from None
    if rows.dtype.name not in DTYPES or rows.ndim != 2 or rows.shape[1] != result.dim:
        raise _misfit(result)
    return rows


def _npy_blocks(result: Result) -> Iterator[Block]:
    rows, path = mapped_rows(result), ids_path(result.path)
    try:
        with path.open(encoding="utf-8", newline="\n") as file:
            names = file.read().split("\n")[:-1]
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise InputError(f"{str(path)!r:.200} cannot be read: {reason}") from None
    if len(rows) != len(names):
        raise _misfit(result)
    for start in range(0, len(rows), _BLOCK_ROWS):
        part = np.asarray(rows[start : start + _BLOCK_ROWS])
        ids = np.arange(start, start + len(part))
        yield ids, names[start : start + len(part)], part


def _jsonl_blocks(result: Result) -> Iterator[Block]:
    dtype = np.dtype(result.origin.get("dtype", "float32"))
    ids: list[int] = []
    names: list[str] = []
    rows: list[NDArray[Any]] = []
    with result.path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                row = np.array(fields["embedding"], dtype).reshape(result.dim)
                ids.append(int(fields["id"]))
                names.append(str(fields["source"]))
            except (ValueError, KeyError, TypeError):
                raise InputError(f"line {number} of {result.path} is no row") from None
            rows.append(row)
            if len(rows) == _BLOCK_ROWS:
                yield np.array(ids, np.int64), names, np.stack(rows)
                ids, names, rows = [], [], []
    if rows:
        yield np.array(ids, np.int64), names, np.stack(rows)


def _read_meta(out: Path) -> dict[str, Any]:
    path = meta_path(out)
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{str(path)!r:.200} cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        value = None
    return check_origin(path, value)


def _meta(origin: dict[str, Any]) -> bytes:
    return json.dumps(origin, indent=2).encode("ascii") + b"\n"


def _misfit(result: Result) -> InputError:
    return InputError(f"{str(result.path)!r:.200} does not fit its sources and its dimension")


def _line(source: str) -> bytes:
    """A source in one line; what a line or UTF-8 cannot hold is escaped."""
    if source.splitlines() != [source]:  # at "\r" and "\u2028" too, as readers may split it
        source = escaped(source)
    return source.encode("utf-8", "backslashreplace") + b"\n"
