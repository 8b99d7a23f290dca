"""Metrics of questions with the answers yes and no, as POPE defines them.

Legend: N items.
"""

import re

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]

_WORD = re.compile(r"[^\W\d_]+")


def yes_or_no(answer: str) -> str | None:
    """The first word of an answer in lower case if it is yes or no, else None."""
    found = _WORD.search(answer)
    word = "" if found is None else found[0].lower()
    return word if word in ("yes", "no") else None


def precision(answered: Float64, expected: Float64) -> float:
    """Share of the answers yes that are right; 0 if there are none.

    Args:
        answered: 1 for the answer yes, else 0, (N,).
        expected: 1 if yes is right, else 0, (N,).
    """
    return _share(answered * expected, answered)


def recall(answered: Float64, expected: Float64) -> float:
    """Share of the items with the right answer yes that got it; 0 if there are none."""
    return _share(answered * expected, expected)


def f1_score(answered: Float64, expected: Float64) -> float:
    """Harmonic mean of precision and recall of the answer yes."""
    return _share(2 * answered * expected, answered + expected)


def _share(part: Float64, whole: Float64) -> float:
    total = float(whole.sum())
    return float(part.sum()) / total if total else 0.0
