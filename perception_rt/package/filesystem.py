"""System calls that change the disk while a package is written, as methods of one object.

`Stage` makes every change through it, so that a test can pass an object that counts calls, or fails
or stops at the n-th one. POSIX only.
"""

import ctypes
import errno
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class FileSystem:
    """The real file system. Every method raises the OSError of the system call behind it."""

    def mkdir(self, path: Path) -> None:
        """Creates a directory; fails if the path exists."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Creates a file, opened for writing, and returns its descriptor; fails if it exists."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def lock(self, path: Path) -> int:
        """Locks a file, creating it if missing; the lock lasts until the descriptor is closed.

        Raises:
            BlockingIOError: a process holds the lock already.
        """
        import fcntl  # here, so that Windows can import this module

        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def write(self, fd: int, buffer: memoryview) -> int:
        """Writes the first bytes of `buffer` and returns their number."""
        return os.write(fd, buffer)

    def chmod(self, fd: int, mode: int) -> None:
        """Sets the permissions of an open file."""
        os.fchmod(fd, mode)

    def fsync(self, fd: int) -> None:
        """Waits until an open file's bytes and metadata are on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        os.close(fd)

    def fsync_directory(self, path: Path) -> None:
        """Waits until the names in a directory are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Renames a directory; fails if `target` is a file or a non-empty directory."""
        source.rename(target)

    def exchange(self, first: Path, second: Path) -> bool:
        """Swaps two directories atomically; returns False where the system cannot."""
        call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
        if call is None:
            return False
        call.argtypes = (
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_int,
            ctypes.c_char_p,
            ctypes.c_uint,
        )
        names = (os.fsencode(first), os.fsencode(second))
        if call(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0:
            return True
        code = ctypes.get_errno()
        if code in _NOT_SUPPORTED:
            return False
        raise OSError(code, os.strerror(code))

    def unlink(self, path: Path) -> None:
        """Removes a file if it exists."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Removes an empty directory."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Removes a directory and its contents if it exists; follows no link."""
        try:
            with os.scandir(path) as entries:
                listed = [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]
        except FileNotFoundError:
            return
        for name, is_directory in listed:
            if is_directory:
                self.remove_tree(path / name)
            else:
                self.unlink(path / name)
        self.rmdir(path)
