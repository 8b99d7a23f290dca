"""Keys and values of prompts by their tokens: what prompts have in common is decoded once.

Tokens are compared, not hashed prefixes, so that any common beginning counts; an image token is
what its tile's hash and its place in the tile make it. The least recently used entries go first.

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

Array = np.ndarray[Any, Any]

_KIND = "prefix"
_WORTH_READING = 2  # an entry of which at least one half is asked for


def sequence_keys(
    ids: Array, image_spans: Sequence[tuple[int, int]], feature_keys: Sequence[str]
) -> Array:
    """What each token is, image tokens included, uint64 (T, 2).

    Args:
        ids: int64 (T,) token ids.
        image_spans: where the tokens of each image begin and end.
        feature_keys: of each image, from `feature_key`.
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
    """The beginning of a sequence.

    Attributes:
        keys: of its tokens, uint64 (T, 2).
        snapshot: as `CacheBlock.read` gives it.
    """

    keys: Array
    snapshot: Array

    @property
    def nbytes(self) -> int:
        """Bytes of both."""
        return self.keys.nbytes + self.snapshot.nbytes


class PrefixCache:
    """Prompts of one package, in memory and, if wanted, in files. Safe in several threads.

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
        self._entries: dict[str, PrefixEntry] = {}  # the least recently used first
        self._nbytes = 0
        self._disk: DiskCache | None = None
        self._stored: dict[str, Array] = {}  # keys of the entries in files
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
        return self._nbytes

    def longest(self, keys: Array) -> tuple[int, PrefixEntry | None]:
        """The entry that begins with the most of `keys`, uint64 (T, 2), and with how many."""
        with self._lock:
            lengths = {n: _common(keys, entry.keys) for n, entry in self._entries.items()}
            for name, other in self._stored.items():
                common = _common(keys, other)
                # A whole file is read, so it must be worth it: not a system sentence alone.
                if name not in lengths and common * _WORTH_READING >= len(other):
                    lengths[name] = common
            # Those in memory first, of equals: to read one takes long and may fail.
            names = sorted(lengths, key=lambda name: (-lengths[name], name not in self._entries))
            for name in names:
                entry = self._open(name) if lengths[name] else None
                if entry is not None:
                    return lengths[name], entry
        return 0, None

    def restore(self, entry: PrefixEntry, length: int, block: CacheBlock, row: int) -> None:
        """Puts the first `length` tokens of an entry into a row."""
        block.write(row, entry.snapshot, length)

    def put(self, keys: Array, block: CacheBlock, row: int, length: int) -> None:
        """Keeps the first `length` tokens of a row, unless they alone exceed the bound.

        Args:
            keys: uint64 (T, 2) of the row's tokens, T at least `length`.
            block: where the row is.
            row: which one.
            length: tokens to keep.
        """
        keys = keys[:length].copy()
        size = keys.nbytes + length * block.shape.bytes_per_token
        if not 0 < size <= self.max_bytes:
            return
        name = hashlib.sha256(bytes_of(keys)).hexdigest()
        with self._lock:
            if self._covered(keys):
                return
            self._make_room(size)
            entry = PrefixEntry(keys=keys, snapshot=block.read(row, length))
            self._insert(name, entry)
        if self._disk is not None:
            self._disk.write(name, [entry.keys, entry.snapshot])
            present = self._disk.names()
            with self._lock:
                stored = self._stored | {name: keys}
                self._stored = {n: stored[n] for n in present if n in stored}

    def _covered(self, keys: Array) -> bool:
        """Whether an entry in memory begins with `keys`; removes those that `keys` begins with."""
        for name, entry in list(self._entries.items()):
            common = _common(keys, entry.keys)
            if common == len(keys):
                self._entries[name] = self._entries.pop(name)
                return True
            if common == len(entry.keys):
                self._nbytes -= self._entries.pop(name).nbytes
        for name, other in list(self._stored.items()):
            if self._disk is not None and _common(keys, other) == len(other):
                self._disk.remove(name)
                del self._stored[name]
        return False

    def _open(self, name: str) -> PrefixEntry | None:
        """An entry from memory, or else from its file, if that is whole."""
        entry = self._entries.pop(name, None)
        if entry is not None:
            self._entries[name] = entry
            return entry
        arrays = None if self._disk is None else self._disk.read(name)
        known = self._stored[name]
        if arrays is None or len(arrays) != 2 or not np.array_equal(arrays[0], known):
            del self._stored[name]
            return None
        entry = PrefixEntry(keys=arrays[0], snapshot=arrays[1])
        self._make_room(entry.nbytes)
        self._insert(name, entry)
        return entry

    def _make_room(self, size: int) -> None:
        while self._nbytes + size > self.max_bytes:
            self._nbytes -= self._entries.pop(next(iter(self._entries))).nbytes

    def _insert(self, name: str, entry: PrefixEntry) -> None:
        self._entries[name] = entry
        self._nbytes += entry.nbytes


def _common(keys: Array, other: Array) -> int:
    """How many tokens two sequences have in common at their beginning."""
    count = min(len(keys), len(other))
    differs = (keys[:count] != other[:count]).any(axis=1)
    return int(differs.argmax()) if differs.any() else count
