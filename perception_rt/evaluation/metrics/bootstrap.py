"""Percentile bootstrap: the spread of a figure over data sets drawn from the items at hand."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from numpy.typing import NDArray

Float64 = NDArray[np.float64]
Columns = Mapping[str, Float64]
Interval = tuple[float, float]

RESAMPLES = 1000
LEVEL = 0.95
SEED = 0


def bootstrap_intervals(
    computes: list[Callable[[Columns], float]], columns: Columns, others: Columns | None = None
) -> list[Interval]:
    """Bootstrap interval of each of some figures, at `LEVEL`.

    Items are drawn with repetition, `RESAMPLES` times, by a generator with a fixed seed: the same
    items give the same intervals.

    Args:
        computes: the figures of a set of items.
        columns: figures of the items by name, (N,) or (N, K).
        others: columns of the same items from another model, for the intervals of the others'
            figures minus these (paired: both are computed from the same drawn items).

    Returns:
        Lower and upper bound of each figure.
    """
    values = np.empty((RESAMPLES, len(computes)))
    for row, drawn in zip(values, _draws(columns), strict=True):
        own = _rows(columns, drawn)
        row[:] = [compute(own) for compute in computes]
        if others is not None:
            theirs = _rows(others, drawn)
            row[:] = [compute(theirs) for compute in computes] - row
    tail = 50 * (1 - LEVEL)
    low, high = np.percentile(values, [tail, 100 - tail], axis=0)
    return list(zip(low.tolist(), high.tolist(), strict=True))


def _draws(columns: Columns) -> Iterator[NDArray[np.int64]]:
    """Indices of the items of each resample."""
    count = len(next(iter(columns.values())))
    generator = np.random.default_rng(SEED)
    for _ in range(RESAMPLES):
        yield generator.integers(count, size=count)


def _rows(columns: Columns, indices: NDArray[np.int64]) -> Columns:
    return {name: column[indices] for name, column in columns.items()}
