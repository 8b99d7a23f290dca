"""Memory for keys and values of several sequences, which a decoder engine updates in place.

A block has a fixed number of rows, one per sequence, with a fixed number of slots, one per token.
It does not know which rows are in use, nor how long their sequences are.

Legend: R rows, S slots, K key and value heads, E channels per head, T tokens.
"""

import mmap
from contextlib import suppress
from typing import Any

import numpy as np

from perception_rt.errors import CapacityError
from perception_rt.package import contract
from perception_rt.package.plm_graphs import CacheShape

Array = np.ndarray[Any, Any]


class States(dict[str, Any]):
    """Arrays that an engine updates in place, by input name; the mapping never changes.

    An engine that gets the same object again need not check it: a decode step has up to 72 caches.
    (A class of its own, because a plain dict has no weak references.)
    """

    __slots__ = ("__weakref__",)


NO_STATES = States()


class CacheBlock:
    """Keys and values of R sequences of at most S tokens, in host memory, initially zero.

    Memory is spent page by page as tokens are written, and freed with the last reference to the
    block and its arrays. Not thread-safe.

    Attributes:
        shape: shape of one token's keys and values.
        rows: R.
        slots: S.
        keys: one array per layer, (R, K, S, E).
        values: one array per layer, (R, K, S, E).
        stays: whether to keep the block while no row is in use, because allocating is expensive.
    """

    stays = False
    keys: list[Any]
    values: list[Any]

    def __init__(self, shape: CacheShape, rows: int, slots: int) -> None:
        """Allocates a block; CapacityError if there is no memory."""
        assert rows >= 1 and slots >= 1
        self.shape = shape
        self.rows = rows
        self.slots = slots
        self._states: dict[tuple[int, int, int, int], States] = {}
        self._allocate()

    def _allocate(self) -> None:
        """Sets `keys` and `values`."""
        memory = _pages(self.nbytes).view(self.shape.dtype)
        # bytes -> (layers, 2, R, K, S, E)
        sizes = (self.shape.layers, 2, self.rows, self.shape.kv_heads, self.slots)
        self._memory: Array = memory.reshape(*sizes, self.shape.head_dim)
        self.keys = list(self._memory[:, 0])
        self.values = list(self._memory[:, 1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, used or not."""
        return self.rows * self.slots * self.shape.bytes_per_token

    def states(self, layers: range, rows: slice) -> States:
        """Returns keys and values of some layers and adjacent rows; always the same object."""
        asked = layers.start, layers.stop, rows.start, rows.stop
        if asked not in self._states:
            keys = {contract.key_cache(layer): self.keys[layer][rows] for layer in layers}
            values = {contract.value_cache(layer): self.values[layer][rows] for layer in layers}
            self._states[asked] = States(keys | values)
        return self._states[asked]

    def copy_row(self, src_row: int, dst_block: "CacheBlock", dst_row: int, length: int) -> None:
        """Copies the first `length` tokens of a row to a row of this or another block."""
        dst_block._tokens(dst_row, length)[...] = self._tokens(src_row, length)

    def read(self, row: int, length: int) -> Array:
        """Returns a copy of the first `length` tokens of a row, contiguous (layers, 2, K, T, E)."""
        return self._tokens(row, length).copy()

    def write(self, row: int, snapshot: Array, length: int) -> None:
        """Writes the first `length` tokens of an array from `read` to a row."""
        assert snapshot.dtype == self._memory.dtype and length <= snapshot.shape[3]
        self._tokens(row, length)[...] = snapshot[:, :, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Zeroes the first `length` tokens of a row, before another sequence gets it."""
        self._tokens(row, length)[...] = 0

    def _tokens(self, row: int, length: int) -> Array:
        """Returns a view of the first tokens of a row, (layers, 2, K, T, E)."""
        assert 0 <= row < self.rows and 0 <= length <= self.slots
        return self._memory[:, :, row, :, :length]


def _pages(nbytes: int) -> Array:
    """Allocates zeroed bytes whose memory is spent 4 KiB at a time.

    NumPy asks for huge pages. The heads of a long row are further apart than one huge page, so its
    first token would cost most of the memory of the whole row.
    """
    # Windows has no flags; its memory without a file is private.
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, nbytes, **flags)
    except (OSError, OverflowError):
        raise CapacityError(f"there is no memory for a cache of {nbytes} bytes") from None
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with suppress(OSError):  # a kernel without huge pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)
