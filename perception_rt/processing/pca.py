"""Draws dense features: their first three principal components as colours."""

from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Array = NDArray[Any]

_SIDE_PX = 448


def principal_colors(dense: Array) -> Array:
    """Maps dense features to colours by their first three principal components.

    Args:
        dense: float (h, w, C).

    Returns:
        uint8 (h, w, 3). Each component is stretched from its 1st to its 99th percentile, and its
        largest loading is positive, so that the picture is reproducible.
    """
    h, w, channels = dense.shape
    x = dense.reshape(-1, channels).astype(np.float64)  # (h * w, C)
    x -= x.mean(axis=0)
    _, _, axes = np.linalg.svd(x, full_matrices=False)
    axes = axes[:3]
    largest = axes[np.arange(len(axes)), np.abs(axes).argmax(axis=1)]
    values = x @ (axes * np.where(largest < 0, -1.0, 1.0)[:, None]).T
    low, high = np.percentile(values, [1, 99], axis=0)
    scaled = (values - low) / np.maximum(high - low, 1e-12)
    colors = np.zeros((h * w, 3), np.uint8)
    colors[:, : len(axes)] = (scaled.clip(0, 1) * 255).round().astype(np.uint8)
    return colors.reshape(h, w, 3)


def side_by_side(image: Image.Image, dense: Array) -> Image.Image:
    """Draws an image and, right of it, its features (h, w, C), each 448 pixels high."""
    colors = Image.fromarray(principal_colors(dense))
    width = max(1, min(4 * _SIDE_PX, round(_SIDE_PX * image.width / image.height)))
    size = (width, _SIDE_PX)
    picture = Image.new("RGB", (2 * width + 8, _SIDE_PX), "white")
    picture.paste(image.resize(size, Image.Resampling.BICUBIC), (0, 0))
    picture.paste(colors.resize(size, Image.Resampling.NEAREST), (width + 8, 0))
    return picture
