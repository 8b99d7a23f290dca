"""Reads webdataset shards in place: tars, plain or compressed by gzip."""

import gzip
import io
import tarfile
import zlib
from collections.abc import Iterator
from typing import Any, BinaryIO, cast

from perception_rt.errors import InputError
from perception_rt.processing.files import open_regular_file

GZIPPED = (".tar.gz", ".tgz")
OTHER_COMPRESSIONS = (".tar.bz2", ".tar.xz", ".tar.zst")
# Raised by damaged archives. gzip.BadGzipFile is an OSError, of a file that can be read.
DAMAGE = (
    tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, ValueError, OverflowError,
    RecursionError,
)  # fmt: skip
_HEADER_BYTES = 1024 * 1024


def is_tar(path: str) -> bool:
    """Whether a path ends like a tar that `tar_files` reads."""
    return path.lower().endswith((".tar", *GZIPPED))


def open_archive(path: str) -> BinaryIO:
    """Opens a file of items; a gzipped tar as the tar in it, which seeks forward only at low cost.

    Raises:
        InputError: the path is missing, unreadable or not a regular file.
    """
    file = open_regular_file(path, repr(path))
    return cast(BinaryIO, _GzipFile(file) if path.lower().endswith(GZIPPED) else file)


def tar_files(path: str) -> Iterator[tarfile.TarInfo]:
    """Yields the regular files of a tar in its order, without hidden ones; reads headers only.

    Raises:
        InputError: the path is missing, unreadable, not a regular file, or damaged.
    """
    with open_archive(path) as file:
        try:
            for member in _members(file):
                if member.isreg() and not member.issparse() and not _is_hidden(member.name):
                    yield member
        except DAMAGE:
            raise InputError(f"{path!r:.200} is damaged, or not a tar file") from None
        except OSError as error:
            raise InputError(f"tar {path!r:.200} cannot be read: {error.strerror}") from None


def _members(file: BinaryIO) -> Iterator[tarfile.TarInfo]:
    headers = _Headers(file)
    with tarfile.open(fileobj=cast(BinaryIO, headers), mode="r:") as tar:
        end = -1
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined] # else they stay in memory
            if member.offset_data <= end or member.size < 0:  # a loop
                raise tarfile.ReadError
            end = member.offset_data
            yield member
        # tarfile ends at a damaged header as if the archive did.
        file.seek(tar.offset)
        if any(file.read(tarfile.BLOCKSIZE)):
            raise tarfile.ReadError


def _is_hidden(name: str) -> bool:
    """Whether a member would be hidden on disk, as the "._1.jpg" that macOS adds."""
    return any(part[:1] == "." and part not in (".", "..") for part in name.split("/"))


class _GzipFile(gzip.GzipFile):
    """A gzipped file, which closes the file below."""

    def __init__(self, file: io.FileIO) -> None:
        self._below = file
        super().__init__(fileobj=cast(Any, file), mode="rb")

    def close(self) -> None:
        """Closes both."""
        super().close()
        self._below.close()


class _Headers:
    """Reads headers of a tar, which says itself how long they are."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.seek, self.tell = file.seek, file.tell

    def read(self, size: int = -1) -> bytes:
        """Reads at most 1 MiB; TarError for more."""
        if not 0 <= size <= _HEADER_BYTES:
            raise tarfile.ReadError
        return self._file.read(size)
