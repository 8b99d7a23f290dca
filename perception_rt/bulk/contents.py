"""Reads the content of items, and finds it again by an item's source name."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from perception_rt.bulk.listing import Item
from perception_rt.bulk.parquet import ImageColumn
from perception_rt.bulk.sources import TEXTS, Sources
from perception_rt.bulk.tars import DAMAGE, is_tar, open_archive
from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits

_FIELDS = ("text", "caption")
_TAR_VIDEO_BYTES = 256 * 1024 * 1024  # a video in a tar is read into memory


class Contents:
    """Reads items; keeps the last file open. Use it as a context manager.

    Args:
        column: column of Parquet files, or field of `.jsonl` lines; None for the usual names.
        limits: bounds on encoded bytes.
    """

    def __init__(self, column: str | None = None, limits: Limits = DEFAULT_LIMITS) -> None:
        self._column = column
        self._limits = limits
        self._opened: tuple[str, Any] | None = None  # path and file

    def image(self, item: Item) -> str | bytes:
        """A path, or encoded bytes; InputError if there are none."""
        if item.form == "file":
            return item.file
        if item.form == "cell":
            column = self._open(item.path, lambda: ImageColumn(item.path, self._column))
            found: str | bytes = column.read(item.offset)
            return found
        if item.form == "missing":
            raise InputError("the row names no file")
        return self._span(item, self._limits.image_bytes)

    def video(self, item: Item) -> str | bytes:
        """A path, or the bytes of a tar's member; InputError if it is too large for memory."""
        if item.form == "file":
            return item.file
        return self._span(item, min(self._limits.video_bytes, _TAR_VIDEO_BYTES))

    def text(self, item: Item) -> str:
        """A text; InputError if it is too long, or the line is not one."""
        if item.form == "inline":
            return item.source
        line = self._span(item, self._limits.text_bytes).rstrip(b"\r\n")
        try:
            text = line.decode("utf-8-sig" if item.offset == 0 else "utf-8")
        except UnicodeDecodeError:
            raise InputError("the text is not UTF-8") from None
        return _json_text(text, self._column) if item.form == "json" else text

    def _span(self, item: Item, most: int) -> bytes:
        line_break = 2 if item.kind == "text" else 0
        if item.size > most + line_break:
            raise InputError(f"{item.size} bytes; the limit is {most}")
        file = self._open(item.path, lambda: open_archive(item.path))
        try:
            file.seek(item.offset)
            data = bytearray()
            while len(data) < item.size and (more := file.read(item.size - len(data))):
                data += more
        except DAMAGE:
            raise InputError(f"{item.path!r:.200} is damaged") from None
        except OSError as error:
            raise InputError(f"{item.path!r:.200} cannot be read: {error.strerror}") from None
        if len(data) < item.size:
            raise InputError(f"{item.path!r:.200} became shorter")
        return bytes(data)

    def _open(self, path: str, opener: Callable[[], Any]) -> Any:
        if self._opened is None or self._opened[0] != path:
            self.close()
            self._opened = path, opener()
        return self._opened[1]

    def close(self) -> None:
        """Closes the open file."""
        opened, self._opened = self._opened, None
        if opened is not None:
            opened[1].close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def image_of(source: str, column: str | None = None) -> str | bytes | None:
    """Finds an image by the `source` of a result: its path, or its bytes.

    Args:
        source: as `Item.source`.
        column: as for `Contents`.

    Returns:
        None if the source is not an image that can be read: a text, a video, or a file that is
        gone.
    """
    if os.path.isfile(source):  # noqa: PTH113 - a text may be no valid path
        return source
    path, separator, name = source.partition("#")
    while separator and not os.path.isfile(path):  # noqa: PTH113
        more, separator, name = name.partition("#")
        path = f"{path}#{more}"
    ending = Path(path).suffix.lower()
    if not separator or ending.removeprefix(".") in TEXTS:
        return None
    try:
        with Contents(column) as contents:
            if ending == ".parquet" and name.isdecimal():
                return contents.image(Item("image", source, "cell", path, int(name)))
            items = Sources(paths=(path,)).items()
            item = next((i for i in items if i.source == source), None)
            return None if item is None or not is_tar(path) else contents.image(item)
    except InputError:
        return None


def _json_text(line: str, field: str | None) -> str:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        raise InputError("the line is not JSON") from None
    if isinstance(value, dict):
        names = _FIELDS if field is None else (field,)
        value = next((value[name] for name in names if name in value), None)
    if not isinstance(value, str):
        wanted = " or ".join(_FIELDS) if field is None else field
        raise InputError(f"the line is neither a string nor an object with {wanted!r:.80}")
    return value
