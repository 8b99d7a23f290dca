"""Fidelity of an engine's outputs to eager, and the limits of the export gate."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perception_rt.errors import ExportError

Array = np.ndarray[Any, Any]

# Least cosine of any row with eager float32, by a plan's `gate`. Random weights suffer more than
# trained ones in a decoder: in fp8, two layers of PLM-1B's shape reach 0.98 and all 28 of PLM-3B's
# 0.92, where the trained PLM-Demo reaches 0.99998. Four bits in every block are a coarse grid:
# PLM-1B's random weights reach 0.93, very narrow ones as little as 0.73. A wrong engine is near 0.
MIN_COSINE: Mapping[str, float] = {
    "fp32": 0.99999,
    "fp16": 0.9995,
    "int8": 0.995,
    "fp8": 0.998,
    "fp8 decoder": 0.85,
    "int4": 0.97,
    "int4 blocks": 0.7,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Fidelity:
    """Comparison of one output with eager.

    Attributes:
        cosine: smallest cosine of any row; a row is one embedding or one token.
        max_abs: largest absolute difference.
        scale: root mean square of eager's output, which puts `max_abs` into proportion.
    """

    cosine: float
    max_abs: float
    scale: float

    @classmethod
    def compare(cls, output: Array, eager: Array) -> "Fidelity":
        """Compares float arrays of the same shape (..., D)."""
        if output.shape != eager.shape:
            raise ExportError(f"the engine returned {output.shape}, eager {eager.shape}")
        a, b = output.astype(np.float64), eager.astype(np.float64)
        norms = np.linalg.norm(a, axis=-1) * np.linalg.norm(b, axis=-1)
        cosine = (a * b).sum(axis=-1) / np.maximum(norms, 1e-30)
        return cls(
            cosine=float(cosine.min()),
            max_abs=float(np.abs(a - b).max()),
            scale=float(np.sqrt((b * b).mean())),
        )

    def to_dict(self) -> dict[str, float]:
        """Plain JSON values, rounded."""
        return {
            "cosine": round(self.cosine, 8),
            "max_abs": float(f"{self.max_abs:.3g}"),
            "scale": float(f"{self.scale:.3g}"),
        }


def check_gate(results: Mapping[str, Fidelity], gate: Callable[[str], str]) -> None:
    """ExportError that names every output below its limit; NaN is below every limit.

    Args:
        results: fidelity by "graph.output".
        gate: returns the key in `MIN_COSINE` for such a name.
    """
    least = {name: MIN_COSINE[gate(name)] for name in results}
    failed = [
        f"{name} {result.cosine:.6f} (at least {least[name]} is required)"
        for name, result in results.items()
        if not result.cosine >= least[name]
    ]
    if failed:
        raise ExportError(
            f"the engine is not faithful to eager: cosine of {', '.join(failed)}. "
            "Nothing was published"
        )
