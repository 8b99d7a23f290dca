"""Writes and reads one shard of a result: consecutive items with their rows and errors.

A Parquet shard is part of a directory result. A NumPy shard is a working file of a `.npy` or
`.jsonl` result, which so needs no pyarrow.

Legend: N rows, D channels.
"""

import io
import json
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.atomic import write_bytes
from perception_rt.bulk.parquet import pyarrow
from perception_rt.errors import InputError, escaped

DTYPES = ("float32", "float16")
METADATA = b"perception_rt"  # key in a Parquet file
_FIELDS = {"package": str, "model": str, "dim": int}


@dataclass(frozen=True, slots=True, kw_only=True)
class ItemError:
    """Says why an item has no row."""

    id: int
    source: str
    reason: str

    def line(self) -> str:
        """Its line in `errors.jsonl`."""
        fields = {"id": self.id, "source": self.source, "reason": self.reason}
        return json.dumps(fields) + "\n"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """Rows of the items from `start` to `stop`.

    Attributes:
        start: number of the first item.
        stop: number after the last item.
        ids: int64 (N), ascending.
        sources: N names.
        rows: float32 or float16 (N, D).
        errors: one error per item without a row.
    """

    start: int
    stop: int
    ids: NDArray[np.int64]
    sources: Sequence[str]
    rows: NDArray[Any]
    errors: tuple[ItemError, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ShardHead:
    """Facts about a shard that are read without its rows.

    Attributes:
        origin: `package`, `model` and `dim` of the result, and more.
        start: as in `Shard`.
        stop: as in `Shard`.
        count: number of rows.
        errors: as in `Shard`.
    """

    origin: dict[str, Any]
    start: int
    stop: int
    count: int
    errors: tuple[ItemError, ...]


class ShardFormat(Protocol):
    """A kind of shard file."""

    suffix: str

    def write(self, path: Path, shard: Shard, origin: dict[str, Any]) -> None:
        """Writes a shard completely or not at all."""

    def head(self, path: Path) -> ShardHead:
        """Reads the facts of a shard; InputError if it is unreadable."""

    def read(self, path: Path) -> Shard:
        """Reads a shard; InputError if it is unreadable."""


class ParquetShards:
    """Shards with the columns `id`, `source` and `embedding`, and a JSON object as metadata."""

    suffix = ".parquet"

    def write(self, path: Path, shard: Shard, origin: dict[str, Any]) -> None:
        """See `ShardFormat.write`."""
        _, parquet = pyarrow()
        schema = parquet_schema(origin, shard)
        buffer = io.BytesIO()
        with parquet.ParquetWriter(buffer, schema, **PARQUET_OPTIONS) as writer:
            writer.write_table(parquet_table(shard, schema))
        write_bytes(path, buffer.getvalue())

    def head(self, path: Path) -> ShardHead:
        """See `ShardFormat.head`."""
        with _parquet_file(path) as file:
            return _head(path, _parquet_origin(path, file), file.metadata.num_rows)

    def read(self, path: Path) -> Shard:
        """See `ShardFormat.read`."""
        with _parquet_file(path) as file:
            head = _head(path, _parquet_origin(path, file), file.metadata.num_rows)
            table = _read_table(path, file)
        ids, sources, rows = columns(path, table, head.origin["dim"])
        return Shard(
            start=head.start, stop=head.stop, ids=ids, sources=sources, rows=rows,
            errors=head.errors,
        )  # fmt: skip


class NumpyShards:
    """Shards as `.npz` files: ids, rows, and sources and metadata in JSON."""

    suffix = ".npz"

    def write(self, path: Path, shard: Shard, origin: dict[str, Any]) -> None:
        """See `ShardFormat.write`."""
        buffer = io.BytesIO()
        np.savez(
            buffer,
            ids=shard.ids,
            rows=shard.rows,
            sources=_json_array(list(shard.sources)),
            metadata=_json_array(shard_metadata(origin, shard)),
        )
        write_bytes(path, buffer.getvalue())

    def head(self, path: Path) -> ShardHead:
        """See `ShardFormat.head`."""
        origin, ids, _, _ = self._load(path, rows=False)
        return _head(path, origin, len(ids))

    def read(self, path: Path) -> Shard:
        """See `ShardFormat.read`."""
        origin, ids, sources, rows = self._load(path, rows=True)
        head = _head(path, origin, len(ids))
        return Shard(
            start=head.start, stop=head.stop, ids=ids, sources=sources, rows=rows,
            errors=head.errors,
        )  # fmt: skip

    def _load(self, path: Path, *, rows: bool) -> tuple[Any, Any, Any, Any]:
        try:
            with zipfile.ZipFile(path) as file:
                origin = json.loads(_member(file, "metadata").tobytes())
                ids = _member(file, "ids")
                if not rows:
                    return origin, ids, None, None
                sources = json.loads(_member(file, "sources").tobytes())
                return origin, ids, sources, _member(file, "rows")
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            raise _damaged(path) from None


# Embeddings hold no repeated values, and hardly compress.
PARQUET_OPTIONS: dict[str, Any] = {
    "compression": {"id": "zstd", "source": "zstd"},
    "use_dictionary": False,
    "write_statistics": ["id"],
}


def shard_metadata(origin: dict[str, Any], shard: Shard) -> dict[str, Any]:
    """Metadata of a shard: the origin, its items, and its errors."""
    errors = [[error.id, error.source, error.reason] for error in shard.errors]
    return {**origin, "items": [shard.start, shard.stop], "errors": errors}


def parquet_schema(origin: dict[str, Any], shard: Shard | None = None) -> Any:
    """Schema of a result; with a shard, its metadata too."""
    arrow, _ = pyarrow()
    metadata = origin if shard is None else shard_metadata(origin, shard)
    scalar = {"float32": arrow.float32(), "float16": arrow.float16()}[origin["dtype"]]
    fields = [
        arrow.field("id", arrow.int64(), nullable=False),
        arrow.field("source", arrow.string(), nullable=False),
        arrow.field("embedding", arrow.list_(scalar, origin["dim"]), nullable=False),
    ]
    return arrow.schema(fields, metadata={METADATA: json.dumps(metadata).encode("ascii")})


def parquet_table(shard: Shard, schema: Any) -> Any:
    """A shard as a table of `parquet_schema`."""
    arrow, _ = pyarrow()
    kind = schema.field("embedding").type
    values = arrow.array(np.ascontiguousarray(shard.rows).ravel(), kind.value_type)
    return arrow.Table.from_arrays(
        [
            arrow.array(shard.ids, arrow.int64()),
            arrow.array([encodable(source) for source in shard.sources], arrow.string()),
            arrow.FixedSizeListArray.from_arrays(values, type=kind),
        ],
        schema=schema,
    )


def columns(path: Path, table: Any, dim: int) -> tuple[NDArray[np.int64], list[str], NDArray[Any]]:
    """Ids, sources and rows (N, D) of a table; InputError if it has other columns."""
    try:
        embedding = table.column("embedding").combine_chunks()
        rows = np.asarray(embedding.flatten().to_numpy(zero_copy_only=False))
        ids = np.asarray(table.column("id").to_numpy(), np.int64)
        rows = rows.reshape(len(ids), dim)
        if rows.dtype.name not in DTYPES:
            raise _damaged(path)
        return ids, table.column("source").to_pylist(), rows
    except (KeyError, ValueError, TypeError, AttributeError):
        raise InputError(
            f"{str(path)!r:.200} has no columns id, source and embedding of {dim} numbers"
        ) from None


def encodable(source: str) -> str:
    """A source as UTF-8 can hold it: bytes of a path that are not UTF-8 are escaped."""
    try:
        source.encode("utf-8")
    except UnicodeEncodeError:
        return escaped(source)
    return source


def check_origin(path: Path, value: object) -> dict[str, Any]:
    """Checks the facts that each result has; InputError if one is missing."""
    if not isinstance(value, dict) or any(type(value.get(k)) is not t for k, t in _FIELDS.items()):
        raise InputError(f"{str(path)!r:.200} was not written by perception_rt")
    return value


def _parquet_file(path: Path) -> Any:
    arrow, parquet = pyarrow()
    try:
        return parquet.ParquetFile(path)
    except (arrow.ArrowException, OSError, ValueError):
        raise _damaged(path) from None


def _parquet_origin(path: Path, file: Any) -> dict[str, Any]:
    try:
        value = json.loads((file.schema_arrow.metadata or {}).get(METADATA, b"null"))
    except (ValueError, RecursionError):
        value = None
    return check_origin(path, value)


def _read_table(path: Path, file: Any) -> Any:
    arrow, _ = pyarrow()
    try:
        return file.read(["id", "source", "embedding"])
    except (arrow.ArrowException, OSError, ValueError, KeyError):
        raise _damaged(path) from None


def _head(path: Path, origin: dict[str, Any], count: int) -> ShardHead:
    try:
        start, stop = origin.get("items", (0, count))
        errors = tuple(
            ItemError(id=int(number), source=str(source), reason=str(reason))
            for number, source, reason in origin.get("errors", ())
        )
    except (TypeError, ValueError):
        raise _damaged(path) from None
    return ShardHead(origin=origin, start=start, stop=stop, count=count, errors=errors)


def _member(file: zipfile.ZipFile, name: str) -> NDArray[Any]:
    with file.open(f"{name}.npy") as data:
        array: NDArray[Any] = np.lib.format.read_array(data, allow_pickle=False)
        return array


def _json_array(value: object) -> NDArray[np.uint8]:
    return np.frombuffer(json.dumps(value).encode("ascii"), np.uint8)


def _damaged(path: Path) -> InputError:
    return InputError(f"{str(path)!r:.200} is damaged")
