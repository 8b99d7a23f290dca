"""Handwritten digits: the training and held-out splits, and their rendering as images.

The digits are scikit-learn's `load_digits`: 1,797 digits of the UCI set "Optical Recognition of
Handwritten Digits". The file appears to be ordered by writer, so the last 450 digits are by writers
who are not in the training split. Rendering is a pure function of its arguments and needs no torch.
"""

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import numpy.typing as npt
from PIL import Image
from sklearn.datasets import load_digits

from training.data.records import Pixels

TRAIN_DIGITS = slice(0, -450)
HELD_OUT_DIGITS = slice(-450, None)

Floats = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

_PAD = 2  # empty cells around a digit, so that interpolation fades out at its edge


@dataclass(frozen=True, slots=True, kw_only=True)
class Digits:
    """Digits of one split: `ink` float32 (N, 8, 8) from 0 to 1, `labels` int64 (N,)."""

    ink: Floats
    labels: Labels

    def __len__(self) -> int:
        return len(self.labels)

    def part(self, rows: slice) -> "Digits":
        """Returns a contiguous part of the split."""
        return Digits(ink=self.ink[rows], labels=self.labels[rows])


def training_digits() -> Digits:
    """Returns the first 1,347 digits."""
    return _load(TRAIN_DIGITS)


def held_out() -> Digits:
    """Returns the last 450 digits, for evaluation only."""
    return _load(HELD_OUT_DIGITS)


def _load(rows: slice) -> Digits:
    return _all_digits().part(rows)


@cache
def _all_digits() -> Digits:
    data = load_digits()
    ink = (data.images / 16.0).astype(np.float32)
    return Digits(ink=ink, labels=data.target.astype(np.int64))


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Placement of a digit's 8x8 box. Lengths are fractions of the image's side.

    Attributes:
        size: side of the box.
        x: horizontal centre of the box.
        y: vertical centre of the box.
        angle: counter-clockwise rotation in radians.
        shear: horizontal shift per unit of height; positive leans to the right.
        stretch: factor on the width.
    """

    size: float = 0.75
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    shear: float = 0.0
    stretch: float = 1.0


CENTRED = Placement()


def ink_mask(ink: Floats, image_size: int, placement: Placement = CENTRED) -> Floats:
    """Draws one digit (8, 8) as a coverage mask (image_size, image_size), from 0 to 1.

    The 8x8 cells are interpolated bicubically; a contrast curve then restores the pen's edge.
    """
    p = placement
    cells = 8.0 / (p.size * image_size)  # source cells per pixel
    cos, sin = math.cos(p.angle), math.sin(p.angle)
    # Image offsets (u right, v down) -> cells: undo the rotation, then shear, then stretch.
    a, b = cells * cos, -cells * sin
    d, e = cells * sin, cells * cos
    a, b = (a + p.shear * d) / p.stretch, (b + p.shear * e) / p.stretch
    u, v = p.x * image_size, p.y * image_size
    middle = 4.0 + _PAD
    inverse = (a, b, middle - a * u - b * v, d, e, middle - d * u - e * v)
    source = Image.fromarray(np.pad(ink, _PAD))
    size = (image_size, image_size)
    drawn = source.transform(size, Image.Transform.AFFINE, inverse, Image.Resampling.BICUBIC)
    return np.clip(np.asarray(drawn, dtype=np.float32) * 1.4 - 0.2, 0.0, 1.0)


def plain_image(ink: Floats, image_size: int, placement: Placement = CENTRED) -> Pixels:
    """Draws black ink on a white page, uint8 (image_size, image_size, 3)."""
    page = (255.0 * (1.0 - ink_mask(ink, image_size, placement))).round().astype(np.uint8)
    return np.repeat(page[:, :, None], 3, axis=2)


def held_out_digits(image_size: int) -> tuple[Pixels, Labels]:
    """Draws the held-out digits as plain images.

    Each is black on white, upright and centred, with its 8x8 box enlarged to three quarters of the
    image's side.

    Returns:
        Images uint8 (450, image_size, image_size, 3) and labels int64 (450,).
    """
    digits = held_out()
    images = np.stack([plain_image(ink, image_size) for ink in digits.ink])
    return images, digits.labels
