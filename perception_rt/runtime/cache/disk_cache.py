"""Arrays in files that may be lost at any time: one file per entry, one folder per package.

A read returns exactly what was written, or nothing: a file that is damaged, cut short, of another
package or of another user is removed. Nothing is unpickled or memory-mapped. As it is a cache, a
failing disk is no error. The digest in a file detects damage, not malice: the directory must be
private. It is opened once, and every file is accessed through its descriptor, so that it cannot be
exchanged for another one afterwards.
"""

import hashlib
import json
import math
import os
import re
import stat
import threading
import uuid
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import InputError

Array = np.ndarray[Any, Any]

_DTYPES = ("uint8", "uint64", "float16", "float32")
_MAX_HEADER = 4096
_DIGEST_BYTES = 32
# Systems other than POSIX lack some of these, and cannot open a cache at all.
_NO_FOLLOW = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_READ_FLAGS = os.O_RDONLY | _NO_FOLLOW | getattr(os, "O_NONBLOCK", 0)
_FOLDER_FLAGS = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_CLOEXEC", 0)
_WRITE_FLAGS = os.O_WRONLY | os.O_CREAT | os.O_EXCL | _NO_FOLLOW
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_CLOSED = -1
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
            directory: shared by all packages; it must belong to this user, and no other user may
                be able to write to it.
            package_id: "sha256:" and 64 hex digits.
            kind: file suffix.
            max_bytes: bound on all files of this kind, over all packages.

        Raises:
            InputError: the directory cannot be made, belongs to another user or can be written to
                by others, or this system has no directory descriptors.
        """
        self._package_id = package_id
        self._kind = kind
        self._max_bytes = max_bytes
        self._lock = threading.Lock()
        self._root, self._folder = _open_folders(
            Path(directory), package_id.removeprefix("sha256:")
        )
        self._finalizer = weakref.finalize(self, _close, self._root, self._folder)
        self._finalizer.atexit = False

    def close(self) -> None:
        """Closes the directory, so that reads find nothing; a second call does nothing."""
        self._root = self._folder = _CLOSED
        self._finalizer()

    def names(self) -> list[str]:
        """Returns the names of all entries, readable or not."""
        try:
            files = self._files(self._folder, ".")
            return [name.partition(".")[0] for name, _ in files if not name.endswith(".tmp")]
        except OSError:
            return []

    def read(self, name: str) -> list[Array] | None:
        """Returns the arrays of an entry; None if it is missing or damaged, which removes it."""
        arrays = self._read(name, None)
        if arrays is not None:
            with suppress(OSError):
                os.utime(self._file(name), dir_fd=self._folder)  # files are removed oldest first
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
        folder, file = self._folder, self._file(name)
        temporary = f"{name}.{uuid.uuid4().hex}.{self._kind}.tmp"
        if size > self._max_bytes:
            return
        with self._lock, suppress(OSError):
            self._make_room(size)
            try:
                _write_file(folder, temporary, [header, *map(bytes_of, arrays)])
                os.replace(temporary, file, src_dir_fd=folder, dst_dir_fd=folder)
            finally:
                with suppress(FileNotFoundError):
                    os.unlink(temporary, dir_fd=folder)

    def remove(self, name: str) -> None:
        """Removes an entry if it exists."""
        with suppress(OSError):
            os.unlink(self._file(name), dir_fd=self._folder)

    def _file(self, name: str) -> str:
        assert _NAME.fullmatch(name)
        return f"{name}.{self._kind}"

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
            fd = os.open(self._file(name), _READ_FLAGS, dir_fd=self._folder)
        except FileNotFoundError:
            return None
        except OSError:  # such as a symbolic link
            self.remove(name)
            return None
        arrays = None
        try:
            info = os.fstat(fd)
            if stat.S_ISREG(info.st_mode) and _is_own(info) and info.st_size <= self._max_bytes:
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
        files: list[tuple[int, int, str]] = []
        with _listing(self._root, ".") as entries:
            folders = [entry.name for entry in entries if _NAME.fullmatch(entry.name)]
        for folder in folders:
            with suppress(OSError):
                files.extend(
                    (info.st_mtime_ns, info.st_size, f"{folder}/{name}")
                    for name, info in self._files(self._root, folder)
                )
        total = size + sum(file_size for _, file_size, _ in files)
        for _, file_size, path in sorted(files):
            if total <= self._max_bytes:
                break
            with suppress(FileNotFoundError):
                os.unlink(path, dir_fd=self._root)
            total -= file_size

    def _files(self, parent: int, folder: str) -> Iterator[tuple[str, os.stat_result]]:
        """Yields regular files of this kind, unfinished ones included, and no other file."""
        own = re.compile(rf"{_NAME.pattern}(\.{self._kind}|\.[0-9a-f]{{32}}\.{self._kind}\.tmp)")
        with _listing(parent, folder) as entries:
            for entry in entries:
                if own.fullmatch(entry.name) and entry.is_file(follow_symlinks=False):
                    with suppress(FileNotFoundError):
                        yield entry.name, entry.stat(follow_symlinks=False)


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


def _write_file(folder: int, name: str, parts: Sequence[bytes | memoryview]) -> None:
    """Writes a new file that ends with the digest of everything before it.

    Not synced to disk: the digest reveals a file that a crash left half-written.
    """
    digest = hashlib.sha256()
    with os.fdopen(os.open(name, _WRITE_FLAGS, 0o600, dir_fd=folder), "wb") as file:
        for part in parts:
            digest.update(part)
            file.write(part)
        file.write(digest.digest())


def _open_folders(root: Path, package: str) -> tuple[int, int]:
    """Descriptors of the cache directory and of its folder for a package, made if missing."""
    if not {os.open, os.mkdir, os.unlink} <= os.supports_dir_fd or os.scandir not in os.supports_fd:
        raise InputError("a cache directory needs a POSIX system; load without cache_dir")
    shown = f"{str(root)!r:.200}"
    with ExitStack() as opened:
        with suppress(OSError, ValueError):
            root.parent.mkdir(parents=True, exist_ok=True)
        root_fd = _open_private(root, None, "the cache directory", shown)
        opened.callback(os.close, root_fd)
        folder_fd = _open_private(package, root_fd, "a folder of the cache directory", shown)
        opened.pop_all()
    return root_fd, folder_fd


def _open_private(path: str | Path, parent: int | None, what: str, shown: str) -> int:
    """Opens a directory, made if missing, that only this user can write to; below `parent`."""
    flags = _FOLDER_FLAGS if parent is None else _FOLDER_FLAGS | _NO_FOLLOW
    try:
        with suppress(FileExistsError):
            os.mkdir(path, mode=0o700, dir_fd=parent)
        folder = os.open(path, flags, dir_fd=parent)
    except (OSError, ValueError) as error:  # ValueError: a NUL
        why = error.strerror if isinstance(error, OSError) else "not a path"
        raise InputError(f"{what} cannot be made: {shown}: {why}") from None
    info = os.fstat(folder)
    if _is_own(info):
        return folder
    os.close(folder)
    if info.st_uid != os.geteuid():
        raise InputError(f"{what} belongs to another user: {shown}; choose one of your own")
    raise InputError(
        f"{what} can be written to by others, who could forge its entries: {shown}; choose a new "
        "one, or empty it and run chmod go-w on it"
    )


def _is_own(info: os.stat_result) -> bool:
    """Whether a file or directory is this user's, and no other may write to it."""
    return info.st_uid == os.geteuid() and not info.st_mode & _OTHERS_WRITE


@contextmanager
def _listing(parent: int, folder: str) -> Iterator[Iterator["os.DirEntry[str]"]]:
    """Entries of a folder in an open directory, through a descriptor of their own."""
    fd = os.open(folder, _FOLDER_FLAGS | _NO_FOLLOW, dir_fd=parent)  # threads share no position
    try:
        with os.scandir(fd) as entries:
            yield entries
    finally:
        os.close(fd)


def _close(*fds: int) -> None:
    for fd in fds:
        os.close(fd)
