"""Masks of images: files with a number per pixel, their colours, and drawings over images.

Legend: H W size in pixels.
"""

import io
import os
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.files import open_regular_file, path_name

Mask = NDArray[np.uint8]

_NUMBERS = 256
_OPACITY = 0.55


def _palette() -> NDArray[np.uint8]:
    """The colours of PASCAL VOC's masks, (256, 3), by number.

    The number's bits, from its lowest, are in turn the highest bits of red, green and blue.
    """
    numbers = np.arange(_NUMBERS)
    colors = np.zeros((_NUMBERS, 3), np.uint8)
    for step in range(3):
        for channel in range(3):
            bit = numbers >> (3 * step + channel) & 1
            colors[:, channel] |= (bit << (7 - step)).astype(np.uint8)
    return colors


PALETTE = _palette()


def read_mask(path: str | os.PathLike[str]) -> Mask:
    """Reads a mask, uint8 (H, W): the grey value, or the number of the colour, of each pixel.

    Raises:
        InputError: the file is missing, too large or damaged, or is no PNG with 8 bits per pixel.
    """
    path, name = path_name(path, "mask")
    with open_regular_file(path, name) as file:
        data = file.read(DEFAULT_LIMITS.image_bytes + 1)
    if len(data) > DEFAULT_LIMITS.image_bytes:
        raise InputError(f"{name} has more than {DEFAULT_LIMITS.image_bytes} bytes")
    try:
        image = Image.open(io.BytesIO(data), formats=("PNG",))
        if image.width * image.height > DEFAULT_LIMITS.image_pixels:
            raise InputError(f"{name} has more than {DEFAULT_LIMITS.image_pixels} pixels")
        image.load()
    except InputError:
        raise
    except Exception:  # Pillow's decoders raise errors of many kinds
        raise InputError(f"{name} is damaged or is not a PNG file") from None
    if image.mode not in ("L", "P"):
        raise InputError(
            f"{name} has colours (mode {image.mode}); a mask is a PNG of 8 bits per pixel, grey or "
            "with a palette, whose values are the numbers"
        )
    return np.array(image, np.uint8)


def mask_image(mask: Mask) -> Image.Image:
    """A mask as a picture with the colours of `PALETTE`, mode P, which `read_mask` can read."""
    image = Image.fromarray(mask)
    image.putpalette(PALETTE.tobytes())
    return image


def overlay(image: Image.Image, mask: Mask) -> Image.Image:
    """Draws a mask over an image of mode RGB, at the mask's size; pixels of 0 stay as they are."""
    height, width = mask.shape
    pixels: NDArray[Any] = np.asarray(image.resize((width, height), Image.Resampling.BICUBIC))
    mixed = pixels + (PALETTE[mask] - pixels.astype(np.float32)) * np.float32(_OPACITY)
    shown = np.where((mask > 0)[:, :, None], mixed, pixels)
    return Image.fromarray(shown.round().astype(np.uint8))
