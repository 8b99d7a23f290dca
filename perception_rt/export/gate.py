"""The export gate: runs a staged package with the real runtime and compares it with eager."""

import itertools
import time
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt.errors import ExportError
from perception_rt.export.backends.tensorrt_profiles import has_engine, usual_sizes
from perception_rt.export.components.component import Reference
from perception_rt.export.components.plm_decoder import GATE_STEPS
from perception_rt.export.fidelity import Fidelity
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.package.reader import Package, open_package
from perception_rt.runtime.cache.kv_block import CacheBlock, States
from perception_rt.runtime.cuda import open_cuda
from perception_rt.runtime.session import MakeBlock, Session, block_maker, open_session
from perception_rt.targets import get_target

Array = np.ndarray[Any, Any]
Arrays = Mapping[str, Array]

_LATENCY_BUDGET_S = 1.0
_LATENCY_RUNS = 9


def run_gate(
    directory: Path, references: Sequence[Reference], *, device: str = "cpu"
) -> tuple[dict[str, Fidelity], dict[str, Any]]:
    """Runs every graph of a sealed package and compares its outputs with eager's.

    One graph is open at a time. The graphs of an encoder's blocks form a chain, in which each takes
    an output of the graph before it. So do a decoder's parts, first for most of the prompt at once,
    then for the last tokens one by one, with a cache that is updated in place.

    Args:
        directory: the sealed package.
        references: eager results, in the order of the decoder's parts.
        device: "cpu" runs the graphs, "cuda" the engines; each profile of an engine is compared,
            since each has kernels of its own.

    Returns:
        Fidelity by "graph.output"; latency by graph, for batch 1 or for a step of a decoder.
    """
    fidelity: dict[str, Fidelity] = {}
    latency: dict[str, Any] = {}
    chained: Arrays = {}
    passed: Arrays = {}
    with open_package(directory) as package:
        for reference in references:
            for graph, expected in reference.outputs.items():
                if not expected or (device != "cpu" and not has_engine(graph)):
                    continue
                inputs = reference.inputs.get(graph, passed)
                with closing(_open(package, graph, device)) as session:
                    if graph.startswith(contract.DECODER):
                        make = block_maker(_backend(package, graph, device), device) or CacheBlock
                        chained = _decode(session, chained or inputs, latency, graph, make)
                        found = {n: Fidelity.compare(chained[n], expected[n]) for n in expected}
                    else:
                        sizes = () if device == "cpu" else usual_sizes(graph)
                        feed = {spec.name: inputs[spec.name] for spec in session.spec.inputs}
                        found, passed = _compare(session, feed, expected, sizes)
                        latency[graph] = _latency(session, feed, list(expected))
                fidelity |= {f"{graph}.{name}": result for name, result in found.items()}
                if contract.HIDDEN_OUT in chained:
                    chained = {contract.HIDDEN: chained[contract.HIDDEN_OUT]}
    return fidelity, latency


def _compare(
    session: Session, inputs: Arrays, expected: Arrays, sizes: Sequence[int]
) -> tuple[dict[str, Fidelity], Arrays]:
    """The worst fidelity of each output over batches of these sizes; () for the inputs' own.

    Returns:
        Fidelity, and outputs for the inputs themselves, by output name.
    """
    worst: dict[str, Fidelity] = {}
    rows = len(next(iter(inputs.values())))
    outputs: dict[str, Array] = {}
    for size in sizes or [rows]:
        feed = {name: _repeated(array, size) for name, array in inputs.items()}
        for name, array in zip(expected, session.run(feed, list(expected)), strict=True):
            found = _fidelity(name, array, _repeated(expected[name], size))
            if name not in worst or not found.cosine >= worst[name].cosine:
                worst[name] = found
            outputs[name] = array[:rows]
    return worst, outputs


def _fidelity(name: str, output: Array, eager: Array) -> Fidelity:
    """Compares an output; a row of a pyramid's level is one position with all its channels."""
    if name in contract.LEVELS:
        output, eager = np.moveaxis(output, 1, -1), np.moveaxis(eager, 1, -1)
    return Fidelity.compare(output, eager)


