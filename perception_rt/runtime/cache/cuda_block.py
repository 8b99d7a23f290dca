"""A cache block in GPU memory.

The engine updates it there. When the host moves, reads, restores or clears rows, the device copies
or zeroes them.

Legend: R rows, S slots, K key and value heads, E channels per head, T tokens.
"""

from math import prod
from typing import Any

import numpy as np

from perception_rt.package.plm_graphs import CacheShape
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cuda import Box, Cuda, DeviceArray

Array = np.ndarray[Any, Any]


class DeviceBlock(CacheBlock):
    """A `CacheBlock` on a GPU, whose memory is spent at once.

    It stays while no row is in use, because CUDA graphs are captured for its addresses.
    """

    stays = True

    def __init__(self, cuda: Cuda, shape: CacheShape, rows: int, slots: int) -> None:
        """Allocates a block and zeroes it on the device; see `CacheBlock`."""
        self._cuda = cuda
        super().__init__(shape, rows, slots)

    def _allocate(self) -> None:
        shape, dtype = self.shape, np.dtype(self.shape.dtype)
        sizes = (self.rows, shape.kv_heads, self.slots, shape.head_dim)
        self._line = self.slots * shape.head_dim * dtype.itemsize  # bytes of one head
        self._layer = prod(sizes) * dtype.itemsize  # bytes of one layer's keys, or values
        memory = self._cuda.allocate(self.nbytes)
        places = range(memory.address, memory.address + self.nbytes, self._layer)
        arrays = [
            DeviceArray(memory=memory, address=place, shape=sizes, dtype=dtype) for place in places
        ]
        self.keys, self.values = arrays[::2], arrays[1::2]
        self._cuda.clear(
            Box(
                address=memory.address, width=self.nbytes, height=1, depth=1, pitch=self.nbytes,
                plane=self.nbytes,
            )
        )  # fmt: skip

    def copy_row(self, src_row: int, dst_block: CacheBlock, dst_row: int, length: int) -> None:
        """Copies the first `length` tokens of a row to a row of this or another block."""
        assert isinstance(dst_block, DeviceBlock)
        if length:
            self._cuda.copy(self._box(src_row, length), dst_block._box(dst_row, length))

    def read(self, row: int, length: int) -> Array:
        """Returns a copy of the first `length` tokens of a row, contiguous (layers, 2, K, T, E)."""
        shape = self.shape
        sizes = (shape.layers, 2, shape.kv_heads, length, shape.head_dim)
        snapshot = np.empty(sizes, shape.dtype)
        box = self._box(row, length)
        if length:
            self._cuda.copy(box, _host_box(snapshot, length))
        return snapshot

    def write(self, row: int, snapshot: Array, length: int) -> None:
        """Writes the first `length` tokens of an array from `read` to a row."""
        assert snapshot.dtype == self.shape.dtype and length <= snapshot.shape[3]
        snapshot = np.ascontiguousarray(snapshot)
        box = self._box(row, length)
        if length:
            self._cuda.copy(_host_box(snapshot, length), box)

    def clear(self, row: int, length: int) -> None:
        """Zeroes the first `length` tokens of a row, before another sequence gets it."""
        box = self._box(row, length)
        if length:
            self._cuda.clear(box)

    def _box(self, row: int, length: int) -> Box:
        """The first tokens of a row: one plane per layer's keys or values, one line per head."""
        assert 0 <= row < self.rows and 0 <= length <= self.slots
        return Box(
            address=self.keys[0][row : row + 1].address,
            width=length * self.shape.head_dim * np.dtype(self.shape.dtype).itemsize,
            height=self.shape.kv_heads,
            depth=2 * self.shape.layers,
            pitch=self._line,
            plane=self._layer,
        )


def _host_box(snapshot: Array, length: int) -> Box:
    """The first tokens of a host array (layers, 2, K, T, E)."""
    layers, two, heads, tokens, channels = snapshot.shape
    token = channels * snapshot.itemsize
    return Box(
        address=snapshot.ctypes.data,
        width=length * token,
        height=heads,
        depth=two * layers,
        pitch=tokens * token,
        plane=heads * tokens * token,
        on_host=True,
    )
