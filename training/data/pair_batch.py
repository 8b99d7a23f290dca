"""Images and captions as batches for a Perception Encoder, and one source of them: digits.

A sample of `DigitSource` is a handwritten digit in a synthetic scene, fixed by (seed, its number in
the run). Step s takes numbers s * B to s * B + B - 1 over all ranks; so it is in every source of
pairs: a lane's position is the step.

Legend: B rows of all ranks, n rows, I images (frames of videos among them), F frames of a row,
H W height and width, T tokens.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from perception_rt.config import PeConfig
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec, normalize, resize_image
from training.data.loader import Read
from training.demo.digits import Bytes, Digits, training_digits
from training.demo.scenes import caption, draw_page, draw_scene
from training.recipe.pairs import PairDataConfig

Sizes = Callable[[int], tuple[int, ...]]
"""From a step to the sides in pixels that its images are wanted in: the model's, then others'."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PairBatch:
    """Matching rows.

    Attributes:
        pixels: float32 (I, 3, H, W), normalised.
        tokens: int64 (n, T); (n, 0) where captions are not used.
        names: of the samples.
        frames: images of each row, in order; empty where every row has one.
        others: the same images at the other sizes, float32 (I, 3, H, W) each.
    """

    pixels: Tensor
    tokens: Tensor
    names: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    others: tuple[Tensor, ...] = ()

    @property
    def weight(self) -> int:
        """Rows."""
        return len(self.frames) or len(self.pixels)

    @property
    def counts(self) -> Mapping[str, int]:
        """Images; every frame of a video is one."""
        return {"images": len(self.pixels)}

    def to(self, device: torch.device) -> "PairBatch":
        """The same on a device."""
        return PairBatch(
            pixels=self.pixels.to(device),
            tokens=self.tokens.to(device),
            names=self.names,
            frames=self.frames,
            others=tuple(pixels.to(device) for pixels in self.others),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Pair:
    """A sample.

    Attributes:
        views: its image, or frames, uint8 (F, H, W, 3), once for each size.
        tokens: of its caption, int64 (T,); (0,) where captions are not used.
        name: for whoever must find it.
    """

    views: tuple[Bytes, ...]
    tokens: Tensor
    name: str


class Captions:
    """Captions to token ids, or to nothing for a model without a text tower."""

    def __init__(self, model: PeConfig) -> None:
        self._tokenizer: ClipTokenizer | None = None
        if model.text is not None:
            self._tokenizer = ClipTokenizer(context_length=model.text.context_length)

    @property
    def used(self) -> bool:
        """Whether samples need a caption."""
        return self._tokenizer is not None

    def __call__(self, text: str) -> Tensor:
        """int64 (T,); InputError if the text is too long to look at."""
        if self._tokenizer is None:
            return torch.zeros(0, dtype=torch.int64)
        return torch.from_numpy(self._tokenizer([text]))[0]


class DigitSource:
    """Endless random scenes of the training digits, without the validation split.

    Args:
        config: the section `data` of a recipe.
        model: which images and captions are for.
        seed: of the run.
        sizes: of images, by step; the model's own by default.
    """

    def __init__(
        self, config: PairDataConfig, model: PeConfig, *, seed: int, sizes: Sizes | None = None
    ) -> None:
        digits = training_digits()
        self.digits = digits.part(slice(0, len(digits) - config.validation))
        self.config = config
        self.seed = seed
        self.sizes = sizes or (lambda _: (model.vision.image_size,))
        self.captions = Captions(model)

    def sample(self, number: int, size: int) -> tuple[Bytes, str]:
        """Sample `number` of the run: uint8 (size, size, 3) and a caption."""
        rng = np.random.default_rng((self.seed, number))
        row = int(rng.integers(len(self.digits)))
        draw = draw_page if rng.random() < self.config.plain_fraction else draw_scene
        label = int(self.digits.labels[row])
        image, scene = draw(rng, self.digits.ink[row], label, size)
        return image, caption(rng, scene)

    def read(self, lane: int, position: int) -> Read[Pair]:
        """One pair."""
        number = position * self.config.batch_size + lane
        sizes = self.sizes(position)
        image, text = self.sample(number, max(sizes))  # noise depends on the size: drawn once
        drawn = Image.fromarray(image)
        views = tuple(resize_image(drawn, square(size))[None] for size in sizes)
        row = Pair(views=views, tokens=self.captions(text), name=str(number))
        return Read(row=row, position=position + 1)


def collate_pairs(rows: Sequence[Pair]) -> PairBatch:
    """Rows of the same sizes to a batch; text is cut where the longest of it ends."""
    tokens = torch.stack([row.tokens for row in rows])
    if tokens.shape[1]:
        longest = int(tokens.argmax(dim=1).max()) + 1  # nothing after the end of text is ever read
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
    """Means over the frames of each row, (I, ...) -> (n, ...), as `encode_video` takes them."""
    if not frames:
        return values
    return torch.stack([part.mean(dim=0) for part in values.split(list(frames))])


def square(size: int) -> ImageSpec:
    """How the encoders want images of a size."""
    return ImageSpec(height=size, width=size)


def to_pixels(images: Bytes) -> Tensor:
    """uint8 (I, H, W, 3) -> normalised float32 (I, 3, H, W)."""
    return torch.from_numpy(normalize(images, square(images.shape[1])))


def validation_digits(config: PairDataConfig) -> Digits:
    """The last `config.validation` digits of the training split, which `DigitSource` leaves out."""
    digits = training_digits()
    return digits.part(slice(len(digits) - config.validation, len(digits)))
