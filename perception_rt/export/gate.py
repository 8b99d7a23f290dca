"""The gate: the staged package through the real runtime against eager, and its latency."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.export.fidelity import Fidelity
from perception_rt.export.towers import Reference
from perception_rt.package.reader import open_package
from perception_rt.runtime.session import Session, open_session

Array = np.ndarray[Any, Any]

_LATENCY_BUDGET_S = 1.0
_LATENCY_RUNS = 9


def run_gate(
    directory: Path, references: Sequence[Reference]
) -> tuple[dict[str, Fidelity], dict[str, Any]]:
    """Runs every graph of a sealed package on the CPU, one open at a time.

    Returns:
        Fidelity by "graph.output", and batch-1 latency by graph.
    """
    fidelity: dict[str, Fidelity] = {}
    latency: dict[str, Any] = {}
    with open_package(directory) as package:
        backend = package.manifest.content.target.backend
        for reference in references:
            for graph, expected in reference.outputs.items():
                if not expected:
                    continue
                session = open_session(package, graph, backend=backend, device="cpu", threads=None)
                inputs = reference.inputs[graph]
                fidelity.update(_compare(session, graph, inputs, expected))
                latency[graph] = _latency(session, inputs, list(expected))
                session.close()
    return fidelity, latency


def _compare(session: Session, graph: str, inputs: Array, expected: Any) -> dict[str, Fidelity]:
    (source,) = session.spec.inputs
    arrays = session.run({source.name: inputs}, list(expected))
    return {
        f"{graph}.{name}": Fidelity.compare(array, expected[name])
        for name, array in zip(expected, arrays, strict=True)
    }


def _latency(session: Session, inputs: Array, outputs: Sequence[str]) -> dict[str, float | int]:
    """Median milliseconds of batch 1 over up to 9 runs in about a second."""
    (source,) = session.spec.inputs
    feed = {source.name: inputs[:1]}
    times: list[float] = []
    while len(times) < _LATENCY_RUNS and sum(times) < _LATENCY_BUDGET_S:
        start = time.perf_counter()
        session.run(feed, outputs)
        times.append(time.perf_counter() - start)
    return {"median_ms": round(float(np.median(times)) * 1e3, 2), "runs": len(times)}
