"""Images, or videos, and captions from files: jsonl, or tar shards as webdataset has them.

A line of jsonl is `{"image": path, "caption": text}`, with `text` for `caption` and `video` for
`image` also. In a shard, the members of a sample share their name up to its first dot: `.jpg`,
`.jpeg`, `.png` or `.webp`, and `.txt` or a `.json` with `caption`. Shards are not compressed, and
nothing is unpacked. A jsonl file is a shard too.

In every epoch the shards are dealt out to the lanes in another order, and a shard is read in
another order; where there are fewer shards than lanes, several lanes share one. So all samples are
read once per epoch, lane by lane; lanes end their epochs together where shards are equally long and
their number is a multiple of the number of lanes, or the other way round.

Position p of a lane is step p. An unusable sample is counted, and the next usable one of its lane
stands in for it.
"""

import glob
import json
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol
from weakref import WeakValueDictionary

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PerceptionError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.image import decode_image, resize_image
from perception_rt.processing.video import load_video
from training.data.loader import LaneStream, Read
from training.data.pair_batch import (
    Captions,
    DigitSource,
    Pair,
    PairBatch,
    Sizes,
    collate_pairs,
    square,
)
from training.distributed import Group
from training.recipe.pairs import PairDataConfig
from training.recipe.schema import RunConfig

Index = NDArray[np.int64]

_IMAGES = ("jpg", "jpeg", "png", "webp")
_TEXTS = ("txt", "json")
_TRIES = 100  # samples of a lane that may be unusable in a row
_RATIO = 4 / 3  # of a crop's sides, at most, to the ratio of the image's
_BRACES = re.compile(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}")


def pair_stream(
    data: PairDataConfig,
    model: PeConfig,
    run: RunConfig,
    *,
    sizes: Sizes,
    parts: int,
    group: Group,
) -> LaneStream[Pair, PairBatch]:
    """This rank's share of the batches that the section `data` of a recipe means."""
    make = DigitSource if data.dataset == "digits" else PairSource
    return LaneStream(
        make(data, model, seed=run.seed, sizes=sizes),
        collate_pairs,
        lanes=data.batch_size,
        parts=parts,
        group=group,
        workers=run.workers,
        bad_fraction=data.bad_fraction,
    )


class BadSampleError(Exception):
    """A sample is unusable; the message is the reason, the same for all that have it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Raw:
    """A sample as it is stored: an encoded image or the path of one, or of a video."""

    image: bytes | Path | None = None
    video: Path | None = None
    caption: str | None = None


class Format(Protocol):
    """How samples are stored in a shard."""

    def index(self, shard: Path) -> Index:
        """Where its samples are, a row for each; InputError if it is no such file."""

    def load(self, shard: Path, entry: Index) -> Raw:
        """The sample of a row of the index; BadSampleError if there is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Place:
    """A shard in the course of a lane.

    Attributes:
        turn: shards before it, over all epochs.
        epoch: that it belongs to.
        shard: which it is.
        first: position of its first sample.
        count: samples of it that the lane reads.
        index: of the shard, once something is read from it.
        order: rows of the index as they are read in this epoch, by all lanes that share it.
    """

    turn: int
    epoch: int
    shard: int
    first: int
    count: int
    index: Index | None = None
    order: Index | None = None


