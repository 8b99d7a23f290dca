"""Reads image-text pairs from shards, lane by lane; `shards.py` has the file formats.

Each epoch assigns the shards to the lanes in a new random order, and each shard is read in a new
random order. With fewer shards than lanes, several lanes share a shard. So every sample is read
once per epoch. All lanes end an epoch at the same step if the shards have equal lengths and the
number of shards is a multiple of the number of lanes, or the reverse.

Position p of a lane is step p. An unusable sample is counted and replaced by the lane's next usable
one.

Legend: F frames of a row, H W height and width in pixels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from threading import Lock
from weakref import WeakValueDictionary

import numpy as np
from PIL import Image

from perception_rt.config import PeConfig
from perception_rt.errors import InputError, SampleError
from perception_rt.processing.image import open_image, resize_image
from perception_rt.processing.video import load_video
from training.data.loader import Read
from training.data.pair_batch import Captions, Pair, Sizes, square
from training.data.shards import Format, Index, Raw, divide, expand, open_format
from training.data.unusable import Unusable, all_unusable
from training.data.video_decoder import frame_decoder
from training.recipe.pairs import PairDataConfig

_MAX_TRIES = 100  # consecutive unusable samples of a lane before the run stops
_MAX_STRETCH = 4 / 3  # a crop's aspect ratio is at most this factor off the image's


@dataclass(frozen=True, slots=True, kw_only=True)
class _Visit:
    """One lane's visit to one shard in one epoch.

    Attributes:
        turn: number of the visit in its lane, over all epochs.
        epoch: epoch of the visit.
        shard: index of the shard.
        first: lane position of the visit's first sample.
        count: samples that the lane reads during the visit.
        index: index rows of the shard; None until a sample is read.
        order: index rows in this epoch's reading order, shared by the lanes of the shard.
    """

    turn: int
    epoch: int
    shard: int
    first: int
    count: int
    index: Index | None = None
    order: Index | None = None


class PairSource:
    """Reads pairs from shards.

    Args:
        config: the recipe's section `data`.
        model: architecture that images and captions are prepared for.
        seed: RNG seed of the order and the augmentations.
        sizes: image sides in pixels by step.

    Raises:
        InputError: a file is missing.
    """

    def __init__(self, config: PairDataConfig, model: PeConfig, *, seed: int, sizes: Sizes) -> None:
        self.config = config
        self.seed = seed
        self.sizes = sizes
        self.captions = Captions(model)
        self.shards = expand(config.path)
        self.format: Format = open_format(config)
        self._samples: dict[int, int] = {}  # shard -> number of samples
        self._visits: dict[int, _Visit] = {}  # lane -> latest visit
        # Weak, so that only shards being read are in memory: all indices together may not fit.
        self._indices: WeakValueDictionary[int, Index] = WeakValueDictionary()
        self._orders: WeakValueDictionary[tuple[int, int], Index] = WeakValueDictionary()
        self._lock = Lock()

    def read(self, lane: int, position: int) -> Read[Pair]:
        """Reads one pair. Consecutive positions are fast; a jump may open other shards.

        Raises:
            InputError: a shard is damaged, or has fewer samples than lanes that share it.
            PerceptionError: too many consecutive samples are unusable.
        """
        failed: list[Unusable] = []
        start = self._find(lane, position, self._visits.get(lane))
        self._visits[lane] = start
        for attempt in range(_MAX_TRIES):
            visit = self._find(lane, position + attempt, start)
            shard, entry, name = self._entry(lane, position + attempt, visit)
            try:
                row = self._pair(self.format.load(shard, entry), lane, position, name)
            except SampleError as error:
                failed.append(Unusable(name, str(error), error.detail))
            else:
                # Later ones are counted at their own positions.
                return Read(row=row, position=position + 1, bad=tuple(failed[:1]))
        raise all_unusable(failed)

    def _find(self, lane: int, position: int, visit: _Visit | None) -> _Visit:
        """Finds the visit of a lane that holds a position, searching on from `visit`."""
        if visit is None or position < visit.first:
            visit = self._visit(lane, turn=0, first=0)
        while position >= visit.first + visit.count:
            visit = self._visit(lane, turn=visit.turn + 1, first=visit.first + visit.count)
        return visit if visit.index is not None else self._opened(visit)

    def _visit(self, lane: int, *, turn: int, first: int) -> _Visit:
        shards, lanes = len(self.shards), self.config.batch_size
        column = lane % shards
        epoch, row = divmod(turn, len(range(column, shards, lanes)))
        order = np.random.default_rng((self.seed, epoch)).permutation(shards)
        shard = int(order[column + row * lanes])
        visit = _Visit(turn=turn, epoch=epoch, shard=shard, first=first, count=0)
        if shard not in self._samples:
            visit = self._opened(visit)
        samples = self._samples[shard]
        sharers, own = self._shared(lane)
        if samples < sharers:
            raise InputError(
                f"{self.shards[shard].name} has {samples} samples, too few for {sharers} of the "
                f"{lanes} rows of a batch; lower data.batch_size or merge shards"
            )
        return replace(visit, count=len(range(own, samples, sharers)))

    def _shared(self, lane: int) -> tuple[int, int]:
        """Returns how many lanes share this lane's shards, and its place among them."""
        shards, lanes = len(self.shards), self.config.batch_size
        return len(range(lane % shards, lanes, shards)), lane // shards

    def _opened(self, visit: _Visit) -> _Visit:
        """Returns the visit with the shard's index and the epoch's reading order."""
        shard, epoch = visit.shard, visit.epoch
        with self._lock:
            index = self._indices.get(shard)
            if index is None:
                index, _ = divide(self.format, self.shards[shard], self.config.validation_fraction)
                self._indices[shard] = index
                self._samples[shard] = len(index)
            order = self._orders.get((epoch, shard))
            if order is None:
                rng = np.random.default_rng((self.seed, epoch, shard))
                order = self._orders[epoch, shard] = rng.permutation(len(index))
        return replace(visit, index=index, order=order)

    def _entry(self, lane: int, position: int, visit: _Visit) -> tuple[Path, Index, str]:
        """Returns the shard, the index row and the name of the sample at a position."""
        assert visit.index is not None
        assert visit.order is not None
        sharers, own = self._shared(lane)
        number = int(visit.order[own + (position - visit.first) * sharers])
        path, entry = self.shards[visit.shard], visit.index[number]
        return path, entry, self.format.name(path, entry)

    def _pair(self, raw: Raw, lane: int, position: int, name: str) -> Pair:
        number = position * self.config.batch_size + lane
        rng = np.random.default_rng((self.seed, number))
        augment = partial(self._augmented, rng)
        sizes = self.sizes(position)
        return make_pair(raw, self.captions, self.config.frames, sizes, name, augment)

    def _augmented(self, rng: np.random.Generator, frames: list[Image.Image]) -> list[Image.Image]:
        """Crops and mirrors all frames alike."""
        if self.config.crop_min < 1:
            box = crop_box(rng, frames[0].width, frames[0].height, self.config.crop_min)
            frames = [frame.crop(box) for frame in frames]
        if self.config.flip and rng.random() < 0.5:
            frames = [frame.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for frame in frames]
        return frames


