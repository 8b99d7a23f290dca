"""Reads images of Parquet files. pyarrow (extra `bulk`) is imported on first use."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from perception_rt.bulk.listing import Item
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
    """A column of a Parquet file: encoded images, structs with their `bytes`, or paths.

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
        kind, types = schema.field(self._column).type, arrow.types
        self._field = ""
        if types.is_struct(kind) and kind.get_field_index("bytes") >= 0:
            self._field, kind = "bytes", kind.field("bytes").type
        self.is_path = types.is_string(kind) or types.is_large_string(kind)
        if not (self.is_path or types.is_binary(kind) or types.is_large_binary(kind)):
            raise InputError(
                f"column {self._column!r:.80} of {path!r:.200} has neither bytes nor paths, "
                f"but {str(kind)!r:.60}"
            )
        self._values: Iterator[Any] = iter(())
        self._next = self._end = 0  # row of the next value; end of its row group

    def items(self) -> Iterator[Item]:
        """Yields the images; relative paths are relative to the Parquet file's folder."""
        with self:
            if not self.is_path:
                for row in range(self._file.metadata.num_rows):
                    yield Item("image", f"{self._path}#{row}", "cell", self._path, row)
                return
            folder = os.path.dirname(self._path)  # noqa: PTH120 - keeps a leading "./"
            for row, value in enumerate(self._rows(range(self._file.num_row_groups))):
                if value:
                    yield Item("image", os.path.join(folder, value))  # noqa: PTH118
                else:
                    yield Item("image", f"{self._path}#{row}", "missing")

    def read(self, row: int) -> bytes:
        """Returns the bytes of a row; fast for ascending rows.

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
        return bytes(value)

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
        name = f"{self._column}.{self._field}" if self._field else self._column
        try:
            batches = self._file.iter_batches(_ROWS, row_groups=list(groups), columns=[name])
            for batch in batches:
                for value in batch.column(0):
                    found = value.as_py()
                    yield found.get(self._field) if isinstance(found, dict) else found
        except self._errors:
            raise self._damaged() from None

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
