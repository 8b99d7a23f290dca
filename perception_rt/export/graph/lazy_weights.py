"""Constants of a graph as promises: what they are is known, their bytes exist while written.

Legend: O rows of a matrix.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from perception_rt.errors import ExportError

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]
Rows = Callable[[int, int], Array]

# A weight that can be made row by row is made in pieces of about this many bytes of float32.
PIECE_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant of a graph whose bytes exist only while they are written.

    Attributes:
        name: unique within a package: equal names mean equal bytes.
        dtype: numpy dtype.
        shape: sizes.
        load: reads or computes the array; pure, may be called again.
        fixed: keeps its dtype in a graph of another.
        origin: the checkpoint tensor that it is made from, if it is one.
        rows: reads or computes the rows from one index to another, if that costs only these rows.
        widest: elements of a row of the widest array that a row is made from, if not of this one.
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
        """The contiguous array; ExportError that names the weight if it is not finite."""
        return self._checked(self.load(), self.shape)

    def pieces(self) -> Iterator[Array]:
        """The array as contiguous runs of rows, in order; one at a time is in memory."""
        if self.rows is None:
            yield self.array()
            return
        for start, stop in row_ranges((self.shape[0], max(self.widest, prod(self.shape[1:])))):
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
        """`function` of this weight, of the same dtype, under a name that says so."""
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
        """`function` of each run of rows of this weight: the first axis stays."""
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
        """The same bytes, and so the same name, in another shape with as many rows."""
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
    """A small constant that is known now, and keeps its dtype."""
    return Weight(name, array.dtype, array.shape, lambda: array, fixed=True)


def row_ranges(shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Runs of rows that are at most about 64 MiB in float32."""
    row_bytes = 4 * int(np.prod(shape[1:], dtype=np.int64))
    step = max(1, PIECE_BYTES // max(1, row_bytes))
    for start in range(0, shape[0], step):
        yield start, min(start + step, shape[0])
