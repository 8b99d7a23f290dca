"""Reads images of Parquet files. pyarrow (extra `bulk`) is imported on first use."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Self

from perception_rt.bulk.listing import Item, Kind
from perception_rt.errors import BackendError, InputError

_COLUMNS = ("image", "jpg", "png", "webp", "bytes", "path")
_ROWS = 16  # decoded at a time
_BUFFER_BYTES = 1024 * 1024


def pyarrow() -> tuple[Any, Any]:
    """The modules `pyarrow` and `pyarrow.parquet`; BackendError if they are not installed."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise BackendError(
            'Parquet files need pyarrow: pip install "perception_rt[bulk]"'
        ) from None
    return pyarrow, pyarrow.parquet


class ImageColumn:
    """A column of a Parquet file: encoded images, paths, or structs with `bytes` or `path`.

    Use it as a context manager, or only for `items`.

    Args:
        path: the file.
        column: the column; None for the first of image, jpg, png, webp, bytes and path.

    Raises:
        InputError: the file is unreadable or has no such column, or a column of another type.
        BackendError: pyarrow is not installed.
    """

    def __init__(self, path: str, column: str | None = None) -> None:
        arrow, parquet = pyarrow()
        self._path = path
        self._errors = (arrow.ArrowException, OSError, ValueError)
        if not Path(path).is_file():
            raise InputError(f"Parquet file {path!r:.200} does not exist, or is no file")
        try:
            self._file = parquet.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False)
            schema = self._file.schema_arrow
        except self._errors:
            raise self._damaged() from None
        self._column = self._named(schema.names, column)
        kind = _value_type(arrow, schema.field(self._column).type)
        self._folder = os.path.dirname(path)  # noqa: PTH120 - keeps a leading "./"
        # Columns of images of the library datasets have bytes, or a path in their place.
        self._fields: tuple[str, ...] = ()
        if arrow.types.is_struct(kind):
            types = {field.name: _value_type(arrow, field.type) for field in kind}
            wanted = (("bytes", _is_bytes), ("path", _is_text))
            self._fields = tuple(n for n, fits in wanted if n in types and fits(arrow, types[n]))
        self.is_path = _is_text(arrow, kind)
        if not (self.is_path or _is_bytes(arrow, kind) or self._fields):
            raise InputError(
                f"column {self._column!r:.80} of {path!r:.200} has neither bytes nor paths, "
                f"but {str(kind)!r:.60}"
            )
        self._values: Iterator[Any] = iter(())
        self._next = self._end = 0  # row of the next value; end of its row group

    def items(self, kind_of: Callable[[str], Kind | None]) -> Iterator[Item]:
        """Yields the items; relative paths are relative to the Parquet file's folder.

        Args:
            kind_of: kind of the file at a path; None counts as an image.
        """
        with self:
            if not self.is_path:
                for row in range(self._file.metadata.num_rows):
                    yield Item("image", f"{self._path}#{row}", "cell", self._path, row)
                return
            for row, value in enumerate(self._rows(range(self._file.num_row_groups))):
                if value:
                    yield Item(kind_of(value) or "image", self._file_at(value))
                else:
                    yield Item("image", f"{self._path}#{row}", "missing")

    def read(self, row: int) -> str | bytes:
        """Returns the bytes of a row, or its path; fast for ascending rows.

        Raises:
            InputError: the row is empty or not in the file, or the file is damaged.
        """
        if not self._next <= row < self._end:
            self._seek(row)
        try:
            while self._next < row:
                next(self._values)
                self._next += 1
            value = next(self._values)
        except StopIteration:
            self._end = 0
            raise self._damaged() from None
        self._next += 1
        if not value:
            raise InputError(f"row {row} of {self._path!r:.200} has no image")
        return self._file_at(value) if isinstance(value, str) else bytes(value)

    def _seek(self, row: int) -> None:
        """Starts at the row group of a row."""
        first = 0
        for group in range(self._file.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            if row < first + count:
                self._values = self._rows([group])
                self._next, self._end = first, first + count
                return
            first += count
        raise InputError(f"{self._path!r:.200} has no row {row}: did it change?")

    def _rows(self, groups: Any) -> Iterator[Any]:
        names = [f"{self._column}.{field}" for field in self._fields] or [self._column]
        try:
            batches = self._file.iter_batches(_ROWS, row_groups=list(groups), columns=names)
            for batch in batches:
                for value in batch.column(0):
                    found = value.as_py()
                    if isinstance(found, dict):
                        found = next(filter(None, map(found.get, self._fields)), None)
                    yield found
        except self._errors:
            raise self._damaged() from None

    def _file_at(self, path: str) -> str:
        return os.path.join(self._folder, path)  # noqa: PTH118

    def _named(self, names: list[str], column: str | None) -> str:
        found = [name for name in _COLUMNS if name in names] if column is None else [column]
        if not found or found[0] not in names:
            wanted = "of images" if column is None else repr(column)
            shown = ", ".join(names)
            raise InputError(
                f"{self._path!r:.200} has no column {wanted:.80}; "
                f"name one by --column: {shown:.200}"
            )
        return found[0]

    def _damaged(self) -> InputError:
        return InputError(f"{self._path!r:.200} is damaged, or not a Parquet file")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _value_type(arrow: Any, kind: Any) -> Any:
    """Type of the values, which may be stored once each in a dictionary."""
    return kind.value_type if arrow.types.is_dictionary(kind) else kind


def _is_bytes(arrow: Any, kind: Any) -> bool:
    return kind in (arrow.binary(), arrow.large_binary(), arrow.binary_view())


def _is_text(arrow: Any, kind: Any) -> bool:
    return kind in (arrow.string(), arrow.large_string(), arrow.string_view())
