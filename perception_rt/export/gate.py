"""The gate: the staged package through the real runtime against eager, and its latency."""

import itertools
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import BackendError, CapacityError
from perception_rt.export.fidelity import Fidelity
from perception_rt.export.plm_decoder import GATE_STEPS
from perception_rt.export.profiles import has_engine
from perception_rt.export.towers import Reference
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec
from perception_rt.package.reader import Package, open_package
from perception_rt.runtime.cuda import open_cuda
from perception_rt.runtime.kv_block import CacheBlock, CacheShape, States
from perception_rt.runtime.session import MakeBlock, Session, block_maker, open_session
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_LATENCY_BUDGET_S = 1.0
_LATENCY_RUNS = 9


def run_gate(
    directory: Path, references: Sequence[Reference], *, device: str = "cpu"
) -> tuple[dict[str, Fidelity], dict[str, Any]]:
    """Runs every graph of a sealed package on the CPU, or every engine on the GPU.

    One is open at a time.

    A decoder's parts form a chain: each is fed with what the engine before it gave, first most of
    the prompt at once, then the last tokens one by one, over a cache that is updated in place.

    Returns:
        Fidelity by "graph.output", and latency by graph: of batch 1, or of a decoder's step.
    """
    fidelity: dict[str, Fidelity] = {}
    latency: dict[str, Any] = {}
    chained: Arrays = {}
    with open_package(directory) as package:
        for reference in references:
            for graph, expected in reference.outputs.items():
                if not expected or (device != "cpu" and not has_engine(graph)):
                    continue
                inputs = reference.inputs[graph]
                session = _open(package, graph, device)
                if graph.startswith(contract.DECODER):
                    make = block_maker(_backend(package, device), device) or CacheBlock
                    chained = _decode(session, chained or inputs, latency, graph, make)
                    arrays = chained
                else:
                    found = session.run(inputs, list(expected))
                    arrays = dict(zip(expected, found, strict=True))
                    latency[graph] = _latency(session, inputs, list(expected))
                session.close()
                for name, eager in expected.items():
                    fidelity[f"{graph}.{name}"] = Fidelity.compare(arrays[name], eager)
                if contract.HIDDEN_OUT in arrays:
                    chained = {contract.HIDDEN: arrays[contract.HIDDEN_OUT]}
    return fidelity, latency


def gpu_capability() -> str | None:
    """That of the GPU that is here, as in "sm89"; None if there is none to run on."""
    try:
        return open_cuda().capability
    except (BackendError, CapacityError):
        return None


def _backend(package: Package, device: str) -> str:
    target = get_target(package.manifest.content.target.backend)
    return target.graph_backend if device == "cpu" else target.name


def _open(package: Package, graph: str, device: str) -> Session:
    backend = _backend(package, device)
    return open_session(package, graph, backend=backend, device=device, threads=None)


def _decode(
    session: Session,
    inputs: Arrays,
    latency: dict[str, Any],
    graph: str,
    make_block: MakeBlock,
) -> Arrays:
    """A part's output over the whole prompt, or the logits of its last GATE_STEPS + 1 tokens."""
    hidden = inputs[contract.HIDDEN]
    tokens = hidden.shape[1]
    state = _caches(session.spec, tokens, make_block)
    first = max(1, tokens - GATE_STEPS)
    # The prompt in pieces, as the scheduler has it: an engine's profiles are made for them.
    edges = [*range(0, first, contract.CHUNK_TOKENS), *range(first, tokens + 1)]
    pieces, seconds = [], []
    for start, stop in itertools.pairwise(edges):
        feed = {
            contract.HIDDEN: np.ascontiguousarray(hidden[:, start:stop]),
            contract.PAST_LENGTHS: np.asarray([start], np.int32),
        }
        if _is_last(session.spec):
            feed[contract.LOGIT_POSITIONS] = np.asarray([[stop - start - 1]], np.int64)
        output = contract.LOGITS if _is_last(session.spec) else contract.HIDDEN_OUT
        began = time.perf_counter()
        pieces.append(session.run(feed, [output], state)[0])
        seconds.append(time.perf_counter() - began)
    steps = tokens - first
    latency[graph] = {
        "prompt_tokens": first,
        "prompt_ms": round(sum(seconds[: len(seconds) - steps]) * 1e3, 2),
        "step_median_ms": round(float(np.median(seconds[len(seconds) - steps :])) * 1e3, 2),
        "runs": steps,
    }
    kept = pieces[-(steps + 1) :] if _is_last(session.spec) else pieces
    return {output: np.concatenate(kept, axis=1)}


def _is_last(spec: GraphSpec) -> bool:
    return any(output.name == contract.LOGITS for output in spec.outputs)


def _caches(spec: GraphSpec, slots: int, make_block: MakeBlock) -> States:
    """Empty caches of one sequence, by input name."""
    names = [source.name for source in spec.inputs if contract.is_cache(source.name)]
    first = next(source for source in spec.inputs if source.name in names)
    _, kv_heads, fixed, head_dim = first.shape
    assert isinstance(kv_heads, int) and isinstance(head_dim, int)
    shape = CacheShape(
        layers=len(names) // 2, kv_heads=kv_heads, head_dim=head_dim, dtype=first.dtype
    )
    block = make_block(shape, 1, fixed if isinstance(fixed, int) else slots)
    return States(zip(names, [*block.keys, *block.values], strict=True))


def _latency(session: Session, inputs: Arrays, outputs: Sequence[str]) -> dict[str, float | int]:
    """Median milliseconds of batch 1 over up to 9 runs in about a second."""
    feed = {name: array[:1] for name, array in inputs.items()}
    times: list[float] = []
    while len(times) < _LATENCY_RUNS and sum(times) < _LATENCY_BUDGET_S:
        start = time.perf_counter()
        session.run(feed, outputs)
        times.append(time.perf_counter() - start)
    return {"median_ms": round(float(np.median(times)) * 1e3, 2), "runs": len(times)}
