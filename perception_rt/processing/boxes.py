"""Boxes in pictures and in text: drawn as the reference marks regions, written as its models do.

In text a corner is in thousandths of the image's sides: `[x1,y1,x2,y2]`, three digits each. Knows
nothing of prompts and of models.

Legend: T frames, H height, W width.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import InputError

PixelBox: TypeAlias = Sequence[float] | NDArray[Any]

_MAX_COORDINATE = 2**31
# No part of it can match where another began, so a search is linear in the text.
_BOX = re.compile(r"\[\s*([0-9]{3})" + r"\s*,\s*([0-9]{3})" * 3 + r"\s*\]")


@dataclass(frozen=True, slots=True)
class Box:
    """A box in an image, in fractions of its width and height from the upper left.

    Attributes:
        x1: left, in [0, 1).
        y1: top, in [0, 1).
        x2: right, in [0, 1), not below x1.
        y2: bottom, in [0, 1), not below y1.
    """

    x1: float
    y1: float
    x2: float
    y2: float

    def __post_init__(self) -> None:
        corners = _ordered((self.x1, self.y1, self.x2, self.y2))
        if not all(0 <= value < 1 for value in corners):
            raise InputError("a box must have coordinates of at least 0 and below 1")

    def to_pixels(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(x1, y1, x2, y2) in pixels of an image of that size; InputError if it is no size."""
        _check_size(width, height)
        return self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height


def format_box(box: PixelBox, width: int, height: int) -> str:
    """Writes a box as the models read it.

    Args:
        box: x1, y1, x2, y2 in pixels.
        width: of the image, in pixels.
        height: of the image, in pixels.

    Returns:
        "[x1,y1,x2,y2]" in thousandths, rounded down, three digits each. What lies outside of the
        image is moved to its border.

    Raises:
        InputError: the box is not four ordered numbers, or the size is no size.
    """
    _check_size(width, height)
    x1, y1, x2, y2 = _ordered(box)
    fractions = (x1 / width, y1 / height, x2 / width, y2 / height)
    digits = [f"{int(min(max(value, 0.0), 0.999) * 1000):03}" for value in fractions]
    return f"[{','.join(digits)}]"


def parse_boxes(text: str) -> list[Box]:
    """The boxes that a text mentions, in order.

    White space inside the brackets is allowed. Lists of other numbers and boxes whose right or
    bottom comes first are left out: a text that holds no box is not an error.
    """
    found = (tuple(int(digits) / 1000 for digits in match) for match in _BOX.findall(text))
    return [Box(*corners) for corners in found if _is_ordered(corners)]


def draw_box(
    image: Image.Image | NDArray[np.uint8],
    box: PixelBox,
    *,
    color: tuple[int, int, int] = (255, 0, 0),
    width: int = 4,
) -> NDArray[np.uint8]:
    """Marks a region by a rectangle, by default as the reference does.

    Args:
        image: a Pillow image of mode RGB, or uint8 (H, W, 3), or the frames of a video
            (T, H, W, 3), which all get the same rectangle.
        box: x1, y1, x2, y2 in pixels, rounded toward 0; both corners belong to the box. What lies
            outside of the image is not drawn.
        color: red, green and blue, 0 to 255.
        width: of the line in pixels, all of it inside the box.

    Returns:
        A copy as uint8, of the image's shape.

    Raises:
        InputError: an argument is not as described.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise InputError(f"image must have mode RGB, not {image.mode}")
    pixels = np.array(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise InputError(
            f"an image to draw on must be uint8 (H, W, 3) or (T, H, W, 3), "
            f"not {pixels.dtype} {pixels.shape}"
        )
    if type(width) is not int or width < 1:
        raise InputError("width of a line must be an integer of at least 1")
    if len(color) != 3 or not all(type(value) is int and 0 <= value <= 255 for value in color):
        raise InputError("color must be three integers from 0 to 255")
    left, top, right, bottom = (int(value) for value in _ordered(box))
    right, bottom = right + 1, bottom + 1  # exclusive from here on
    for x1, y1, x2, y2 in (
        (left, top, right, min(top + width, bottom)),
        (left, max(bottom - width, top), right, bottom),
        (left, top, min(left + width, right), bottom),
        (max(right - width, left), top, right, bottom),
    ):
        pixels[..., max(y1, 0) : max(y2, 0), max(x1, 0) : max(x2, 0), :] = color
    return pixels


def _is_ordered(corners: Sequence[float]) -> bool:
    return corners[0] <= corners[2] and corners[1] <= corners[3]


def _ordered(box: Any) -> tuple[float, float, float, float]:
    """Four numbers of any kind as floats; InputError unless they are finite and ordered."""
    is_list = isinstance(box, list | tuple) or (isinstance(box, np.ndarray) and box.ndim == 1)
    if not is_list or len(box) != 4:
        raise InputError("a box must be a list of 4 numbers: x1, y1, x2, y2")
    for value in box:
        number = isinstance(value, int | float | np.integer | np.floating)
        if not number or isinstance(value, bool):
            raise InputError(f"a box must hold numbers, not a {type(value).__name__}")
        if not abs(value) <= _MAX_COORDINATE:
            raise InputError(f"a box must hold finite numbers of at most {_MAX_COORDINATE}")
    x1, y1, x2, y2 = (float(value) for value in box)
    if not _is_ordered((x1, y1, x2, y2)):
        raise InputError(
            f"a box must have x1 <= x2 and y1 <= y2, not {x1:g}, {y1:g}, {x2:g}, {y2:g}"
        )
    return x1, y1, x2, y2


def _check_size(width: int, height: int) -> None:
    for name, value in (("width", width), ("height", height)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} of the image must be an integer of at least 1")
