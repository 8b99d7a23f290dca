"""Converts Pillow images of any mode to RGB, and lays transparent ones over a background."""

import numpy as np
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.processing.image_options import RGB

_CONVERTIBLE = ("1", "L", "LA", "P", "PA", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB")


def check_mode(image: Image.Image, name: str) -> None:
    """InputError, starting with `name`, unless `to_rgb` can convert the image."""
    mode = image.mode
    if mode != "RGB" and mode not in _CONVERTIBLE and not _is_16_bit(image):
        raise InputError(f"{name} has mode {mode}; convert it to RGB first")


def to_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8-bit RGB. Alpha is dropped, and 16-bit samples keep their high byte."""
    if image.mode == "RGB":
        return image
    check_mode(image, "image")
    if _is_16_bit(image):
        return _high_bytes(image).convert("RGB")
    if "transparency" in image.info:  # Pillow would warn about a palette's transparency
        image = image.copy()
        del image.info["transparency"]
    return image.convert("RGB")


def resize_in_mode(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling
) -> Image.Image:
    """Resizes in the image's own mode, as the reference does.

    Pillow takes the nearest pixel of a palette and of two levels, and weights colours by their
    alpha.

    Args:
        image: an image that passed `check_mode`.
        size: width and height of the result.
        resample: filter for all modes that have one.
    """
    if image.mode == "PA":  # Pillow would interpolate between palette entries
        image = image.convert("RGBA")
    elif _is_16_bit(image) and image.mode != "I;16":  # another byte order, without a filter
        image = Image.fromarray(np.asarray(image).astype(np.uint16))
    return image.resize(size, resample)


def over_background(image: Image.Image, background: RGB) -> Image.Image:
    """Composites an image with transparency over a colour; returns any other image as it is.

    Args:
        image: an image that passed `check_mode`.
        background: the colour.

    Returns:
        RGB if the image has transparency.
    """
    if not image.has_transparency_data:
        return image
    if _is_16_bit(image):
        opaque = (np.asarray(image) != image.info["transparency"]).astype(np.uint8) * 255
        image = Image.merge("LA", (_high_bytes(image), Image.fromarray(opaque)))
    canvas = Image.new("RGBA", image.size, (*background, 255))
    return Image.alpha_composite(canvas, image.convert("RGBA")).convert("RGB")


def _is_16_bit(image: Image.Image) -> bool:
    return image.mode.startswith("I;16")


def _high_bytes(image: Image.Image) -> Image.Image:
    """Mode L; Pillow would clip at 255. Of 16-bit colour it keeps the high byte too."""
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
