"""Correspondence between two images: patches that are each other's nearest neighbour.

Legend: h w grid, C width, M matches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from perception_rt.errors import InputError

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]

_GAP_PX = 8
_DOT_PX = 3


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Matches:
    """Pairs of patches of two images, the highest cosine first.

    Attributes:
        first: row and column of each patch in the first grid, int64 (M, 2).
        second: row and column of each patch in the second grid, int64 (M, 2).
        cosines: cosine of the two features, float32 (M,).
    """

    first: Int64
    second: Int64
    cosines: Float32

    def __len__(self) -> int:
        return len(self.cosines)

    def best(self, most: int) -> "Matches":
        """The first `most` pairs."""
        return Matches(
            first=self.first[:most], second=self.second[:most], cosines=self.cosines[:most]
        )


def mutual_matches(first: NDArray[Any], second: NDArray[Any]) -> Matches:
    """Finds the pairs of patches that are each other's nearest neighbour by cosine.

    Of equal cosines, the patch that comes first in reading order is the nearest.

    Args:
        first: dense features of an image, float (h, w, C).
        second: dense features of another, float (h, w, C); the grid may be another.

    Raises:
        InputError: the features are not of one width.
    """
    if first.ndim != 3 or second.ndim != 3 or first.shape[2] != second.shape[2]:
        raise InputError(
            f"features to match must be (h, w, C) of one width C, not {first.shape} and "
            f"{second.shape}"
        )
    cosines = unit_rows(first) @ unit_rows(second).T  # (h * w, h * w)
    nearest = cosines.argmax(axis=1)
    patches = np.flatnonzero(cosines.argmax(axis=0)[nearest] == np.arange(len(nearest)))
    found = cosines[patches, nearest[patches]]
    order = np.argsort(-found, kind="stable")
    patches = patches[order]
    return Matches(
        first=_places(patches, first.shape[1]),
        second=_places(nearest[patches], second.shape[1]),
        cosines=found[order],
    )


def unit_rows(dense: NDArray[Any]) -> Float32:
    """Features (..., C) as rows of length 1, float32 (N, C); rows of zeros stay zero."""
    rows = dense.reshape(-1, dense.shape[-1]).astype(np.float32)
    unit: Float32 = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), 1e-12)
    return unit


def _places(patches: Int64, width: int) -> Int64:
    """Row and column (M, 2) of numbers in reading order (M,)."""
    return np.stack(np.divmod(patches, width), axis=1)


def draw_matches(
    images: Sequence[Image.Image],
    grids: Sequence[tuple[int, int]],
    matches: Matches,
    *,
    height: int,
) -> Image.Image:
    """Draws two images side by side, with a line from each patch to the one that it matches.

    A line's colour is its place in the first image: lines that keep their order are parallel, and
    wrong ones cross.

    Args:
        images: the two images, RGB.
        grids: rows and columns of the two grids.
        matches: the pairs to draw.
        height: height of the result in pixels.
    """
    widths = [max(1, min(4 * height, round(height * i.width / i.height))) for i in images]
    lefts = (0, widths[0] + _GAP_PX)
    picture = Image.new("RGB", (lefts[1] + widths[1], height), "white")
    for image, width, left in zip(images, widths, lefts, strict=True):
        picture.paste(image.resize((width, height), Image.Resampling.BICUBIC), (left, 0))
    places = [
        (cells + 0.5) / grid * (height, width) + (0, left)  # (M, 2), y and x in pixels
        for cells, grid, width, left in zip(
            (matches.first, matches.second), grids, widths, lefts, strict=True
        )
    ]
    draw = ImageDraw.Draw(picture)
    for (y, x), (other_y, other_x) in zip(*places, strict=True):
        hue = round(360 * (0.7 * x / widths[0] + 0.3 * y / height)) % 360
        color = f"hsl({hue}, 90%, 50%)"
        draw.line((x, y, other_x, other_y), fill=color, width=2)
        for dot_y, dot_x in ((y, x), (other_y, other_x)):
            box = (dot_x - _DOT_PX, dot_y - _DOT_PX, dot_x + _DOT_PX, dot_y + _DOT_PX)
            draw.ellipse(box, fill=color, outline="white")
    return picture
