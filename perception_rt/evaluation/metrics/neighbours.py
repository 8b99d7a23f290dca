"""Votes of the nearest neighbours.

Legend: N items, T training items, C classes.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Int64 = NDArray[np.int64]


def neighbour_votes(
    similarities: Float32, labels: Int64, classes: int, *, k: int, temperature: float
) -> Float64:
    """Sum of the votes of the nearest training items for each class, float64 (N, C).

    A neighbour's vote weighs exp(similarity / temperature), relative to the nearest one's. Dividing
    all votes of an item by the same number changes no answer.

    Args:
        similarities: cosines, (N, T).
        labels: class of each training item, int64 (T,).
        classes: number of classes.
        k: neighbours that vote, at most T; of equal cosines, the earlier item is nearer.
        temperature: above 0; a lower one favours the nearest neighbours.
    """
    votes = np.zeros((len(similarities), classes))
    for item, row in enumerate(similarities):
        nearest = np.argsort(-row, kind="stable")[:k]
        near = row[nearest].astype(np.float64)
        weights = np.exp((near - near[0]) / temperature)
        votes[item] = np.bincount(labels[nearest], weights=weights, minlength=classes)
    return votes
