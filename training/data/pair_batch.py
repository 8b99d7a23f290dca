"""Batches of image-text pairs for a Perception Encoder.

Legend: n rows of a batch, I images (each video frame is one), F frames of a row, H W height and
width in pixels, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perception_rt.config import PeConfig
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec, normalize
from training.data.records import Pixels

Sizes = Callable[[int], tuple[int, ...]]
"""Maps a step to the sides in pixels that its images are needed in, the model's own first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Rows of images with matching captions.

    Attributes:
        pixels: normalised images, float32 (I, 3, H, W).
        tokens: caption ids, int64 (n, T); (n, 0) if captions are not used.
        names: sample names for error reports.
        frames: images per row, in order; empty if every row has one.
        others: the same images at the other sizes, each float32 (I, 3, H, W).
    """

    pixels: Tensor
    tokens: Tensor
    names: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    others: tuple[Tensor, ...] = ()

    @property
    def weight(self) -> int:
        """Number of rows."""
        return len(self.frames) or len(self.pixels)

    @property
    def counts(self) -> Mapping[str, int]:
        """Number of images; each video frame is one."""
        return {"images": len(self.pixels)}

    def to(self, device: torch.device) -> "PairBatch":
        """Copies the batch to a device."""
        return PairBatch(
            pixels=self.pixels.to(device),
            tokens=self.tokens.to(device),
            names=self.names,
            frames=self.frames,
            others=tuple(pixels.to(device) for pixels in self.others),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """One row.

    Attributes:
        views: the image or frames at each size, uint8 (F, H, W, 3).
        tokens: caption ids, int64 (T,); (0,) if captions are not used.
        name: sample name for error reports.
    """

    views: tuple[Pixels, ...]
    tokens: Tensor
    name: str


class Captions:
    """Tokenizes captions; yields no tokens for a model without a text tower."""

    def __init__(self, model: PeConfig) -> None:
        self._tokenizer: ClipTokenizer | None = None
        if model.text is not None:
            self._tokenizer = ClipTokenizer(context_length=model.text.context_length)

    @property
    def used(self) -> bool:
        """Whether samples need a caption."""
        return self._tokenizer is not None

    def __call__(self, text: str) -> Tensor:
        """Returns token ids, int64 (T,); InputError if the text exceeds the tokenizer's limit."""
        if self._tokenizer is None:
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_numpy(self._tokenizer([text]))[0]


def collate_pairs(rows: Sequence[Pair]) -> PairBatch:
    """Makes a batch of rows with equal sizes; tokens are cut to the longest caption."""
    tokens = torch.stack([row.tokens for row in rows])
    if tokens.shape[1]:
        longest = int(tokens.argmax(dim=1).max()) + 1  # the end-of-text id is the largest
        tokens = tokens[:, :longest]
    views = zip(*[row.views for row in rows], strict=True)
    pixels, *others = [to_pixels(np.concatenate(images)) for images in views]
    frames = tuple(len(row.views[0]) for row in rows)
    return PairBatch(
        pixels=pixels,
        tokens=tokens,
        names=tuple(row.name for row in rows),
        frames=frames if max(frames) > 1 else (),
        others=tuple(others),
    )


def pool_frames(values: Tensor, frames: Sequence[int]) -> Tensor:
    """Averages over the frames of each row, (I, ...) -> (n, ...), as `encode_video` does."""
    if not frames:
        return values
    return torch.stack([part.mean(dim=0) for part in values.split(list(frames))])


def square(size: int) -> ImageSpec:
    """Returns the image specification of an exported encoder at a side of `size` pixels."""
    return ImageSpec(height=size, width=size, rgb_conversion="after_resize")


def to_pixels(images: Pixels) -> Tensor:
    """Normalises images, uint8 (I, H, W, 3) -> float32 (I, 3, H, W)."""
    return torch.from_numpy(normalize(images, square(images.shape[1])))
