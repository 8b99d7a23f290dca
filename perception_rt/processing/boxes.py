"""Boxes: drawn into images as the reference marks regions, and written as its models write them.

In text, `[x1,y1,x2,y2]` has three digits per coordinate, in thousandths of the image's width or
height.

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
from perception_rt.records import check_integer, plain_number

PixelBox: TypeAlias = Sequence[float] | NDArray[Any]

_MAX_COORDINATE = 2**31
# No part can match where another part starts, so a search takes linear time.
_BOX = re.compile(r"\[\s*([0-9]{3})" + r"\s*,\s*([0-9]{3})" * 3 + r"\s*\]")


@dataclass(frozen=True, slots=True)
class Box:
    """A box in an image, in fractions of width and height from the upper left corner.

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
        """Returns (x1, y1, x2, y2) in pixels of an image of this width and height."""
        _check_size(width, height)
        return self.x1 * width, self.y1 * height, self.x2 * width, self.y2 * height


def format_box(box: PixelBox, width: int, height: int) -> str:
    """Writes a box in the text format of the models.

    Args:
        box: x1, y1, x2, y2 in pixels.
        width: image width in pixels.
        height: image height in pixels.

    Returns:
        "[x1,y1,x2,y2]" in thousandths, rounded down, three digits each. Coordinates outside the
        image move to its border.

    Raises:
        InputError: the box is not four ordered numbers, or width or height is below 1.
    """
    _check_size(width, height)
    x1, y1, x2, y2 = _ordered(box)
    fractions = (x1 / width, y1 / height, x2 / width, y2 / height)
    digits = [f"{int(min(max(value, 0.0), 0.999) * 1000):03}" for value in fractions]
    return f"[{','.join(digits)}]"


def parse_boxes(text: str) -> list[Box]:
    """Finds the boxes in a text, in order.

    White space inside the brackets is allowed. Other lists of numbers, and boxes with x2 < x1 or
    y2 < y1, are skipped.
    """
    found = (tuple(int(digits) / 1000 for digits in match) for match in _BOX.findall(text))
    return [Box(*corners) for corners in found if _is_ordered(corners)]


def overlap(first: Box, second: Box) -> float:
    """Returns the intersection over union of two boxes, from 0 to 1."""
    width = min(first.x2, second.x2) - max(first.x1, second.x1)
    height = min(first.y2, second.y2) - max(first.y1, second.y1)
    both = max(0.0, width) * max(0.0, height)
    areas = sum((box.x2 - box.x1) * (box.y2 - box.y1) for box in (first, second))
    return both / (areas - both) if areas > both else 0.0


def draw_box(
    image: Image.Image | NDArray[np.uint8],
    box: PixelBox,
    *,
    color: tuple[int, int, int] = (255, 0, 0),
    width: int = 4,
) -> NDArray[np.uint8]:
    """Marks a region with a rectangle, by default in the reference's style.

    Args:
        image: a Pillow image of mode RGB, uint8 (H, W, 3), or video frames uint8 (T, H, W, 3),
            which all get the same rectangle.
        box: x1, y1, x2, y2 in pixels, rounded toward 0. Both corners belong to the box. Parts
            outside the image are not drawn.
        color: red, green and blue, 0 to 255.
        width: line width in pixels; the line lies inside the box.

    Returns:
        A copy, uint8 of the same shape.

    Raises:
        InputError: an argument is unusable.
    """
    if isinstance(image, Image.Image) and image.mode != "RGB":
        raise InputError(f"image must have mode RGB, not {image.mode}")
    pixels = np.array(image)
    if pixels.dtype != np.uint8 or pixels.ndim not in (3, 4) or pixels.shape[-1] != 3:
        raise InputError(
            f"an image to draw on must be uint8 (H, W, 3) or (T, H, W, 3), "
            f"not {pixels.dtype} {pixels.shape}"
        )
    check_integer("the line width", width, 1)
    if len(color) != 3 or not all(
        type(value) is int and 0 <= value <= 255 for value in map(plain_number, color)
    ):
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
    """The four numbers as floats; InputError unless they are finite and ordered."""
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
        check_integer(f"the image's {name}", value, 1)
