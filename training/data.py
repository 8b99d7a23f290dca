"""Batches of images and captions as a pure function of the step.

A sample is fixed by (seed, its number in the run), and step s takes numbers s * B to s * B + B - 1
over all ranks. So the data position of a run is its step, whatever the number of ranks.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec, normalize
from training.config import DataConfig
from training.digits import Bytes, Digits, training_digits
from training.scenes import caption, draw_page, draw_scene


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Matching rows: `pixels` float32 (n, 3, H, W), normalised, and `tokens` int64 (n, T)."""

    pixels: Tensor
    tokens: Tensor


class DigitStream:
    """Endless random scenes of the training digits, without the validation split."""

    def __init__(self, config: DataConfig, model: PeConfig, *, seed: int) -> None:
        assert model.text is not None
        digits = training_digits()
        self.digits = digits.part(slice(0, len(digits) - config.validation))
        self.config = config
        self.seed = seed
        self.image_size = model.vision.image_size
        self.tokenizer = ClipTokenizer(context_length=model.text.context_length)

    def sample(self, number: int) -> tuple[Bytes, str]:
        """Sample `number` of the run: uint8 (H, W, 3) and a caption."""
        rng = np.random.default_rng((self.seed, number))
        row = int(rng.integers(len(self.digits)))
        draw = draw_page if rng.random() < self.config.plain_fraction else draw_scene
        label = int(self.digits.labels[row])
        image, scene = draw(rng, self.digits.ink[row], label, self.image_size)
        return image, caption(rng, scene)

    def batch(self, step: int, *, rank: int, ranks: int) -> Batch:
        """This rank's share of the batch of `step`, counted from 0."""
        size = self.config.batch_size // ranks
        first = step * self.config.batch_size + rank * size
        images, captions = zip(*(self.sample(first + i) for i in range(size)), strict=True)
        tokens = torch.from_numpy(self.tokenizer(list(captions)))
        longest = int(tokens.argmax(dim=1).max()) + 1  # nothing after the end of text is ever read
        return Batch(pixels=to_pixels(np.stack(images)), tokens=tokens[:, :longest])


def to_pixels(images: Bytes) -> Tensor:
    """uint8 (N, H, W, 3) -> normalised float32 (N, 3, H, W)."""
    height, width = images.shape[1:3]
    return torch.from_numpy(normalize(images, ImageSpec(height=height, width=width)))


def validation_digits(config: DataConfig) -> Digits:
    """The last `config.validation` digits of the training split, which `DigitStream` leaves out."""
    digits = training_digits()
    return digits.part(slice(len(digits) - config.validation, len(digits)))


def check_shares(config: DataConfig, ranks: int) -> None:
    """InputError unless every rank can take an equal share of the batch."""
    if config.batch_size % ranks:
        raise InputError(
            f"data.batch_size {config.batch_size} is not divisible by {ranks} processes"
        )
