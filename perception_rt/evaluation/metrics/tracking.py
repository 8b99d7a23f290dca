"""Region similarity J and contour accuracy F of masks, as DAVIS defines them.

Legend: H W size in pixels.
"""

import math

import numpy as np
from numpy.typing import NDArray

Region = NDArray[np.bool_]

_TOLERANCE = 0.008  # of the diagonal, by which contours may differ


def region_similarity(predicted: Region, expected: Region) -> float:
    """J: intersection over union of two regions, bool (H, W); 1 if both are empty."""
    union = np.count_nonzero(predicted | expected)
    return np.count_nonzero(predicted & expected) / union if union else 1.0


def contour_accuracy(predicted: Region, expected: Region) -> float:
    """F: F1 of the contours of two regions, bool (H, W), within a tolerance.

    Precision is the share of the predicted contour that is near the right one, recall the share of
    the right contour that is near the predicted one. Near is within 0.008 of the diagonal, rounded
    up to whole pixels. Two regions without contours have 1, one without has 0.
    """
    reach = math.ceil(_TOLERANCE * math.hypot(*expected.shape))
    found, right = contour(predicted), contour(expected)
    if not (found.any() or right.any()):
        return 1.0
    if not (found.any() and right.any()):
        return 0.0
    precision = np.count_nonzero(found & dilated(right, reach)) / np.count_nonzero(found)
    recall = np.count_nonzero(right & dilated(found, reach)) / np.count_nonzero(right)
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def contour(region: Region) -> Region:
    """Pixels that differ from the one to the right, below, or both, bool (H, W)."""
    padded = np.pad(region, ((0, 1), (0, 1)), mode="edge")
    right, below, diagonal = padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    edges: Region = (region != right) | (region != below) | (region != diagonal)
    return edges


def dilated(points: Region, radius: int) -> Region:
    """Pixels within a radius, in pixels, of a point of a set, bool (H, W)."""
    height, width = points.shape
    result = np.zeros_like(points)
    rows = min(radius, height - 1)
    for down in range(-rows, rows + 1):
        reach = math.isqrt(radius * radius - down * down)
        # Points in each row's window of 2 * reach + 1, by differences of running sums.
        padded = np.pad(points, ((0, 0), (reach + 1, reach)))
        sums = padded.cumsum(axis=1, dtype=np.int32)
        near = sums[:, 2 * reach + 1 :] > sums[:, :width]
        top, bottom = max(0, down), min(height, height + down)
        result[top:bottom] |= near[top - down : bottom - down]
    return result
