"""Reads image-caption and video-caption samples from jsonl files and webdataset tar shards.

A jsonl line is `{"image": path, "caption": text}`; `video` may replace `image`, `text` may replace
`caption`, and `conversation_layouts.py` has other names of `image`.

In a tar shard, the members of a sample share their name up to its first dot: `.jpg`, `.jpeg`,
`.png` or `.webp` for the image, `.txt` or a `.json` with `caption` for the text. Shards must be
uncompressed; samples are read from them in place.
"""

import glob
import json
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError, SampleError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.conversation_layouts import IMAGE_KEYS, first_of
from training.data.jsonl import refuse_array
from training.data.media import MediaFolders
from training.recipe.pairs import PairDataConfig

Index = NDArray[np.int64]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A sample before decoding: an encoded image, or the path of an image or video."""

    image: bytes | Path | None = None
    video: Path | None = None
    caption: str | None = None


class Format(Protocol):
    """Reads the samples of one kind of shard."""

    def index(self, shard: Path) -> Index:
        """Locates the samples of a shard, one row each; InputError if the file is unreadable."""

    def load(self, shard: Path, entry: Index) -> Raw:
        """Reads the sample of one index row; SampleError if it is unusable."""

    def name(self, shard: Path, entry: Index) -> str:
        """Returns the place of an index row for reports."""

    def images(self, shard: Path, index: Index) -> list[str]:
        """Returns a text for each index row that is the same for rows of the same image."""


class Jsonl:
    """Reads jsonl files.

    Index columns: offset and size in bytes, and number from 1, of each line that is not blank.

    Args:
        root: folder that image and video paths are relative to; empty for the jsonl file's.
    """

    def __init__(self, root: str) -> None:
        self._root = root

    def index(self, shard: Path) -> Index:
        """See `Format.index`."""
        rows: list[tuple[int, int, int]] = []
        offset = 0
        try:
            with shard.open("rb") as file:
                for number, line in enumerate(file, 1):
                    if line.strip():
                        if not rows:
                            refuse_array(line, shard)
                        rows.append((offset, len(line), number))
                    offset += len(line)
        except OSError as error:
            raise _unreadable(shard, error) from None
        return np.array(rows, dtype=np.int64).reshape(-1, 3)

    def load(self, shard: Path, entry: Index) -> Raw:
        """See `Format.load`."""
        fields = _json_object(_read_bytes(shard, *entry[:2]))
        image, video = first_of(fields, IMAGE_KEYS), fields.get("video")
        if image is None and video is None:
            raise SampleError("no image or video")
        folders, caption = MediaFolders.of(self._root, shard), _caption(fields)
        if video is not None:
            return Raw(caption=caption, video=folders.find(video, "a video"))
        if isinstance(image, list) and len(image) == 1:
            (image,) = image
        return Raw(caption=caption, image=folders.find(image, "an image"))

    def name(self, shard: Path, entry: Index) -> str:
        """See `Format.name`."""
        return f"{shard.name} line {entry[-1]}"

    def images(self, shard: Path, index: Index) -> list[str]:
        """See `Format.images`."""
        try:
            with shard.open("rb") as file:
                return [_image(file, *entry) for entry in index.tolist()]
        except OSError as error:
            raise _unreadable(shard, error) from None


class Tar:
    """Reads tar shards.

    Index columns: offset and size in bytes of the image, offset and size of the text, 1 if the text
    is JSON, and the sample's number from 0. A missing image or text has offset -1.
    """

    def index(self, shard: Path) -> Index:
        """See `Format.index`."""
        samples: dict[str, list[int]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    _add_member(samples, member)
        except OSError as error:
            raise _unreadable(shard, error) from None
        except tarfile.TarError:
            raise InputError(f"{shard.name} is damaged, or not an uncompressed tar file") from None
        rows = [[*sample, number] for number, sample in enumerate(samples.values())]
        return np.array(rows, dtype=np.int64).reshape(-1, 6)

    def load(self, shard: Path, entry: Index) -> Raw:
        """See `Format.load`."""
        image, image_size, text, text_size, is_json = (int(value) for value in entry[:-1])
        if image_size > DEFAULT_LIMITS.image_bytes or text_size > DEFAULT_LIMITS.text_bytes:
            raise SampleError("too many bytes")
        caption = None
        if text >= 0:
            data = _read_bytes(shard, text, text_size)
            caption = _caption(_json_object(data)) if is_json else data.decode("utf-8", "replace")
        if image < 0:
            raise SampleError("no image")
        return Raw(image=_read_bytes(shard, image, image_size), caption=caption)

    def name(self, shard: Path, entry: Index) -> str:
        """See `Format.name`."""
        return f"{shard.name}#{entry[-1]}"

    def images(self, shard: Path, index: Index) -> list[str]:
        """See `Format.images`: every sample has its own."""
        return [str(entry[-1]) for entry in index]


def open_format(config: PairDataConfig) -> Format:
    """Returns the reader of a recipe's files."""
    return Jsonl(config.root) if config.dataset == "jsonl" else Tar()


