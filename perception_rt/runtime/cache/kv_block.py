"""Memory for the keys and values of several sequences: what a decoder engine updates in place.

A block has a fixed number of rows, one sequence each, of a fixed number of slots, one token each.
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
    """What an engine updates, by the names of its inputs. It never changes.

    So an engine that is given the same object again need not look at it: a decoder's step has up to
    72 caches. (A dict itself cannot be referred to weakly.)
    """

    __slots__ = ("__weakref__",)


NO_STATES = States()


class CacheBlock:
    """Keys and values of R sequences of at most S tokens; all zero at first. On the host.

    Memory is spent page by page as tokens are written, and returned when the block and all that
    refers to its arrays are gone. Not safe to use from several threads at once.

    Attributes:
        shape: of one token.
        rows: R.
        slots: S.
        keys: one array per layer, (R, K, S, E), as the backend updates it.
        values: the same.
        stays: whether it is worth keeping while no row is in use, since to make it takes long.
    """

    stays = False
    keys: list[Any]
    values: list[Any]

    def __init__(self, shape: CacheShape, rows: int, slots: int) -> None:
        """A block of zeros.

        Args:
            shape: of one token.
            rows: R.
            slots: S.

        Raises:
            CapacityError: there is no memory for it.
        """
        assert rows >= 1 and slots >= 1
        self.shape = shape
        self.rows = rows
        self.slots = slots
        self._states: dict[tuple[int, int, int, int], States] = {}
        self._allocate()

    def _allocate(self) -> None:
        """Sets `keys` and `values`."""
        memory = _pages(self.nbytes).view(self.shape.dtype)
        sizes = (self.shape.layers, 2, self.rows, self.shape.kv_heads, self.slots)
        self._memory: Array = memory.reshape(*sizes, self.shape.head_dim)
        self.keys = list(self._memory[:, 0])
        self.values = list(self._memory[:, 1])

    @property
    def nbytes(self) -> int:
        """Bytes of all rows, touched or not."""
        return self.rows * self.slots * self.shape.bytes_per_token

    def states(self, layers: range, rows: slice) -> States:
        """Some layers' keys and values of adjacent rows, by name; the same object every time."""
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
        """A copy of the first `length` tokens of a row, C-contiguous (layers, 2, K, T, E)."""
        return self._tokens(row, length).copy()

    def write(self, row: int, snapshot: Array, length: int) -> None:
        """Puts the first `length` tokens of what `read` returned into a row."""
        assert snapshot.dtype == self._memory.dtype and length <= snapshot.shape[3]
        self._tokens(row, length)[...] = snapshot[:, :, :, :length]

    def clear(self, row: int, length: int) -> None:
        """Zeros over the first `length` tokens of a row that another sequence may get."""
        self._tokens(row, length)[...] = 0

    def _tokens(self, row: int, length: int) -> Array:
        """View of the first tokens of a row, (layers, 2, K, T, E)."""
        assert 0 <= row < self.rows and 0 <= length <= self.slots
        return self._memory[:, :, row, :, :length]


def _pages(nbytes: int) -> Array:
    """Zeroed bytes of memory that is spent 4 KiB at a time.

    NumPy asks for huge pages, and the heads of a long row are further apart than one of those: its
    first token would cost most of the memory that all of its tokens need.
    """
    try:
        memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except (OSError, OverflowError):
        raise CapacityError(f"there is no memory for a cache of {nbytes} bytes") from None
    with suppress(OSError):  # of a kernel without huge pages
        memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.uint8)
