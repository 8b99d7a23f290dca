"""Keeps kernels that TensorRT for RTX compiled on this GPU for the next process.

TensorRT for RTX compiles an engine for the GPU and the input shapes when it first runs. The library
itself checks that stored kernels fit this GPU and its own version.
"""

import hashlib
import os
from typing import Any

import numpy as np

from perception_rt.runtime.cache.disk_cache import DiskCache

_KIND = "kernels"
_MAX_BYTES = 1024 * 1024 * 1024  # kernels of all packages together


class KernelCache:
    """Compiled kernels of one engine, in a private directory."""

    def __init__(self, directory: str | os.PathLike[str], *, package_id: str, made_by: str) -> None:
        """Opens the directory.

        Args:
            directory: private directory; no other user may write to it, as kernels are code.
            package_id: id of the package that has the engine.
            made_by: key of what else the kernels depend on: library, GPU, driver and file.

        Raises:
            InputError: the directory cannot be made, or other users can write to it.
        """
        self._disk = DiskCache(directory, package_id=package_id, kind=_KIND, max_bytes=_MAX_BYTES)
        self._name = hashlib.sha256(made_by.encode()).hexdigest()
        self._nbytes = 0

    def read(self) -> bytes | None:
        """Kernels that were written last; None if there are no intact ones."""
        arrays = self._disk.read(self._name)
        if arrays is None or len(arrays) != 1:
            return None
        data = arrays[0].tobytes()
        self._nbytes = len(data)
        return data

    def write(self, kernels: Any) -> None:
        """Stores serialised kernels, a buffer, if they have grown since `read`."""
        data = np.frombuffer(kernels, np.uint8)
        if data.nbytes > self._nbytes:
            self._disk.write(self._name, [data])
            self._nbytes = data.nbytes
