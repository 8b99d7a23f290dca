"""Image features by content: a second question about an image needs no vision tower.

Bounded in bytes; the least recently used features go first. Keys are hashes made here of everything
that features depend on. Does not know how features are computed.

Legend: n tiles, t image tokens per tile, C decoder width.
"""

import hashlib
import json
import os
import threading
from typing import Any

import numpy as np

from perception_rt.runtime.cache.disk_cache import DiskCache, bytes_of
from perception_rt.runtime.cache.lru import ByteLru

Array = np.ndarray[Any, Any]

_KIND = "features"


def feature_key(package_id: str, graph: str, tiles: Array) -> str:
    """Returns the SHA-256, in hex, of everything that the features of tiles depend on.

    Args:
        package_id: the package, and with it the preprocessing that made the tiles.
        graph: name of the graph that encodes them.
        tiles: the tiles; their dtype and shape count too.
    """
    parts = [package_id, graph, tiles.dtype.name, list(tiles.shape)]
    digest = hashlib.sha256(json.dumps(parts).encode() + b"\n")
    digest.update(bytes_of(np.ascontiguousarray(tiles)))
    return digest.hexdigest()


class FeatureCache:
    """Image features of one package, in memory and optionally in files. Thread-safe.

    Attributes:
        memory: the features in memory.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        package_id: str,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Opens a cache; what the directory has is read when it is asked for.

        Args:
            max_bytes: bound on the memory, and separately on the files; 0 keeps nothing.
            package_id: names the folder of the files; packages share nothing.
            directory: where files are kept; None for memory only.

        Raises:
            InputError: as `DiskCache`.
        """
        self.memory: ByteLru[Array] = ByteLru(max_bytes)
        self._lock = threading.Lock()
        self._disk: DiskCache | None = None
        if directory is not None and max_bytes > 0:
            self._disk = DiskCache(
                directory, package_id=package_id, kind=_KIND, max_bytes=max_bytes
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the features in memory."""
        return self.memory.nbytes

    def close(self) -> None:
        """Closes the directory; a second call does nothing."""
        if self._disk is not None:
            self._disk.close()

    def get(self, key: str) -> Array | None:
        """Returns features, read-only float32 (n, t, C), or None."""
        with self._lock:
            features = self.memory.get(key)
        if features is not None:
            return features
        arrays = None if self._disk is None else self._disk.read(key)
        if arrays is None or len(arrays) != 1:
            return None
        (features,) = arrays
        self._insert(key, features)
        return features

    def put(self, key: str, features: Array) -> None:
        """Keeps a copy of features, float32 (n, t, C), unless they alone exceed the bound."""
        if not 0 < features.nbytes <= self.memory.max_bytes:
            return
        features = features.copy()
        self._insert(key, features)
        if self._disk is not None:
            self._disk.write(key, [features])

    def _insert(self, key: str, features: Array) -> None:
        features.flags.writeable = False
        with self._lock:
            self.memory.put(key, features)