def _repeated(rows: Array, size: int) -> Array:
    """The first `size` rows of the endlessly repeated array."""
    return rows[np.arange(size) % len(rows)]


def check_gpu() -> None:
    """BackendError or CapacityError unless engines can run on this machine's GPU."""
    open_cuda()


def _backend(package: Package, graph: str, device: str) -> str:
    target = get_target(package.manifest.content.backend_of(graph))
    return target.graph_backend if device == "cpu" else target.name


def _open(package: Package, graph: str, device: str) -> Session:
    backend = _backend(package, graph, device)
    return open_session(package, graph, backend=backend, device=device, threads=None)


def _decode(
    session: Session,
    inputs: Arrays,
    latency: dict[str, Any],
    graph: str,
    make_block: MakeBlock,
) -> Arrays:
    """Hidden states of the whole prompt, or logits of its last GATE_STEPS + 1 tokens."""
    hidden = inputs[contract.HIDDEN]
    tokens = hidden.shape[1]
    state = _caches(session.spec, tokens, make_block)
    first = max(1, tokens - GATE_STEPS)
    # In pieces as the scheduler feeds them, since an engine's profiles are made for those.
    edges = [*range(0, first, contract.CHUNK_TOKENS), *range(first, tokens + 1)]
    pieces, seconds = [], []
    given = {spec.name for spec in session.spec.outputs}
    picks = [name for name in (contract.TOP_LOGIT, contract.TOP_ID) if name in given]
    for start, stop in itertools.pairwise(edges):
        feed = {
            contract.HIDDEN: np.ascontiguousarray(hidden[:, start:stop]),
            contract.PAST_LENGTHS: np.asarray([start], np.int32),
        }
        if _is_last(session.spec):
            feed[contract.LOGIT_POSITIONS] = np.asarray([[stop - start - 1]], np.int64)
        output = contract.LOGITS if _is_last(session.spec) else contract.HIDDEN_OUT
        began = time.perf_counter()
        piece, *picked = session.run(feed, [output, *picks], state)
        seconds.append(time.perf_counter() - began)
        pieces.append(piece)
        if picked:
            check_picks(piece, *picked)
    steps = tokens - first
    latency[graph] = {
        "prompt_tokens": first,
        "prompt_ms": round(sum(seconds[: len(seconds) - steps]) * 1e3, 2),
        "step_median_ms": round(float(np.median(seconds[len(seconds) - steps :])) * 1e3, 2),
        "runs": steps,
    }
    kept = pieces[-(steps + 1) :] if _is_last(session.spec) else pieces
    return {output: np.concatenate(kept, axis=1)}


def check_picks(logits: Array, top: Array, ids: Array) -> None:
    """ExportError unless an engine's likeliest tokens agree with its logits.

    Args:
        logits: (1, L, V).
        top: largest logits, (1, L).
        ids: their tokens, (1, L).
    """
    theirs = np.take_along_axis(logits, ids[..., None], axis=-1)[..., 0]
    # One larger logit is allowed: the image token is never picked.
    above = (logits > top[..., None]).sum(axis=-1)
    if not (np.array_equal(theirs, top) and above.max() <= 1):
        raise ExportError(
            f"the engine's likeliest tokens {ids.ravel()[:4].tolist()} are not those of its logits"
        )


def _is_last(spec: GraphSpec) -> bool:
    return any(output.name == contract.LOGITS for output in spec.outputs)


def _caches(spec: GraphSpec, slots: int, make_block: MakeBlock) -> States:
    """Empty caches for one sequence, by input name."""
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
    """Median milliseconds for batch 1, of up to 9 runs within about a second."""
    feed = {name: array[:1] for name, array in inputs.items()}
    times: list[float] = []
    while len(times) < _LATENCY_RUNS and sum(times) < _LATENCY_BUDGET_S:
        start = time.perf_counter()
        session.run(feed, outputs)
        times.append(time.perf_counter() - start)
    return {"median_ms": round(float(np.median(times)) * 1e3, 2), "runs": len(times)}
