"""Metrics of segmentations: pixels of each class, and the mean intersection over union.

Legend: N images, C classes, H W size in pixels.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Mask = NDArray[np.uint8]


def class_overlaps(
    predicted: Mask, expected: Mask, classes: int, ignored: int
) -> tuple[Float64, Float64]:
    """Pixels in the intersection and in the union of each class, float64 (C) each.

    Args:
        predicted: class of each pixel, uint8 (H, W).
        expected: right class of each pixel, uint8 (H, W).
        classes: number of classes.
        ignored: pixels with this right class do not count.
    """
    counted = expected != ignored
    right, answered = expected[counted], predicted[counted]
    both = np.bincount(right[right == answered], minlength=classes)
    either = np.bincount(right, minlength=classes) + np.bincount(answered, minlength=classes) - both
    return both.astype(np.float64), either.astype(np.float64)


def mean_iou(intersections: Float64, unions: Float64) -> float:
    """Mean over the classes of the intersection over union of all pixels of a data set.

    Classes that neither the masks nor the predictions have are left out; 0 if that leaves none.

    Args:
        intersections: pixels of each image and class, (N, C).
        unions: pixels of each image and class, (N, C).
    """
    both, either = intersections.sum(axis=0), unions.sum(axis=0)
    present = either > 0
    return float((both[present] / either[present]).mean()) if present.any() else 0.0


def pixel_accuracy(intersections: Float64, pixels: Float64) -> float:
    """Share of right pixels.

    Args:
        intersections: right pixels of each image and class, (N, C).
        pixels: pixels of each image that count, (N,).
    """
    return float(intersections.sum() / max(pixels.sum(), 1.0))
