"""Lazy constants of a graph: name, dtype and shape are known, values are loaded when written."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from perception_rt.errors import ExportError

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]
Rows = Callable[[int, int], Array]

# Weights that can be made row by row are made in pieces of about this size, counted in float32.
PIECE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant of a graph, in memory only while it is written.

    Attributes:
        name: unique in a package; equal names mean equal bytes.
        dtype: NumPy dtype.
        shape: sizes.
        load: reads or computes the array; may be called several times.
        fixed: whether the dtype stays in a graph of another dtype.
        origin: name of the checkpoint tensor that it is made from; empty if there is none.
        rows: reads or computes a range of rows at the cost of these rows only; None if impossible.
        widest: elements per row of the widest array on the way to this one, if wider than this.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], Array]
    fixed: bool = False
    origin: str = ""
    rows: Rows | None = None
    widest: int = 0

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> Array:
        """The contiguous array; ExportError if a value is not finite."""
        return self._checked(self.load(), self.shape)

    def pieces(self, multiple: int = 1) -> Iterator[Array]:
        """The array in contiguous pieces of rows, in order; all but the last of a multiple."""
        if self.rows is None:
            yield self.array()
            return
        shape = self.shape[0], max(self.widest, prod(self.shape[1:]))
        for start, stop in row_ranges(shape, multiple):
            yield self._checked(self.rows(start, stop), (stop - start, *self.shape[1:]))

    def _checked(self, array: Array, shape: tuple[int, ...]) -> Array:
        array = np.asarray(array, order="C")
        assert array.shape == shape and array.dtype == self.dtype, self.name
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            raise ExportError(f"{self.name} is not finite as {self.dtype}")
        return array

    def derive(
        self, suffix: str, function: Callable[[Array], Array], shape: tuple[int, ...]
    ) -> "Weight":
        """A weight of the same dtype: this one after `function`; its name gets the suffix."""
        load = self.load
        return replace(
            self, name=self.name + suffix, shape=shape, load=lambda: function(load()), rows=None
        )

    def derive_rows(
        self,
        suffix: str,
        function: Callable[[Array], Array],
        shape: tuple[int, ...],
        dtype: DType,
        *,
        fixed: bool = True,
    ) -> "Weight":
        """A weight made from this one row by row: `function` keeps the first axis."""
        load, rows = self.load, self.rows
        return replace(
            self,
            name=self.name + suffix,
            shape=shape,
            dtype=dtype,
            fixed=fixed,
            load=lambda: function(load()),
            rows=None if rows is None else lambda start, stop: function(rows(start, stop)),
            widest=max(self.widest, prod(self.shape[1:])),
        )

    def reshaped(self, shape: tuple[int, ...]) -> "Weight":
        """The same bytes under the same name, in another shape with the same number of rows."""
        rows = self.rows
        load = self.load
        return replace(
            self,
            shape=shape,
            load=lambda: load().reshape(shape),
            rows=None
            if rows is None
            else lambda start, stop: rows(start, stop).reshape(-1, *shape[1:]),
        )


def constant(name: str, array: Array) -> Weight:
    """A small constant with known values, which keeps its dtype."""
    return Weight(name, array.dtype, array.shape, lambda: array, fixed=True)


def row_ranges(shape: tuple[int, ...], multiple: int = 1) -> Iterator[tuple[int, int]]:
    """Ranges of rows, each at most about PIECE_BYTES in float32, all but the last of a multiple."""
    row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, PIECE_BYTES // max(1, row_bytes) // multiple) * multiple
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
