"""Keys and values of prompts: a beginning that prompts share runs through the decoder once.

Tokens are compared one by one, so that any common prefix counts. An image token is identified by
its tile's hash and its position in the tile. The least recently used entries go first.

Legend: T tokens.
"""

import hashlib
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perception_rt.runtime.cache.disk_cache import DiskCache, bytes_of
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.lru import ByteLru

Array = np.ndarray[Any, Any]

_KIND = "prefix"
_WORTH_READING = 2  # a file is read if at least this fraction of it, 1/2, is wanted


def sequence_keys(
    ids: Array, image_spans: Sequence[tuple[int, int]], feature_keys: Sequence[str]
) -> Array:
    """Returns what identifies each token, uint64 (T, 2).

    Args:
        ids: int64 (T,) token ids.
        image_spans: index of the first token of each image, and of the first after it.
        feature_keys: key of each image, from `feature_key`.
    """
    keys = np.zeros((len(ids), 2), np.uint64)
    keys[:, 0] = ids
    for (start, stop), feature in zip(image_spans, feature_keys, strict=True):
        assert 0 <= start <= stop <= len(ids)
        stream = hashlib.shake_128(feature.encode()).digest(16 * (stop - start))
        keys[start:stop] = np.frombuffer(stream, "<u8").reshape(-1, 2)
    return keys


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PrefixEntry:
    """Keys and values of a prompt.

    Attributes:
        keys: uint64 (T, 2), from `sequence_keys`.
        snapshot: keys and values of the T tokens, from `CacheBlock.read`.
    """

    keys: Array
    snapshot: Array

    @property
    def nbytes(self) -> int:
        """Bytes of both arrays."""
        return self.keys.nbytes + self.snapshot.nbytes


class PrefixCache:
    """Prompts of one package, in memory and optionally in files. Thread-safe.

    Attributes:
        memory: the entries in memory.
    """

    def __init__(
        self,
        max_bytes: int,
        *,
        package_id: str,
        directory: str | os.PathLike[str] | None = None,
    ) -> None:
        """Opens a cache, and reads the tokens of the entries in the directory.

        Args:
            max_bytes: bound on the memory, and separately on the files; 0 keeps nothing.
            package_id: names the folder of the files; packages share nothing.
            directory: where files are kept; None for memory only.

        Raises:
            InputError: as `DiskCache`.
        """
        self.memory: ByteLru[PrefixEntry] = ByteLru(max_bytes)
        self._lock = threading.Lock()
        self._disk: DiskCache | None = None
        self._stored: dict[str, Array] = {}  # token keys of the entries in files
        if directory is not None and max_bytes > 0:
            self._disk = DiskCache(
                directory, package_id=package_id, kind=_KIND, max_bytes=max_bytes
            )
            for name in self._disk.names():
                keys = self._disk.peek(name)
                if keys is not None and keys.dtype == np.uint64 and keys.shape[1:] == (2,):
                    self._stored[name] = keys

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory."""
        return self.memory.nbytes

    def close(self) -> None:
        """Closes the directory; a second call does nothing."""
        if self._disk is not None:
            self._disk.close()

    @property
    def stored(self) -> frozenset[str]:
        """Names of the entries that are known to be in files."""
        return frozenset(self._stored)

    def longest(self, keys: Array) -> tuple[int, PrefixEntry | None]:
        """Finds the entry with the longest common prefix.

        Args:
            keys: uint64 (T, 2), from `sequence_keys`.

        Returns:
            The number of common tokens and the entry; (0, None) without any.
        """
        with self._lock:
            lengths = {n: _common(keys, entry.keys) for n, entry in self.memory.items()}
            for name, other in self._stored.items():
                common = _common(keys, other)
                # The whole file would be read: not for a common system sentence alone.
                if name not in lengths and common * _WORTH_READING >= len(other):
                    lengths[name] = common
            # Among equals, entries in memory first: reading a file takes long and may fail.
            names = sorted(lengths, key=lambda name: (-lengths[name], name not in self.memory))
            for name in names:
                entry = self._open(name) if lengths[name] else None
                if entry is not None:
                    return lengths[name], entry
        return 0, None

    def restore(self, entry: PrefixEntry, length: int, block: CacheBlock, row: int) -> None:
        """Writes the first `length` tokens of an entry to a row."""
        block.write(row, entry.snapshot, length)

    def put(self, keys: Array, block: CacheBlock, row: int, length: int) -> None:
        """Keeps the first `length` tokens of a row, unless they alone exceed the bound.

        Args:
            keys: uint64 (T, 2), from `sequence_keys`, T at least `length`.
            block: block of the row.
            row: index of the row.
            length: number of tokens to keep.
        """
        keys = keys[:length].copy()
        size = keys.nbytes + length * block.shape.bytes_per_token
        if not 0 < size <= self.memory.max_bytes:
            return
        name = hashlib.sha256(bytes_of(keys)).hexdigest()
        with self._lock:
            if self._covered(keys):
                return
            self.memory.make_room(size)  # before the copy, so that the bound holds at all times
            entry = PrefixEntry(keys=keys, snapshot=block.read(row, length))
            self.memory.put(name, entry)
        if self._disk is not None:
            self._disk.write(name, [entry.keys, entry.snapshot])
            present = self._disk.names()
            with self._lock:
                stored = self._stored | {name: keys}
                self._stored = {n: stored[n] for n in present if n in stored}

    def _covered(self, keys: Array) -> bool:
        """Whether an entry in memory begins with `keys`; removes entries that `keys` covers."""
        for name, entry in self.memory.items():
            common = _common(keys, entry.keys)
            if common == len(keys):
                self.memory.get(name)
                return True
            if common == len(entry.keys):
                self.memory.remove(name)
        for name, other in list(self._stored.items()):
            if self._disk is not None and _common(keys, other) == len(other):
                self._disk.remove(name)
                del self._stored[name]
        return False

    def _open(self, name: str) -> PrefixEntry | None:
        """Returns an entry from memory or its file; None if the file is damaged or gone."""
        entry = self.memory.get(name)
        if entry is not None:
            return entry
        arrays = None if self._disk is None else self._disk.read(name)
        known = self._stored[name]
        if arrays is None or len(arrays) != 2 or not np.array_equal(arrays[0], known):
            del self._stored[name]
            return None
        entry = PrefixEntry(keys=arrays[0], snapshot=arrays[1])
        self.memory.put(name, entry)
        return entry


def _common(keys: Array, other: Array) -> int:
    """Length of the common prefix of two sequences of keys."""
    count = min(len(keys), len(other))
    differs = (keys[:count] != other[:count]).any(axis=1)
    return int(differs.argmax()) if differs.any() else count
