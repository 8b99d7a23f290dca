"""Turns the SOURCE arguments of a job into items, in an order that depends on names alone.

Files are listed here and read by `contents`. Nothing of an archive is ever extracted to disk.
"""

import glob
import os
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from perception_rt.bulk.listing import Item, Kind
from perception_rt.bulk.parquet import ImageColumn
from perception_rt.bulk.tars import OTHER_COMPRESSIONS, is_tar, tar_files
from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.files import open_regular_file

IMAGES = ("jpg", "jpeg", "jpe", "jfif", "png", "webp")
# Image formats on request, and their endings.
REQUESTED = {
    "gif": ("gif",),
    "bmp": ("bmp",),
    "tiff": ("tif", "tiff"),
    "avif": ("avif",),
    "heic": ("heic", "heif"),
}
ALL_IMAGES = frozenset((*IMAGES, *(ending for names in REQUESTED.values() for ending in names)))
VIDEOS = ("mp4", "m4v", "mov", "mkv", "webm", "avi", "ts", "mts", "m2ts")
TEXTS = ("txt", "jsonl")
_LINE_BYTES = 64 * 1024  # longest line of a list of paths


@dataclass(frozen=True, slots=True, kw_only=True)
class Sources:
    """Inputs of a job, embedded in this order.

    Attributes:
        paths: files, folders and globs.
        lists: files of paths, one per line.
        images: paths of images.
        texts: texts.
        videos: paths of videos.
        column: column of Parquet files, or field of `.jsonl` lines; None for the usual names.
        formats: image formats on request, whose files count as images in folders and tars.
    """

    paths: tuple[str, ...] = ()
    lists: tuple[BinaryIO | str, ...] = ()
    images: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    videos: tuple[str, ...] = ()
    column: str | None = None
    formats: tuple[str, ...] = ()

    def items(self) -> Iterator[Item]:
        """Yields the items.

        Raises:
            InputError: a source is missing, unreadable or of no known kind, or has no items.
        """
        lister = _Lister(self)
        for path in self.paths:
            yield from lister.source(path)
        for file in self.lists:
            yield from lister.paths_of(file)
        yield from (Item("image", path) for path in self.images)
        yield from (Item("text", text, "inline") for text in self.texts)
        yield from (Item("video", path) for path in self.videos)


