"""Draws dense features: their first three principal components as colours; and attention maps."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

_HEIGHT_PX = 448
_GAP_PX = 8


def principal_colors(dense: Array) -> Array:
    """Maps dense features to colours by their first three principal components.

    Args:
        dense: float (N, h, w, C); all N images share one basis and one scale.

    Returns:
        uint8 (N, h, w, 3). Each component is stretched from its 1st to its 99th percentile, and its
        largest loading is positive, so that the picture is reproducible.
    """
    *shape, channels = dense.shape
    x = dense.reshape(-1, channels).astype(np.float64)  # (N * h * w, C)
    x -= x.mean(axis=0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    largest = axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)]
    values = x @ (axes * np.where(largest < 0, -1.0, 1.0)[:, None]).T
    low, high = np.percentile(values, [1, 99], axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-12)
    colors = np.zeros((len(x), 3), np.uint8)
    colors[:, : len(axes)] = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    return colors.reshape(*shape, 3)


def heat_colors(weights: Array) -> Array:
    """Maps weights (h, w) from 0 to their largest to black, red, yellow and white: (h, w, 3)."""
    share = weights / max(float(weights.max()), 1e-12)
    heat = (3 * share[..., None] - np.arange(3)).clip(0, 1)  # (h, w, 3)
    return (heat * 255).round().astype(np.uint8)


def side_by_side(image: Image.Image, dense: Array) -> Image.Image:
    """Draws an image and, right of it, its features (h, w, C), each 448 pixels high."""
    return beside(image, principal_colors(dense[None])[0])


def beside(
    image: Image.Image, colors: Array, *, height: int = _HEIGHT_PX, smooth: bool = False
) -> Image.Image:
    """Draws an image and, right of it, the colours of its patches.

    Args:
        image: the image, RGB.
        colors: uint8 (h, w, 3).
        height: height of the result in pixels.
        smooth: interpolate between patches.
    """
    width = max(1, min(4 * height, round(height * image.width / image.height)))
    size = (width, height)
    patches = Image.Resampling.BICUBIC if smooth else Image.Resampling.NEAREST
    picture = Image.new("RGB", (2 * width + _GAP_PX, height), "white")
    picture.paste(image.resize(size, Image.Resampling.BICUBIC), (0, 0))
    picture.paste(Image.fromarray(colors).resize(size, patches), (width + _GAP_PX, 0))
    return picture


def stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    """Draws pictures below each other."""
    height = sum(picture.height + _GAP_PX for picture in pictures) - _GAP_PX
    sheet = Image.new("RGB", (max(picture.width for picture in pictures), height), "white")
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height + _GAP_PX
    return sheet
