"""Kernels that TensorRT for RTX compiled on this GPU, kept for the next process.

An engine of TensorRT for RTX is compiled for the GPU and its shapes when it first runs. The library
looks itself whether what it is given back is of this GPU and this version of its own.
"""

import hashlib
import os
from typing import Any

import numpy as np

from perception_rt.runtime.cache.disk_cache import DiskCache

_KIND = "kernels"
_MAX_BYTES = 1024 * 1024 * 1024  # of all packages


class KernelStore:
    """The compiled kernels of one engine, in a private directory."""

    def __init__(self, directory: str | os.PathLike[str], *, package_id: str, made_by: str) -> None:
        """Opens the directory.

        Args:
            directory: nobody else may write there: kernels are code.
            package_id: of the engine.
            made_by: what they depend on beside it: library, GPU, driver and file.

        Raises:
            InputError: the directory cannot be made, or others can write to it.
        """
        self._disk = DiskCache(directory, package_id=package_id, kind=_KIND, max_bytes=_MAX_BYTES)
        self._name = hashlib.sha256(made_by.encode()).hexdigest()
        self._nbytes = 0

    def read(self) -> bytes | None:
        """What was written last; None if there is nothing whole."""
        arrays = self._disk.read(self._name)
        if arrays is None or len(arrays) != 1:
            return None
        data = arrays[0].tobytes()
        self._nbytes = len(data)
        return data

    def write(self, kernels: Any) -> None:
        """Keeps a serialized cache, a buffer, if it has grown since it was read."""
        data = np.frombuffer(kernels, np.uint8)
        if data.nbytes > self._nbytes:
            self._disk.write(self._name, [data])
            self._nbytes = data.nbytes
