"""The system calls that change a disk while a package is made, as methods of one object.

`Stage` makes every change through it, so that a test can pass one that counts, fails or stops at
the n-th call. It knows nothing of packages. POSIX only.
"""

import ctypes
import errno
import fcntl
import os
from pathlib import Path

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2
_NOT_SUPPORTED = (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP)


class FileSystem:
    """The real file system. Every method raises OSError as the call it stands for."""

    def mkdir(self, path: Path) -> None:
        """Makes a directory that does not exist."""
        path.mkdir()

    def create(self, path: Path) -> int:
        """Opens a file that does not exist for writing; returns its descriptor."""
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)

    def lock(self, path: Path) -> int:
        """Locks a file, made if it is not there, until the descriptor that this returns is closed.

        BlockingIOError if it is locked already, by whichever process.
        """
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            os.close(fd)
            raise
        return fd

    def write(self, fd: int, buffer: memoryview) -> int:
        """Writes some of `buffer`; returns how many bytes."""
        return os.write(fd, buffer)

    def chmod(self, fd: int, mode: int) -> None:
        """Sets the permissions of an open file."""
        os.fchmod(fd, mode)

    def fsync(self, fd: int) -> None:
        """Returns when an open file's bytes and metadata are on the disk."""
        os.fsync(fd)

    def close(self, fd: int) -> None:
        """Closes a descriptor."""
        os.close(fd)

    def fsync_directory(self, path: Path) -> None:
        """Returns when the names in a directory are on the disk."""
        fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)

    def rename(self, source: Path, target: Path) -> None:
        """Renames a directory; fails if `target` is a file or a directory that is not empty."""
        source.rename(target)

    def exchange(self, first: Path, second: Path) -> bool:
        """Swaps two directories atomically; False where the kernel or file system cannot."""
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
        """Removes a file if it is there."""
        path.unlink(missing_ok=True)

    def rmdir(self, path: Path) -> None:
        """Removes an empty directory."""
        path.rmdir()

    def remove_tree(self, path: Path) -> None:
        """Removes a directory and all in it, if it is there; follows no link."""
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
