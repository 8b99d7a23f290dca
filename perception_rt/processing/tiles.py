"""Images of any size to the tiles of a language model: a thumbnail, then a canvas cut in squares.

The canvas is the reference's choice, in its own floating-point arithmetic, from widths and heights
alone. Knows the geometry of tiles and nothing of tokens; `image.py` decodes and normalises.

Legend: n tiles, S tile side in pixels.
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, TypeAlias, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.image import (
    ImageSource,
    ImageSpec,
    Interpolation,
    decode_image,
    resize_image,
)
from perception_rt.records import Record, check_choice, check_integer

TileMode: TypeAlias = Literal["vanilla", "thumb+tile"]

_MOST = {"tile_size": 8192, "max_tiles": 1024, "max_frames": 1024}
_MAX_PIXELS = 2**27  # of all tiles or frames of one image or video together, 3 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec(Record):
    """How a language model wants images and videos. The released models use the defaults at 448.

    Attributes:
        tile_size: side of a tile and of a video frame, in pixels.
        max_tiles: tiles that an image's canvas is cut into at most; the thumbnail is not counted.
        mode: "thumb+tile" makes a thumbnail and the tiles of a canvas, "vanilla" the thumbnail.
        max_frames: frames taken from a video at most.
        interpolation: Pillow's antialiased filter of that name.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, what the difference is divided by.
    """

    tile_size: int
    max_tiles: int = 36
    mode: TileMode = "thumb+tile"
    max_frames: int = 32
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)

    record_name: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            check_integer(f"image.{name}", getattr(self, name), 1, most)
        check_choice("image.mode", self.mode, get_args(TileMode))
        pixels = self.tile_size**2 * max(self.max_tiles + 1, self.max_frames)
        if pixels > _MAX_PIXELS:
            raise InputError(
                f"image: {self.max_tiles} tiles or {self.max_frames} frames of {self.tile_size} "
                f"pixels a side are {pixels} pixels; the limit is {_MAX_PIXELS}"
            )
        checked = self.tile  # an ImageSpec, which checks the other fields
        object.__setattr__(self, "mean", checked.mean)
        object.__setattr__(self, "std", checked.std)

    @property
    def tile(self) -> ImageSpec:
        """How one tile, thumbnail or frame is made and normalised."""
        return ImageSpec(
            height=self.tile_size,
            width=self.tile_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
        )


def load_tiles(
    source: ImageSource,
    spec: TileSpec,
    *,
    max_tiles: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
) -> NDArray[np.uint8]:
    """Decodes one image and cuts it into tiles.

    The image is squashed to one tile, the thumbnail, and in mode "thumb+tile" also to the canvas
    that `choose_canvas` picks, which is cut row by row.

    Args:
        source: as `decode_image` takes it.
        spec: the model's.
        max_tiles: a tighter budget than the spec's for this image. As in the reference it counts
            tiles of the canvas, so that up to `max_tiles + 1` come back: with 1 the thumbnail is
            followed by its copy, as the reference does it, and with 0 it is alone, as in mode
            "vanilla".
        limits: bounds on encoded bytes, sides and pixels.

    Returns:
        uint8 (n, S, S, 3), thumbnail first; `normalize` of it with `spec.tile` is what the
        reference feeds to its vision tower.

    Raises:
        InputError: the budget is not an integer from 0 to `spec.max_tiles`, or as `decode_image`.
    """
    if max_tiles is None:
        max_tiles = spec.max_tiles
    check_integer("max_tiles", max_tiles, 0, spec.max_tiles)
    image = decode_image(source, limits=limits)
    thumbnail = resize_image(image, spec.tile)
    if spec.mode == "vanilla" or max_tiles == 0:
        return thumbnail[None]
    columns, rows = choose_canvas(
        image.width, image.height, tile_size=spec.tile_size, max_tiles=max_tiles
    )
    side = spec.tile_size
    resample = Image.Resampling[spec.interpolation.upper()]
    canvas = np.asarray(image.resize((columns * side, rows * side), resample))
    tiles = np.empty((1 + rows * columns, side, side, 3), np.uint8)
    tiles[0] = thumbnail
    grid = tiles[1:].reshape(rows, columns, side, side, 3)  # a view
    grid[:] = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles


def choose_canvas(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """The grid of tiles that the reference squashes an image of this size to.

    Of the canvases that hold the image without making it smaller, it is the one on which the
    image, in its own aspect ratio, would have the longest short side: the largest, usually. If
    none holds it, it is the largest canvas of the nearest aspect ratio that is not above the
    image's own for a landscape or a square, and of the nearest that is above it for a portrait.

    Args:
        width: of the image, in pixels.
        height: of the image, in pixels.
        tile_size: side of a tile, in pixels.
        max_tiles: how many tiles the canvas may have.

    Returns:
        (columns, rows), with 1 <= columns * rows <= max_tiles.

    Raises:
        InputError: one of the numbers is not an integer of at least 1, or max_tiles is too large.
    """
    sizes = {"width": width, "height": height, "tile_size": tile_size, "max_tiles": max_tiles}
    for name, value in sizes.items():
        check_integer(name, value, 1, _MOST.get(name, 2**31))
    best, best_side = None, -1
    for canvases in _canvases(max_tiles).values():
        for canvas in canvases:
            room = canvas[0] * tile_size, canvas[1] * tile_size
            if room[0] >= width and room[1] >= height:
                side = _fitted_short_side(width, height, *room)
                if side >= best_side:  # the last of equals, as the reference
                    best, best_side = canvas, side
    return best or _nearest_canvas(width / height, max_tiles)


@lru_cache(maxsize=64)
def _canvases(max_tiles: int) -> dict[float, list[tuple[int, int]]]:
    """Every canvas (columns, rows) by its aspect ratio, both in the reference's order.

    The canvases of one ratio go from the largest to the smallest.
    """
    found: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(max_tiles, 0, -1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                rows = tiles // columns
                found.setdefault(columns / rows, []).append((columns, rows))
    return found


def _fitted_short_side(width: int, height: int, room_width: int, room_height: int) -> int:
    """Short side of an image scaled to fit, rounded down as the reference does."""
    scale = width / height
    factor = min(room_width / width, room_height / height)
    if scale >= 1:
        return math.floor(factor * width / scale)
    return math.floor(factor * height * scale)


def _nearest_canvas(ratio: float, max_tiles: int) -> tuple[int, int]:
    """The largest canvas of the ratio below a landscape's, or above a portrait's."""
    canvases = _canvases(max_tiles)
    nearest = (
        max(r for r in canvases if r <= ratio)
        if ratio >= 1
        else min(r for r in canvases if r > ratio)
    )
    return canvases[nearest][0]
