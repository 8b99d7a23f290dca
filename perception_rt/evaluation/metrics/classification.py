"""Metrics of classifications.

Legend: N items, C classes.
"""

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def label_ranks(scores: NDArray[np.floating], labels: Int64) -> Int64:
    """Number of classes before the right one, int64 (N,); 0 is a right answer.

    Args:
        scores: (N, C), higher is better; of equal scores, the lower class number comes first.
        labels: right class of each item, int64 (N,).
    """
    own = np.take_along_axis(scores, labels[:, None], axis=1)
    earlier = np.arange(scores.shape[1]) < labels[:, None]
    ranks: Int64 = ((scores > own) | ((scores == own) & earlier)).sum(axis=1)
    return ranks


def mean_per_class(values: Float64, labels: Float64 | Int64) -> float:
    """Mean over the classes of the mean value of a class's items, without classes without items.

    Args:
        values: (N,), such as 1 for a right answer and 0 for a wrong one.
        labels: class of each item, whole numbers (N,).
    """
    numbers = labels.astype(np.int64)
    counts = np.bincount(numbers)
    sums = np.bincount(numbers, weights=values)
    return float((sums[counts > 0] / counts[counts > 0]).mean())


def confusion_matrix(labels: Int64, predicted: Int64, classes: int) -> Int64:
    """Counts of items, int64 (C, C): rows are right classes, columns predicted ones."""
    counts = np.zeros((classes, classes), np.int64)
    np.add.at(counts, (labels, predicted), 1)
    return counts
