"""Metrics of retrieval between two sets, such as images and captions.

Legend: Q queries, G gallery items.
"""

import numpy as np
from numpy.typing import NDArray

Float32 = NDArray[np.float32]
Int64 = NDArray[np.int64]


def first_match_ranks(scores: Float32, query_keys: Int64, gallery_keys: Int64) -> Int64:
    """Number of gallery items before the first matching one, int64 (Q,).

    A query's recall at K is 1 if this is below K.

    Args:
        scores: (Q, G), higher is better; of equal scores, the earlier item comes first.
        query_keys: key of each query, (Q,); each occurs in the gallery.
        gallery_keys: key of each gallery item, (G,); items with a query's key match it.
    """
    ranks = np.empty(len(scores), np.int64)
    for query, (row, key) in enumerate(zip(scores, query_keys, strict=True)):
        matches = np.flatnonzero(gallery_keys == key)
        first = matches[row[matches].argmax()]  # the earliest of equal ones
        ranks[query] = (row > row[first]).sum() + (row[:first] == row[first]).sum()
    return ranks


def dual_softmax(scores: Float32) -> Float32:
    """Scores times their softmax over the queries, (Q, G).

    A gallery item that suits many queries loses against one that suits the query alone. This needs
    all queries at once, so the figures are not comparable with those of single queries.

    Args:
        scores: similarities times the model's logit scale, (Q, G).
    """
    exponentials = np.exp(scores - scores.max(axis=0, keepdims=True))
    weighted: Float32 = scores * (exponentials / exponentials.sum(axis=0, keepdims=True))
    return weighted
