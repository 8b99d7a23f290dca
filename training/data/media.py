"""Finds the images and videos that a line of a jsonl file names.

Paths are relative to `data.root`, or by default to the folder of the jsonl file. Earlier versions
took the working directory as the default, so it is still searched second.
"""

import base64
import binascii
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import SampleError

_FILE_URL = "file://"


@dataclass(frozen=True, slots=True)
class MediaFolders:
    """Folders that relative paths are looked up in, in this order."""

    folders: tuple[Path, ...]

    @classmethod
    def of(cls, root: str, jsonl: Path) -> "MediaFolders":
        """Returns the folders of a recipe's `root` and a jsonl file or a folder of such files."""
        if root:
            return cls((Path(root),))
        return cls((jsonl if jsonl.is_dir() else jsonl.parent, Path()))

    def find(self, item: Any, kind: str) -> Any:
        """Finds what a record names as an image or a video.

        Args:
            item: path, `file://` URL, `data:` URL, a mapping with `path` or `url`, or an array.
            kind: "an image" or "a video", for messages.

        Returns:
            The path of an existing file, the bytes of a `data:` URL, or the array.

        Raises:
            SampleError: there is no such file, or the item is of another kind.
        """
        if isinstance(item, np.ndarray):
            return item
        if isinstance(item, Mapping):
            item = item.get("path") or item.get("url")
        if not isinstance(item, str) or not item:
            raise SampleError(f"the path of {kind} is not text")
        if item.startswith("data:"):
            return _decoded(item, kind)
        if item.startswith(("http://", "https://")):
            raise SampleError(f"{kind} is not a local file", f"{item!r:.200}; download it first")
        paths = [folder / item.removeprefix(_FILE_URL) for folder in self.folders]
        for path in paths:
            if _is_file(path):
                return path
        raise SampleError(
            f"{kind} is missing", f"{str(paths[0])!r:.300}; the setting root can name its folder"
        )


def _decoded(url: str, kind: str) -> bytes:
    header, _, text = url.partition(",")
    try:
        if not header.endswith(";base64"):
            raise binascii.Error
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError):
        raise SampleError(f"{kind} is not base64", f"{url!r:.60}") from None


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name that is too long, or contains a zero byte
        return False
