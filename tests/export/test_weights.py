"""Weights that are written piece by piece."""

from typing import Any

import numpy as np

from perception_rt.export.graph.lazy_weights import Weight

Array = np.ndarray[Any, Any]
FLOAT32 = np.dtype(np.float32)


def test_a_narrow_weight_reads_few_rows_of_a_wide_one_at_a_time() -> None:
    """Scales of a vocabulary are 1/32 of its width; reading all rows at once would take GB."""
    shape, read = (40_000, 1024), []

    def rows(start: int, stop: int) -> Array:
        read.append(stop - start)
        return np.broadcast_to(np.arange(start, stop, dtype=np.float32)[:, None], (stop - start, 1))

    table = Weight("table", FLOAT32, shape, lambda: rows(0, shape[0]), rows=rows)
    scale = table.derive_rows(".scale", lambda part: part[:, :1], (shape[0], 1), FLOAT32)
    pieces = [*scale.reshaped((shape[0], 1, 1)).pieces()]
    assert max(read) * shape[1] * 4 <= 64 * 2**20
    assert np.array_equal(np.concatenate(pieces).ravel(), np.arange(shape[0]))