def divide(format: Format, shard: Path, fraction: float) -> tuple[Index, Index]:
    """Divides a shard's index into rows for training and rows kept for validation.

    All rows of an image are on the same side. The division depends on the shard's name and contents
    and on the fraction, not on the run's seed, so that runs with other seeds keep the same samples.
    At least one image is kept, and at least one is trained on.

    Args:
        format: reader of the shard.
        shard: the shard.
        fraction: share of the samples to keep; 0 keeps none.
    """
    index = format.index(shard)
    if not fraction or not len(index):
        return index, index[:0]
    _, image, rows = np.unique(format.images(shard, index), return_inverse=True, return_counts=True)
    order = np.random.default_rng(zlib.crc32(shard.name.encode())).permutation(len(rows))
    # The first images in this order whose rows are as many as wanted.
    wanted = np.searchsorted(np.cumsum(rows[order]), round(len(index) * fraction)) + 1
    kept = np.isin(image, order[: min(wanted, len(rows) - 1)])
    return index[~kept], index[kept]


def _image(file: BinaryIO, offset: int, size: int, number: int) -> str:
    """The image or video that a line names; an unreadable line stands for itself."""
    file.seek(offset)
    try:
        fields = _json_object(file.read(size))
    except SampleError:
        return f"line {number}"
    return repr(first_of(fields, (*IMAGE_KEYS, "video")))


def _add_member(samples: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    """Adds a shard's member to its sample; the first image and the first text of a sample count."""
    folder, slash, file = member.name.rpartition("/")
    stem, _, ending = file.partition(".")
    ending = ending.lower()
    if not member.isfile() or member.issparse() or ending not in _IMAGES + _TEXTS:
        return
    sample = samples.setdefault(folder + slash + stem, [-1, 0, -1, 0, 0])
    column = 0 if ending in _IMAGES else 2
    if sample[column] < 0:
        sample[column : column + 2] = member.offset_data, member.size
        if column:
            sample[4] = int(ending == "json")


def _caption(fields: dict[str, Any]) -> str | None:
    value = first_of(fields, ("caption", "text"))
    return value if isinstance(value, str) else None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise SampleError("not JSON") from None
    if not isinstance(value, dict):
        raise SampleError("not a JSON object")
    return value


def _read_bytes(path: Path, offset: int, size: int) -> bytes:
    try:
        with path.open("rb") as file:
            file.seek(offset)
            return file.read(size)
    except OSError as error:
        raise _unreadable(path, error) from None


def _unreadable(path: Path, error: OSError) -> InputError:
    return InputError(f"{path.name} cannot be read: {error.strerror}")


def expand(pattern: str, setting: str = "data.path") -> tuple[Path, ...]:
    """Expands a pattern to files: `{000..007}` and `{a,b}` first, then `*`, `?` and `[...]`.

    Args:
        pattern: the pattern.
        setting: name of its setting, for messages.

    Raises:
        InputError: no file matches, or a name without wildcards is not a file.
    """
    names = [name for expanded in _expand_braces(pattern) for name in _matches(expanded)]
    if not names:
        raise InputError(f"{setting} {pattern!r:.200} matches no file")
    for name in names:
        if not Path(name).is_file():
            raise InputError(f"{setting}: {name!r:.200} is not a file")
    return tuple(Path(name) for name in names)


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    return sorted(glob.glob(pattern))  # noqa: PTH207 - Path.glob rejects absolute patterns


def _expand_braces(pattern: str) -> Iterator[str]:
    found = _BRACES.search(pattern)
    if found is None:
        yield pattern
        return
    first, last, options = found.groups()
    if options is None:
        numbers = range(int(first), int(last) + 1)
        parts = [f"{number:0{len(first)}d}" for number in numbers]
    else:
        parts = options.split(",")
    for part in parts:
        yield from _expand_braces(pattern[: found.start()] + part + pattern[found.end() :])