class PairSource:
    """Samples of shards.

    Args:
        config: the section `data` of a recipe.
        model: which images and captions are for.
        seed: of the run.
        sizes: of images, by step.

    Raises:
        InputError: there is no such file.
    """

    def __init__(self, config: PairDataConfig, model: PeConfig, *, seed: int, sizes: Sizes) -> None:
        self.config = config
        self.seed = seed
        self.sizes = sizes
        self.captions = Captions(model)
        self.shards = expand(config.path)
        self.format: Format = Jsonl(Path(config.root)) if config.dataset == "jsonl" else Tar()
        self._samples: dict[int, int] = {}  # by shard
        self._places: dict[int, _Place] = {}  # by lane, where it read last
        # What no lane is at is forgotten: together, indices may be larger than memory.
        self._indices: WeakValueDictionary[int, Index] = WeakValueDictionary()
        self._orders: WeakValueDictionary[tuple[int, int], Index] = WeakValueDictionary()
        self._lock = Lock()

    def read(self, lane: int, position: int) -> Read[Pair]:
        """One pair; going on where the lane read last is fast, anywhere else opens shards.

        Raises:
            InputError: a shard is damaged, or has fewer samples than lanes that share it.
            PerceptionError: too many samples in a row are unusable.
        """
        bad: Counter[str] = Counter()
        start = self._find(lane, position, self._places.get(lane))
        self._places[lane] = start
        for attempt in range(_TRIES):
            place = self._find(lane, position + attempt, start)
            shard, entry, name = self._entry(lane, position + attempt, place)
            try:
                row = self._pair(self.format.load(shard, entry), lane, position, name)
                return Read(row=row, position=position + 1, bad=bad)
            except BadSampleError as error:
                if attempt == 0:  # the others are counted where they stand
                    bad[str(error)] += 1
                reason = str(error)
        raise PerceptionError(f"{_TRIES} samples in a row are unusable; {name}: {reason}")

    def _find(self, lane: int, position: int, place: _Place | None) -> _Place:
        """The place that a position of a lane is in, from a place that is not after it."""
        if place is None or position < place.first:
            place = self._dealt(lane, turn=0, first=0)
        while position >= place.first + place.count:
            place = self._dealt(lane, turn=place.turn + 1, first=place.first + place.count)
        return place if place.index is not None else self._opened(place)

    def _dealt(self, lane: int, *, turn: int, first: int) -> _Place:
        """A turn of a lane, that begins at a position."""
        shards, lanes = len(self.shards), self.config.batch_size
        column = lane % shards
        epoch, row = divmod(turn, len(range(column, shards, lanes)))
        order = np.random.default_rng((self.seed, epoch)).permutation(shards)
        shard = int(order[column + row * lanes])
        place = _Place(turn=turn, epoch=epoch, shard=shard, first=first, count=0)
        if shard not in self._samples:
            place = self._opened(place)
        samples = self._samples[shard]
        sharers, own = self._shared(lane)
        if samples < sharers:
            raise InputError(
                f"{self.shards[shard].name} has {samples} samples, too few for {sharers} of the "
                f"{lanes} rows of a batch (data.batch_size)"
            )
        return replace(place, count=len(range(own, samples, sharers)))

    def _shared(self, lane: int) -> tuple[int, int]:
        """How many lanes share this one's shards, and which of them it is."""
        shards, lanes = len(self.shards), self.config.batch_size
        return len(range(lane % shards, lanes, shards)), lane // shards

    def _opened(self, place: _Place) -> _Place:
        """The same with the shard's index, and the order of the epoch."""
        shard, epoch = place.shard, place.epoch
        with self._lock:
            index = self._indices.get(shard)
            if index is None:
                index = self._indices[shard] = self.format.index(self.shards[shard])
                self._samples[shard] = len(index)
            order = self._orders.get((epoch, shard))
            if order is None:
                rng = np.random.default_rng((self.seed, epoch, shard))
                order = self._orders[epoch, shard] = rng.permutation(len(index))
        return replace(place, index=index, order=order)

    def _entry(self, lane: int, position: int, place: _Place) -> tuple[Path, Index, str]:
        """The shard of a position, its row of the index, and its name."""
        assert place.index is not None
        assert place.order is not None
        sharers, own = self._shared(lane)
        number = int(place.order[own + (position - place.first) * sharers])
        path = self.shards[place.shard]
        return path, place.index[number], f"{path.name}#{number}"

    def _pair(self, raw: Raw, lane: int, position: int, name: str) -> Pair:
        """What the model sees; BadSampleError if it cannot be made."""
        if self.captions.used and not (raw.caption and raw.caption.strip()):
            raise BadSampleError("no caption")
        try:
            tokens = self.captions(raw.caption or "")
        except InputError:
            raise BadSampleError("caption too long") from None
        number = position * self.config.batch_size + lane
        rng = np.random.default_rng((self.seed, number))
        frames = self._augmented(rng, _frames(raw, self.config.frames))
        views = tuple(
            np.stack([resize_image(frame, square(size)) for frame in frames])
            for size in self.sizes(position)
        )
        return Pair(views=views, tokens=tokens, name=name)

    def _augmented(self, rng: np.random.Generator, frames: list[Image.Image]) -> list[Image.Image]:
        """The same random part of every frame, mirrored or not."""
        if self.config.crop_min < 1:
            box = crop_box(rng, frames[0].width, frames[0].height, self.config.crop_min)
            frames = [frame.crop(box) for frame in frames]
        if self.config.flip and rng.random() < 0.5:
            frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
        return frames