def make_pair(
    raw: Raw,
    captions: Captions,
    frames: int,
    sizes: Sequence[int],
    name: str,
    augment: Callable[[list[Image.Image]], list[Image.Image]] = lambda images: images,
) -> Pair:
    """Decodes a sample.

    Args:
        raw: the sample.
        captions: tokenizer of the captions.
        frames: frames to take from a video.
        sizes: sides in pixels of the row's views.
        name: sample name for error reports.
        augment: changes the image or frames before they are resized.

    Raises:
        SampleError: the sample is unusable.
    """
    if captions.used and not (raw.caption and raw.caption.strip()):
        raise SampleError("no caption")
    try:
        tokens = captions(raw.caption or "")
    except InputError as error:
        raise SampleError("caption too long", str(error)) from None
    images = augment(_frames(raw, frames))
    views = tuple(
        np.stack([resize_image(image, square(size)) for image in images])  # (F, H, W, 3)
        for size in sizes
    )
    return Pair(views=views, tokens=tokens, name=name)


def crop_box(
    rng: np.random.Generator, width: int, height: int, smallest: float
) -> tuple[int, int, int, int]:
    """Draws a random crop: left, top, right, bottom in pixels.

    Args:
        rng: random generator.
        width: image width in pixels.
        height: image height in pixels.
        smallest: least share of the image's area, before sides are clipped to the image.
    """
    area = rng.uniform(smallest, 1.0)
    ratio = _MAX_STRETCH ** rng.uniform(-1.0, 1.0)
    w = max(1, min(width, round(width * (area * ratio) ** 0.5)))
    h = max(1, min(height, round(height * (area / ratio) ** 0.5)))
    left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
    return left, top, left + w, top + h


def _frames(raw: Raw, number: int) -> list[Image.Image]:
    """Decodes an image, or `number` frames of a video, upright."""
    if raw.video is not None:
        try:
            return [
                Image.fromarray(pixels)
                for pixels in load_video(raw.video, num_frames=number, decoder=frame_decoder())
            ]
        except InputError as error:
            raise SampleError("unreadable video", str(error)) from None
    if raw.image is None:
        raise SampleError("no image")
    try:
        return [open_image(raw.image)]
    except InputError as error:
        raise SampleError("unreadable image", str(error)) from None
