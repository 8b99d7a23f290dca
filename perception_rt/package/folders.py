"""Opens the folders and files of a package, and follows no link inside of it.

With POSIX, everything is opened below a descriptor of the folder above, so a folder that is
exchanged meanwhile changes nothing. Elsewhere, as on Windows, folders are paths, which are looked
at before and after a file is opened.
"""

import os
import stat
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path

# Not every system has all of these; `O_BINARY` is Windows' own.
_READ_FLAGS = os.O_RDONLY | sum(
    getattr(os, name, 0) for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY")
)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)
_HAS_DESCRIPTORS = (
    hasattr(os, "O_NOFOLLOW")
    and _DIRECTORY != 0
    and {os.open, os.stat} <= os.supports_dir_fd
    and os.scandir in os.supports_fd
)
_REPARSE_POINT = 0x400  # of Windows' file attributes: a link, a junction or the like
_BLOCK = 1024 * 1024
_seeking = threading.Lock()


class Folder(ABC):
    """An open folder. Methods raise the OSError of the system call behind them."""

    @abstractmethod
    def names(self) -> list[str]:
        """Names of everything in the folder."""

    @abstractmethod
    def folder(self, name: str) -> "Folder":
        """Opens a folder in this one; it is not a link."""

    @abstractmethod
    def file(self, name: str) -> int | None:
        """Opens a file for reading, without waiting; None unless it is regular and has one name."""

    @abstractmethod
    def is_at(self, path: str) -> bool:
        """Whether a path still names this folder."""

    @abstractmethod
    def close(self) -> None:
        """Closes the folder; files that were opened stay open."""


def open_folder(path: str) -> Folder:
    """Opens the folder at a path, which may be a link; OSError or ValueError if there is none."""
    return _DescriptorFolder.at(path) if _HAS_DESCRIPTORS else _PathFolder.at(path)


def read_blocks(fd: int, size_bytes: int) -> Iterator[bytes]:
    """Yields the first `size_bytes` of a file, or fewer if it is shorter; moves no position."""
    position = 0
    while position < size_bytes:
        block = _read_at(fd, min(_BLOCK, size_bytes - position), position)
        if not block:
            return
        position += len(block)
        yield block


def _read_at(fd: int, size_bytes: int, position: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(fd, size_bytes, position)
    with _seeking:  # threads share the position of a descriptor
        os.lseek(fd, position, os.SEEK_SET)
        return os.read(fd, size_bytes)


class _DescriptorFolder(Folder):
    """A folder by its descriptor."""

    def __init__(self, fd: int) -> None:
        self._fd = fd

    @classmethod
    def at(cls, path: str) -> "_DescriptorFolder":
        return cls(os.open(path, os.O_RDONLY | _DIRECTORY | os.O_CLOEXEC))

    def names(self) -> list[str]:
        with os.scandir(self._fd) as entries:
            return [entry.name for entry in entries]

    def folder(self, name: str) -> Folder:
        return _DescriptorFolder(os.open(name, _READ_FLAGS | _DIRECTORY, dir_fd=self._fd))

    def file(self, name: str) -> int | None:
        # Looked at before opening: merely opening some devices has an effect.
        info = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        if not stat.S_ISREG(info.st_mode):
            return None
        return _checked(os.open(name, _READ_FLAGS, dir_fd=self._fd))

    def is_at(self, path: str) -> bool:
        try:
            return os.path.samestat(Path(path).stat(), os.fstat(self._fd))
        except OSError:
            return False

    def close(self) -> None:
        os.close(self._fd)


class _PathFolder(Folder):
    """A folder by its path, for systems without descriptors of folders."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._info = path.stat()

    @classmethod
    def at(cls, path: str) -> "_PathFolder":
        folder = Path(path)
        if not folder.is_dir():
            folder.stat()  # raises if there is nothing
            raise NotADirectoryError(0, "Not a directory")
        return cls(folder)

    def names(self) -> list[str]:
        with os.scandir(self._path) as entries:
            return [entry.name for entry in entries]

    def folder(self, name: str) -> Folder:
        path = self._path / name
        info = path.lstat()
        if not stat.S_ISDIR(info.st_mode) or _is_reparse_point(info):
            raise NotADirectoryError(0, "Not a directory")
        return _PathFolder(path)

    def file(self, name: str) -> int | None:
        path = self._path / name
        before = path.lstat()
        if not stat.S_ISREG(before.st_mode) or _is_reparse_point(before):
            return None
        return _checked(os.open(path, _READ_FLAGS), before)

    def is_at(self, path: str) -> bool:
        try:
            return os.path.samestat(Path(path).stat(), self._info)
        except OSError:
            return False

    def close(self) -> None:
        pass


def _checked(fd: int, before: os.stat_result | None = None) -> int | None:
    """The descriptor of a regular file with one name, which was `before`; else closes it."""
    info = os.fstat(fd)
    same = before is None or os.path.samestat(before, info)
    if same and stat.S_ISREG(info.st_mode) and info.st_nlink == 1:
        return fd
    os.close(fd)
    return None


def _is_reparse_point(info: os.stat_result) -> bool:
    return bool(getattr(info, "st_file_attributes", 0) & _REPARSE_POINT)