class _Lister:
    def __init__(self, sources: Sources) -> None:
        more = [ending for name in sources.formats for ending in REQUESTED.get(name, ())]
        self._images = frozenset((*IMAGES, *more))
        self._column = sources.column

    def source(self, path: str) -> Iterator[Item]:
        """Items of a SOURCE: a file, a folder or a glob."""
        if "\0" in path or not path:
            raise InputError(f"source {path!r:.200} is not a path")
        if os.path.lexists(path) or not glob.has_magic(path):
            if not os.path.exists(path):  # noqa: PTH110 - also for links
                raise InputError(f"source {path!r:.200} does not exist")
            yield from self.named(path)
            return
        found = sorted(glob.iglob(path, recursive=True))  # noqa: PTH207 - Path refuses "/..."
        if not found:
            raise InputError(f"source {path!r:.200} matches no file")
        for name in found:
            # `**` also matches the folders between; their files match by themselves.
            if "**" not in path or not os.path.isdir(name):  # noqa: PTH112
                yield from self.named(name)

    def named(self, path: str) -> Iterator[Item]:
        """Items of a path that a user named; a file of unknown ending is taken for an image."""
        ending = _ending(path)
        if os.path.isdir(path):  # noqa: PTH112 - first, as a folder may be called "a.parquet"
            yield from self._folder(path)
        elif is_tar(path):
            yield from self._tar(path)
        elif path.lower().endswith(OTHER_COMPRESSIONS):
            raise InputError(
                f"{path!r:.200} is compressed: give the .tar file itself, or one by gzip"
            )
        elif ending == "parquet":
            yield from ImageColumn(path, self._column).items(self._kind)
        elif ending in TEXTS:
            yield from _lines(path, "json" if ending == "jsonl" else "span")
        else:
            yield Item(self._kind(path) or "image", path)

    def paths_of(self, file: BinaryIO | str) -> Iterator[Item]:
        """Items of a list of paths, such as standard input."""
        if not isinstance(file, str):
            yield from self._listed(file, "standard input")
            return
        try:
            with Path(file).open("rb") as opened:
                yield from self._listed(opened, repr(file))
        except OSError as error:
            raise InputError(f"list {file!r:.200} cannot be read: {error.strerror}") from None

    def _listed(self, file: BinaryIO, name: str) -> Iterator[Item]:
        for number, (_, line) in enumerate(_short_lines(file), 1):
            if line is None or b"\0" in line:
                raise InputError(f"line {number} of {name:.200} is not a path")
            path = os.fsdecode(line.rstrip(b"\r\n"))
            if path:
                yield from self.named(path)

    def _folder(self, path: str) -> Iterator[Item]:
        found = False
        for item in self._walk(path):
            found = True
            yield item
        if not found:
            raise InputError(
                f"folder {path!r:.200} has no image or video; "
                "name tars, Parquet files and texts by a quoted glob, such as 'folder/*.tar'"
            )

    def _walk(self, folder: str) -> Iterator[Item]:
        """Images and videos below a folder, by name; hidden ones and links to folders are not."""
        try:
            with os.scandir(folder) as entries:
                names = sorted(
                    (entry.name, is_folder)
                    for entry in entries
                    if not entry.name.startswith(".")
                    and (
                        (is_folder := entry.is_dir(follow_symlinks=False))
                        or self._kind(entry.name) is not None
                    )
                )
        except OSError as error:
            raise InputError(f"folder {folder!r:.200} cannot be read: {error.strerror}") from None
        for name, is_folder in names:
            path = os.path.join(folder, name)  # noqa: PTH118 - keeps a leading "./"
            kind = self._kind(name)
            if is_folder:
                yield from self._walk(path)
            elif kind is not None:
                yield Item(kind, path)

    def _tar(self, path: str) -> Iterator[Item]:
        """Images and videos of a tar, such as a webdataset shard, in its order; no hidden ones."""
        found = False
        for member in tar_files(path):
            kind = self._kind(member.name)
            if kind is not None:
                found = True
                place = (path, member.offset_data, member.size)
                yield Item(kind, f"{path}#{member.name}", "span", *place)
        if not found:
            raise InputError(f"tar {path!r:.200} has no image or video")

    def _kind(self, path: str) -> Kind | None:
        return kind_of(path, self._images)


def kind_of(path: str, images: Collection[str] = ALL_IMAGES) -> Kind | None:
    """Kind of a file by the ending of its name; None for one that is neither image nor video.

    Args:
        path: the file.
        images: endings of images.
    """
    ending = _ending(path)
    if ending in images:
        return "image"
    return "video" if ending in VIDEOS else None


def _check_file(path: str) -> None:
    """InputError unless a path is a regular file, which can be read at any place."""
    open_regular_file(path, repr(path)).close()


def _lines(path: str, form: str) -> Iterator[Item]:
    """Texts of a file, one per line that is not blank."""
    found = False
    _check_file(path)
    try:
        with Path(path).open("rb") as file:
            for number, (offset, line, size) in enumerate(_sized_lines(file), 1):
                if line is None or line.strip():
                    found = True
                    # A line that is too long is refused when it is read.
                    place = (path, offset, size)
                    source = f"{path}#{number}"
                    yield Item("text", source, "json" if form == "json" else "span", *place)
    except OSError as error:
        raise InputError(f"{path!r:.200} cannot be read: {error.strerror}") from None
    if not found:
        raise InputError(f"{path!r:.200} has no text")


def _short_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Offset and content of each line; None for one that is too long."""
    yield from ((offset, line) for offset, line, _ in _sized_lines(file))


def _sized_lines(file: BinaryIO) -> Iterator[tuple[int, bytes | None, int]]:
    """Offset, content and size of each line; the content of a very long one is None."""
    offset, most = 0, max(_LINE_BYTES, DEFAULT_LIMITS.text_bytes) + 2
    while line := file.readline(most):
        size, whole = len(line), True
        while not line.endswith(b"\n") and (more := file.readline(most)):
            line, whole = more, False
            size += len(more)
        yield offset, line if whole else None, size
        offset += size


def _ending(path: str) -> str:
    return os.path.splitext(path)[1][1:].lower()  # noqa: PTH122 - also for "a/b/" and "#"
