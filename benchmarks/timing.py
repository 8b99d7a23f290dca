"""Times calls and compares their outputs, for any model and backend."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from perception_rt.memory import peak_rss_bytes

Array = np.ndarray[Any, Any]

WARM_UP_CALLS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Samples:
    """Measurements of one row at one batch size, in one process.

    Attributes:
        ms: milliseconds of each timed call, in order.
        cosine: lowest cosine with the reference of any image in any call, warm-up included.
        peak_rss_bytes: the process's peak resident memory so far.
    """

    ms: list[float]
    cosine: float
    peak_rss_bytes: int


def measure(
    run: Callable[[Array], Array], inputs: Array, reference: Array, *, batch: int, repeats: int
) -> Samples:
    """Times `run` on successive batches of `inputs`, after two untimed calls.

    Args:
        run: inputs (batch, ...) -> outputs (batch, ..., D).
        inputs: (N, ...); each call takes the next `batch` inputs, cyclically.
        reference: (N, ..., D), the expected output of each input up to its length.
        batch: inputs per call, at least 1.
        repeats: timed calls, at least 1.
    """
    times, cosines = [], []
    for call in range(WARM_UP_CALLS + repeats):
        indices = (call * batch + np.arange(batch)) % len(inputs)
        part = np.ascontiguousarray(inputs[indices])
        start = time.perf_counter()
        output = run(part)
        times.append((time.perf_counter() - start) * 1e3)
        cosines.append(least_cosine(output, reference[indices]))
    return Samples(ms=times[WARM_UP_CALLS:], cosine=min(cosines), peak_rss_bytes=peak_rss_bytes())


def least_cosine(a: Array, b: Array) -> float:
    """Lowest cosine between the rows of two arrays of the same shape (..., D)."""
    assert a.shape == b.shape
    a, b = a.astype(np.float64), b.astype(np.float64)
    norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
    cosines: Array = (a * b).sum(axis=-1) / norms
    return float(cosines.min())


def percentile(samples: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 to 100, interpolated between samples."""
    return float(np.percentile(samples, q))
