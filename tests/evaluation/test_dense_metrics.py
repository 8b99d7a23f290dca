"""Metrics of segmentation and tracking against scikit-learn, SciPy and hand-computed values."""

import numpy as np
import pytest
from scipy import ndimage
from sklearn.metrics import jaccard_score

from perception_rt.evaluation.metrics.segmentation import class_overlaps, mean_iou, pixel_accuracy
from perception_rt.evaluation.metrics.tracking import (
    contour,
    contour_accuracy,
    dilated,
    region_similarity,
)


def blobs(rng: np.random.Generator, shape: tuple[int, int], sigma: float = 2.0) -> np.ndarray:
    """Smooth random regions, bool."""
    return ndimage.gaussian_filter(rng.normal(size=shape), sigma) > 0.02


def test_mean_iou_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        expected = rng.integers(0, 5, (3, 9, 7)).astype(np.uint8)
        predicted = np.where(rng.random(expected.shape) < 0.6, expected, 4 - expected)
        expected[rng.random(expected.shape) < 0.1] = 255
        pairs = zip(predicted.astype(np.uint8), expected, strict=True)
        both, either = map(np.stack, zip(*(class_overlaps(*p, 6, 255) for p in pairs), strict=True))
        counted = expected != 255
        right, answered = expected[counted], predicted[counted]
        value = jaccard_score(right, answered, average="macro", labels=np.unique(right))
        assert mean_iou(both, either) == pytest.approx(value, abs=1e-12)
        pixels = counted.sum(axis=(1, 2)).astype(np.float64)
        assert pixel_accuracy(both, pixels) == pytest.approx((right == answered).mean())


def test_mean_iou_by_hand_adds_pixels_of_all_images() -> None:
    # Class 0: 1 of 2, then 8 of 8 pixels: 9 of 10. Class 1: 1 of 2. Class 2 does not occur.
    both, either = np.array([[1.0, 1, 0], [8, 0, 0]]), np.array([[2.0, 2, 0], [8, 0, 0]])
    assert mean_iou(both, either) == pytest.approx((0.9 + 0.5) / 2)
    assert mean_iou(np.zeros((1, 2)), np.zeros((1, 2))) == 0


def davis_f(predicted: np.ndarray, expected: np.ndarray) -> float:
    """F by SciPy: contours from shifted regions, a disc as structure, as DAVIS's evaluation."""

    def edges(region: np.ndarray) -> np.ndarray:
        filled = region.astype(int)
        right = ndimage.shift(filled, (0, -1), order=0, mode="nearest")
        below = ndimage.shift(filled, (-1, 0), order=0, mode="nearest")
        both = ndimage.shift(filled, (-1, -1), order=0, mode="nearest")
        return (filled != right) | (filled != below) | (filled != both)

    reach = int(np.ceil(0.008 * np.linalg.norm(expected.shape)))
    y, x = np.ogrid[-reach : reach + 1, -reach : reach + 1]
    disc = x**2 + y**2 <= reach**2
    found, right = edges(predicted), edges(expected)
    if found.sum() == 0 or right.sum() == 0:
        return float(found.sum() == right.sum())
    precision = (found & ndimage.binary_dilation(right, disc)).sum() / found.sum()
    recall = (right & ndimage.binary_dilation(found, disc)).sum() / right.sum()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@pytest.mark.parametrize("shape", [(40, 60), (120, 213), (3, 200), (1, 1)])
def test_contour_accuracy_equals_scipy(shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(shape)
    for _ in range(10):
        expected = blobs(rng, shape)
        predicted = np.roll(expected, int(rng.integers(-4, 5)), axis=1) ^ blobs(rng, shape, 1.0)
        assert contour_accuracy(predicted, expected) == pytest.approx(
            davis_f(predicted, expected), abs=1e-12
        )


def test_dilation_by_a_disc_equals_scipy() -> None:
    rng = np.random.default_rng(1)
    for radius in range(6):
        points = rng.random((20, 31)) < 0.03
        y, x = np.ogrid[-radius : radius + 1, -radius : radius + 1]
        disc = x**2 + y**2 <= radius**2
        assert (dilated(points, radius) == ndimage.binary_dilation(points, disc)).all()


def test_tracking_metrics_by_hand() -> None:
    square = np.zeros((100, 100), bool)
    square[20:40, 20:40] = True
    moved = np.roll(square, 10, axis=1)
    nothing = np.zeros_like(square)
    assert region_similarity(square, moved) == pytest.approx(200 / 600)
    assert region_similarity(nothing, nothing) == contour_accuracy(nothing, nothing) == 1
    assert region_similarity(nothing, square) == contour_accuracy(nothing, square) == 0
    # The tolerance is 2 pixels of 100 x 100: a shift by 2 costs nothing, one by 3 does.
    assert contour_accuracy(np.roll(square, 2, axis=1), square) == 1
    assert contour_accuracy(np.roll(square, 3, axis=1), square) < 1
    # Its right and lower edges inside (39), and its left and upper edges outside (41).
    assert contour(square).sum() == 80