def crop_box(
    rng: np.random.Generator, width: int, height: int, smallest: float
) -> tuple[int, int, int, int]:
    """A random part of an image: left, top, right, bottom in pixels.

    Args:
        rng: what it is drawn from.
        width: of the image.
        height: of the image.
        smallest: least share of the area, before sides are cut to those of the image.
    """
    area = rng.uniform(smallest, 1.0)
    ratio = _RATIO ** rng.uniform(-1.0, 1.0)
    w = max(1, min(width, round(width * (area * ratio) ** 0.5)))
    h = max(1, min(height, round(height * (area / ratio) ** 0.5)))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _frames(raw: Raw, number: int) -> list[Image.Image]:
    """An image, or `number` frames of a video, RGB and upright; BadSampleError."""
    if raw.video is not None:
        try:
            return [Image.fromarray(pixels) for pixels in load_video(raw.video, num_frames=number)]
        except InputError:
            raise BadSampleError("unreadable video") from None
    if raw.image is None:
        raise BadSampleError("no image")
    try:
        return [decode_image(raw.image)]
    except InputError:
        raise BadSampleError("unreadable image") from None


class Jsonl:
    """Lines of JSON; the index has offset and size of each line that is not blank."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def index(self, shard: Path) -> Index:
        """As `Format.index`."""
        rows, offset = [], 0
        try:
            with shard.open("rb") as file:
                for line in file:
                    if line.strip():
                        rows.append((offset, len(line)))
                    offset += len(line)
        except OSError as error:
            raise _unreadable(shard, error) from None
        return np.array(rows, dtype=np.int64).reshape(-1, 2)

    def load(self, shard: Path, entry: Index) -> Raw:
        """As `Format.load`."""
        fields = _json_object(_read_bytes(shard, *entry))
        image, video = (fields.get(key) for key in ("image", "video"))
        path = image if video is None else video
        if not isinstance(path, str) or not path:
            raise BadSampleError("no image or video")
        caption = _caption(fields)
        found = self._root / path
        return Raw(caption=caption, **({"image": found} if video is None else {"video": found}))


class Tar:
    """Tar files; the index has offset and size of image and text, and whether that is JSON."""

    def index(self, shard: Path) -> Index:
        """As `Format.index`."""
        samples: dict[str, list[int]] = {}
        try:
            with tarfile.open(shard, "r:") as tar:
                for member in tar:
                    _add_member(samples, member)
        except OSError as error:
            raise _unreadable(shard, error) from None
        except tarfile.TarError:
            raise InputError(f"{shard.name} is damaged, or no uncompressed tar file") from None
        return np.array(list(samples.values()), dtype=np.int64).reshape(-1, 5)

    def load(self, shard: Path, entry: Index) -> Raw:
        """As `Format.load`."""
        image, image_size, text, text_size, is_json = (int(value) for value in entry)
        if image_size > DEFAULT_LIMITS.image_bytes or text_size > DEFAULT_LIMITS.text_bytes:
            raise BadSampleError("too many bytes")
        caption = None
        if text >= 0:
            data = _read_bytes(shard, text, text_size)
            caption = _caption(_json_object(data)) if is_json else data.decode("utf-8", "replace")
        if image < 0:
            raise BadSampleError("no image")
        return Raw(image=_read_bytes(shard, image, image_size), caption=caption)


def _add_member(samples: dict[str, list[int]], member: tarfile.TarInfo) -> None:
    """Adds a member of a shard to its sample; of several texts or images, the first counts."""
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
    """The caption in a JSON object; None if there is none."""
    value = fields.get("caption", fields.get("text"))
    return value if isinstance(value, str) else None


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        raise BadSampleError("not JSON") from None
    if not isinstance(value, dict):
        raise BadSampleError("not a JSON object")
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


def expand(pattern: str) -> tuple[Path, ...]:
    """The files that a pattern means: `{000..007}` and `{a,b}`, then `*`, `?` and `[...]`.

    Raises:
        InputError: it means none, or one that does not exist.
    """
    names = [name for expanded in _expand_braces(pattern) for name in _matches(expanded)]
    if not names:
        raise InputError(f"data.path {pattern!r:.200} matches no file")
    for name in names:
        if not Path(name).is_file():
            raise InputError(f"data.path: {name!r:.200} is not a file")
    return tuple(Path(name) for name in names)


def _matches(pattern: str) -> list[str]:
    if not glob.has_magic(pattern):
        return [pattern]
    return sorted(glob.glob(pattern))  # noqa: PTH207 - a path's own wants a folder to start from


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
