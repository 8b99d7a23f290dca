"""Image features by a hash of the image: a second question about it needs no vision tower.

Within a bound in bytes; the least recently used entries go first. Keys are made here, of all that
features depend on, and never by a caller. It does not know how features are computed.

Legend: n tiles, t image tokens per tile, C channels of the decoder.
"""

import hashlib
import json
import os
import threading
from typing import Any

import numpy as np

from perception_rt.runtime.cache.disk_cache import DiskCache, bytes_of

Array = np.ndarray[Any, Any]

_KIND = "features"


def feature_key(package_id: str, spec_digest: str, mode: str, tiles: Array) -> str:
    """SHA-256, in hex, of everything that the features of an image depend on.

    Args:
        package_id: of the engine.
        spec_digest: of the parameters of preprocessing.
        mode: what else decides how `tiles` become features: which graph, how many tiles.
        tiles: what is encoded; its dtype and shape count too.
    """
    parts = [package_id, spec_digest, mode, tiles.dtype.name, list(tiles.shape)]
    digest = hashlib.sha256(json.dumps(parts).encode() + b"\n")
    digest.update(bytes_of(np.ascontiguousarray(tiles)))
    return digest.hexdigest()


class FeatureCache:
    """Image features of one package, in memory and, if wanted, in files. Safe in several threads.

    Attributes:
        max_bytes: bound on the memory, and again on the files; 0 keeps nothing.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        package_id: str,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """An empty cache, or what the directory has.

        Args:
            max_bytes: bound on the memory, and again on the files.
            package_id: of the engine; nothing is shared with another one.
            directory: for files, below a folder named by the package id; None for none.

        Raises:
            InputError: the directory cannot be made.
        """
        self.max_bytes = max_bytes
        self._lock = threading.Lock()
        self._entries: dict[str, Array] = {}  # the least recently used first
        self._nbytes = 0
        self._disk: DiskCache | None = None
        if directory is not None and max_bytes > 0:
            self._disk = DiskCache(
                directory, package_id=package_id, kind=_KIND, max_bytes=max_bytes
            )

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory."""
        return self._nbytes

    def get(self, key: str) -> Array | None:
        """The features, read-only float32 (n, t, C), or None."""
        with self._lock:
            features = self._entries.pop(key, None)
            if features is not None:
                self._entries[key] = features
                return features
        arrays = None if self._disk is None else self._disk.read(key)
        if arrays is None or len(arrays) != 1:
            return None
        (features,) = arrays
        self._insert(key, features)
        return features

    def put(self, key: str, features: Array) -> None:
        """Keeps a copy of features, float32 (n, t, C), unless they alone exceed the bound."""
        if not 0 < features.nbytes <= self.max_bytes:
            return
        features = features.copy()
        self._insert(key, features)
        if self._disk is not None:
            self._disk.write(key, [features])

    def _insert(self, key: str, features: Array) -> None:
        features.flags.writeable = False
        with self._lock:
            replaced = self._entries.pop(key, None)
            self._nbytes -= 0 if replaced is None else replaced.nbytes
            while self._nbytes + features.nbytes > self.max_bytes:
                self._nbytes -= self._entries.pop(next(iter(self._entries))).nbytes
            self._entries[key] = features
            self._nbytes += features.nbytes
