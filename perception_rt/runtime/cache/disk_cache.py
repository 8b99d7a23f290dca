"""Arrays in files that may be lost at any time: one file per entry, one folder per package.

A read returns exactly what was written, or nothing: a file that is damaged, cut short or of another
package is removed. Nothing is unpickled or memory-mapped. As it is a cache, a failing disk is no
error. The digest in a file detects damage, not malice: the directory must be private.
"""

import hashlib
import json
import math
import os
import re
import stat
import threading
import uuid
from collections.abc import Iterator, Sequence
from contextlib import suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import InputError

Array = np.ndarray[Any, Any]

_DTYPES = ("uint8", "uint64", "float16", "float32")
_MAX_HEADER = 4096
_DIGEST_BYTES = 32
_READ_FLAGS = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
_NAME = re.compile(r"[0-9a-f]{64}")


class DiskCache:
    """Entries of one kind and one package, below a directory that packages share.

    Thread-safe. Several processes may share a directory; each keeps the bound by itself.
    """

    def __init__(
        self, directory: str | os.PathLike[str], *, package_id: str, kind: str, max_bytes: int
    ) -> None:
        """Opens the directory, creating it if needed.

        Args:
            directory: shared by all packages; no other user may write there.
            package_id: "sha256:" and 64 hex digits.
            kind: file suffix.
            max_bytes: bound on all files of this kind, over all packages.

        Raises:
            InputError: the directory cannot be made, or others can write to it.
        """
        self._root = Path(directory)
        self._package_id = package_id
        self._folder = self._root / package_id.removeprefix("sha256:")
        self._kind = kind
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        try:
            self._folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            info = self._folder.lstat()
        except (OSError, ValueError):
            raise InputError("the cache directory cannot be made") from None
        if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.geteuid() or info.st_mode & 0o022:
            raise InputError("a folder of the cache directory can be written to by others")

    def names(self) -> list[str]:
        """Returns the names of all entries, readable or not."""
        try:
            return [path.stem for path, _ in self._files(self._folder) if path.suffix != ".tmp"]
        except OSError:
            return []

    def read(self, name: str) -> list[Array] | None:
        """Returns the arrays of an entry; None if it is missing or damaged, which removes it."""
        arrays = self._read(name, None)
        if arrays is not None:
            with suppress(OSError):
                os.utime(self._path(name))  # files are removed oldest first
        return arrays

    def peek(self, name: str) -> Array | None:
        """Returns the first array of an entry without checking its digest."""
        arrays = self._read(name, 1)
        return arrays[0] if arrays else None

    def write(self, name: str, arrays: Sequence[Array]) -> None:
        """Stores an entry if it fits, removing the oldest files.

        Args:
            name: 64 lower-case hex digits.
            arrays: C-contiguous, non-empty arrays of uint8, uint64, float16 or float32.
        """
        header = self._header(name, arrays)
        size = len(header) + sum(array.nbytes for array in arrays) + _DIGEST_BYTES
        path = self._path(name)
        temporary = self._folder / f"{name}.{uuid.uuid4().hex}.{self._kind}.tmp"
        if size > self._max_bytes:
            return
        with self._lock, suppress(OSError):
            self._make_room(size)
            try:
                _write_file(temporary, [header, *map(bytes_of, arrays)])
                temporary.replace(path)
            finally:
                temporary.unlink(missing_ok=True)

    def remove(self, name: str) -> None:
        """Removes an entry if it exists."""
        with suppress(OSError):
            self._path(name).unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        assert _NAME.fullmatch(name)
        return self._folder / f"{name}.{self._kind}"

    def _header(self, name: str, arrays: Sequence[Array]) -> bytes:
        """One line of JSON that identifies the entry and gives dtype and shape of each array."""
        record = {
            "version": 1,
            "package": self._package_id,
            "kind": self._kind,
            "name": name,
            "arrays": [[array.dtype.name, list(array.shape)] for array in arrays],
        }
        return json.dumps(record).encode() + b"\n"

    def _read(self, name: str, count: int | None) -> list[Array] | None:
        """Returns the first `count` arrays; with None, all arrays after comparing the digest."""
        try:
            fd = os.open(self._path(name), _READ_FLAGS)
        except FileNotFoundError:
            return None
        except OSError:  # such as a symbolic link
            self.remove(name)
            return None
        arrays = None
        try:
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and info.st_size <= self._max_bytes:
                with os.fdopen(fd, "rb", closefd=False) as file:
                    arrays = self._parse(file, name, info.st_size, count)
        except OSError:
            arrays = None
        finally:
            os.close(fd)
        if arrays is None:
            self.remove(name)
        return arrays

    def _parse(
        self, file: BufferedReader, name: str, size: int, count: int | None
    ) -> list[Array] | None:
        header = file.readline(_MAX_HEADER)
        arrays = _described(header, size - len(header) - _DIGEST_BYTES)
        if arrays is None or header != self._header(name, arrays):
            return None
        digest = hashlib.sha256(header)
        for array in arrays[:count]:
            view = bytes_of(array)
            if file.readinto(view) != view.nbytes:
                return None
            if count is None:
                digest.update(view)
        if count is None and file.read(_DIGEST_BYTES + 1) != digest.digest():
            return None
        return arrays[:count]

    def _make_room(self, size: int) -> None:
        """Removes the oldest files until `size` more bytes fit."""
        files: list[tuple[int, int, Path]] = []
        with os.scandir(self._root) as entries:
            folders = [Path(e) for e in entries if _NAME.fullmatch(e.name)]
        for folder in folders:
            with suppress(OSError):
                files.extend((i.st_mtime_ns, i.st_size, p) for p, i in self._files(folder))
        total = size + sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if total <= self._max_bytes:
                break
            path.unlink(missing_ok=True)
            total -= file_size

    def _files(self, folder: Path) -> Iterator[tuple[Path, os.stat_result]]:
        """Yields regular files of this kind, unfinished ones included, and no other file."""
        own = re.compile(rf"{_NAME.pattern}(\.{self._kind}|\.[0-9a-f]{{32}}\.{self._kind}\.tmp)")
        if folder.is_symlink():
            return
        with os.scandir(folder) as entries:
            for entry in entries:
                if own.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        yield Path(entry), entry.stat(follow_symlinks=False)


def bytes_of(array: Array) -> memoryview:
    """Returns the memory of a C-contiguous array as bytes."""
    return array.reshape(-1).view(np.uint8).data


def _described(header: bytes, size: int) -> list[Array] | None:
    """Allocates the arrays that a header describes; None unless they total `size` bytes."""
    try:
        described = json.loads(header)["arrays"]
        kinds = [(dtype, [int(n) for n in shape]) for dtype, shape in described]
        if any(dtype not in _DTYPES or min(shape) < 1 for dtype, shape in kinds):
            return None
        if sum(math.prod(shape) * np.dtype(dtype).itemsize for dtype, shape in kinds) != size:
            return None
        return [np.empty(shape, dtype) for dtype, shape in kinds]
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
        return None


def _write_file(path: Path, parts: Sequence[bytes | memoryview]) -> None:
    """Writes a new file that ends with the digest of everything before it.

    Not synced to disk: the digest reveals a file that a crash left half-written.
    """
    digest = hashlib.sha256()
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())
