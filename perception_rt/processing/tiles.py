"""Cuts images into the tiles of a language model: a thumbnail, then a canvas of square tiles.

The canvas is chosen as in the reference, in the same floating-point arithmetic.

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
from perception_rt.processing.image_options import DEFAULT_IMAGE_OPTIONS, ImageOptions
from perception_rt.records import Record, check_choice, check_integer

TileMode: TypeAlias = Literal["vanilla", "thumb+tile"]

_MOST = {"tile_size": 8192, "max_tiles": 1024, "max_frames": 1024}
_MAX_PIXELS = 2**27  # of all tiles of an image or all frames of a video, 3 bytes each


@dataclass(frozen=True, slots=True, kw_only=True)
class TileSpec(Record):
    """Image and video preprocessing of a language model.

    The released models use tiles of 448 pixels and the defaults.

    Attributes:
        tile_size: side of a tile or video frame in pixels.
        max_tiles: most tiles of an image's canvas, without the thumbnail.
        mode: "thumb+tile" makes a thumbnail and a canvas, "vanilla" only the thumbnail.
        max_frames: most frames of a video.
        interpolation: name of Pillow's antialiased filter.
        mean: per channel, subtracted from pixels in [0, 1].
        std: per channel, divides the difference.
        exif_orientation: whether images are turned upright by their EXIF orientation, which the
            reference ignores.
    """

    tile_size: int
    max_tiles: int = 36
    mode: TileMode = "thumb+tile"
    max_frames: int = 32
    interpolation: Interpolation = "bicubic"
    mean: tuple[float, float, float] = (0.5, 0.5, 0.5)
    std: tuple[float, float, float] = (0.5, 0.5, 0.5)
    exif_orientation: bool = True

    record_name: ClassVar[str] = "image"

    def __post_init__(self) -> None:
        for name, most in _MOST.items():
            value = check_integer(f"image.{name}", getattr(self, name), 1, most)
            object.__setattr__(self, name, value)
        check_choice("image.mode", self.mode, get_args(TileMode))
        pixels = self.tile_size**2 * max(self.max_tiles + 1, self.max_frames)
        if pixels > _MAX_PIXELS:
            raise InputError(
                f"image: {self.max_tiles} tiles or {self.max_frames} frames of {self.tile_size} "
                f"pixels a side are {pixels} pixels; the limit is {_MAX_PIXELS}"
            )
        checked = self.tile  # ImageSpec checks the other fields
        object.__setattr__(self, "mean", checked.mean)
        object.__setattr__(self, "std", checked.std)

    @property
    def tile(self) -> ImageSpec:
        """Preprocessing of one tile, thumbnail or frame."""
        return ImageSpec(
            height=self.tile_size,
            width=self.tile_size,
            interpolation=self.interpolation,
            mean=self.mean,
            std=self.std,
            exif_orientation=self.exif_orientation,
        )


def load_tiles(
    source: ImageSource,
    spec: TileSpec,
    *,
    max_tiles: int | None = None,
    limits: Limits = DEFAULT_LIMITS,
    options: ImageOptions = DEFAULT_IMAGE_OPTIONS,
) -> NDArray[np.uint8]:
    """Decodes one image and cuts it into tiles.

    Squashes the image to one tile, the thumbnail. In mode "thumb+tile", also squashes it to the
    canvas that `choose_canvas` chooses, and cuts that row by row.

    Args:
        source: as for `decode_image`.
        spec: preprocessing of the model.
        max_tiles: a lower limit than the spec's for this image. As in the reference, it counts
            tiles of the canvas, so up to `max_tiles + 1` tiles return. 1 gives the thumbnail twice,
            as in the reference; 0 gives it once, as mode "vanilla" does.
        limits: bounds on encoded bytes, sides and pixels.
        options: further formats, and the colour behind transparent pixels.

    Returns:
        uint8 (n, S, S, 3), thumbnail first; `normalize` takes it with `spec.tile`.

    Raises:
        InputError: `max_tiles` is not an integer from 0 to `spec.max_tiles`, or as `decode_image`.
    """
    if max_tiles is None:
        max_tiles = spec.max_tiles
    max_tiles = check_integer("max_tiles", max_tiles, 0, spec.max_tiles)
    image = decode_image(source, limits=limits, options=options, upright=spec.exif_orientation)
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
    # (rows * columns, S, S, 3) -> (rows, columns, S, S, 3), a view of the result.
    grid = tiles[1:].reshape(rows, columns, side, side, 3)
    # (rows * S, columns * S, 3) -> (rows, columns, S, S, 3).
    grid[:] = canvas.reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return tiles


def choose_canvas(width: int, height: int, *, tile_size: int, max_tiles: int) -> tuple[int, int]:
    """Chooses the grid of tiles to which the reference squashes an image.

    Among canvases that are at least as wide and as high as the image, chooses the one on which the
    image, scaled to fit at its own aspect ratio, has the longest short side; usually the largest.
    If the image exceeds all canvases, chooses the largest canvas of the nearest aspect ratio: not
    above the image's own for a landscape or square image, above it for a portrait image.

    Args:
        width: image width in pixels.
        height: image height in pixels.
        tile_size: side of a tile in pixels.
        max_tiles: most tiles of the canvas.

    Returns:
        (columns, rows), with 1 <= columns * rows <= max_tiles.

    Raises:
        InputError: a number is not an integer of at least 1, or is too large.
    """
    sizes = {"width": width, "height": height, "tile_size": tile_size, "max_tiles": max_tiles}
    for name, value in sizes.items():
        check_integer(name, value, 1, _MOST.get(name, 2**31))
    best, best_side = None, -1
    for canvases in canvases_by_ratio(max_tiles).values():
        for canvas in canvases:
            room = canvas[0] * tile_size, canvas[1] * tile_size
            if room[0] >= width and room[1] >= height:
                side = _fitted_short_side(width, height, *room)
                if side >= best_side:  # among equals the last one, as in the reference
                    best, best_side = canvas, side
    return best or _nearest_canvas(width / height, max_tiles)


@lru_cache(maxsize=64)
def canvases_by_ratio(max_tiles: int) -> dict[float, list[tuple[int, int]]]:
    """Returns all canvases (columns, rows) by aspect ratio, in the reference's order.

    The canvases of a ratio are in order of decreasing size.
    """
    found: dict[float, list[tuple[int, int]]] = {}
    for tiles in range(max_tiles, 0, -1):
        for columns in range(1, tiles + 1):
            if tiles % columns == 0:
                rows = tiles // columns
                found.setdefault(columns / rows, []).append((columns, rows))
    return found


def _fitted_short_side(width: int, height: int, room_width: int, room_height: int) -> int:
    """Short side of an image that is scaled to fit, rounded down as in the reference."""
    scale = width / height
    factor = min(room_width / width, room_height / height)
    if scale >= 1:
        return math.floor(factor * width / scale)
    return math.floor(factor * height * scale)


def _nearest_canvas(ratio: float, max_tiles: int) -> tuple[int, int]:
    """The largest canvas of the nearest ratio: below a landscape's, above a portrait's."""
    canvases = canvases_by_ratio(max_tiles)
    nearest = (
        max(r for r in canvases if r <= ratio)
        if ratio >= 1
        else min(r for r in canvases if r > ratio)
    )
    return canvases[nearest][0]
