"""Predictable outputs without an engine, a function of each input row alone.

The test double of everything above a session: equal inputs give equal outputs in any batch, and
different inputs give different ones. It has nothing to do with the model's real outputs.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.reader import Package

Array = np.ndarray[Any, Any]


class ReferenceEngine:
    """Draws each output row from a generator seeded by a hash of the input row."""

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = spec

    def run(self, inputs: Mapping[str, Array], outputs: Sequence[str]) -> list[Array]:
        """float32 in (-1, 1), of the spec's shapes."""
        (source,) = inputs.values()
        specs = [self._spec.output(name) for name in outputs]
        return [np.stack([_row(row, spec) for row in source]) for spec in specs]

    def close(self) -> None:
        """Nothing to free."""


def check_device(device: str) -> None:
    """Every device will do: none is used."""


def open_session(
    package: Package, graph: str, *, device: str, threads: int | None
) -> ReferenceEngine:
    """Opens any package; `device` and `threads` are accepted and mean nothing."""
    return ReferenceEngine(package.manifest.content.graphs[graph])


def _row(row: Array, spec: TensorSpec) -> Array:
    digest = hashlib.sha256(spec.name.encode() + np.ascontiguousarray(row).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    shape = [size for size in spec.shape[1:] if isinstance(size, int)]
    return rng.uniform(-1, 1, shape).astype(np.float32)
