"""The export, from plan and weights to a published package.

Towers are handled one after the other and weights one tensor at a time, so that the peak is one
tower in eager, not the model several times over.
"""

import os
import platform
import resource
import time
from collections.abc import Callable, Mapping
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from perception_rt._version import __version__
from perception_rt.checkpoint.source import WeightSource
from perception_rt.errors import ExportError
from perception_rt.export.fidelity import MIN_COSINE, Fidelity, check_gate
from perception_rt.export.files import write_graphs
from perception_rt.export.gate import run_gate
from perception_rt.export.lowering import LoweredGraph, Lowering
from perception_rt.export.plan import ExportPlan
from perception_rt.export.quantize import MAX_LAYER_ERROR
from perception_rt.export.towers import Reference, Tower, towers
from perception_rt.package.contract import GraphSpec
from perception_rt.package.manifest import Content, Manifest, Target
from perception_rt.package.store import Stage
from perception_rt.processing.clip_bpe import MIN_CONTEXT, VOCAB_SIZE, TextSpec

Report = Callable[[str], None]


def export_package(
    plan: ExportPlan,
    source: WeightSource,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Exports a model and publishes it as the package directory `out`.

    Args:
        plan: what to make.
        source: the weights; read twice, tensor by tensor.
        out: must not exist, or be an empty directory, or a package that `force` may replace.
        force: replace an existing package.
        on_progress: called with a line for each step.

    Raises:
        ExportError: the destination is not usable, or the gate failed; nothing is published.
        CheckpointError: the weights are not usable.
    """
    report = on_progress or (lambda line: None)
    started = time.monotonic()
    lowering = _lowering(plan)
    graphs: dict[str, GraphSpec] = {}
    references: list[Reference] = []
    kept: dict[str, float] = {}
    with Stage.create(out, force=force) as stage:
        for tower in towers(plan, source):
            report(f"{tower.name}: running eager")
            reference = tower.reference(int8=plan.precision == "int8")
            references.append(reference)
            kept.update(_float_layers(reference.errors))
            report(f"{tower.name}: tracing and writing {plan.precision} graphs")
            lowered = _lower(tower, lowering, plan.precision, reference.errors)
            graphs |= write_graphs(stage, f"{tower.name}.data", lowered)
        content = _content(plan, source, stage, graphs, kept)
        stage.seal(Manifest.create(content, record={}), domains=plan.target.domains)
        report("comparing the package with eager")
        fidelity, latency = run_gate(stage.directory, references)
        check_gate(fidelity, plan.precision)
        record = _record(plan, fidelity, latency, kept, time.monotonic() - started)
        manifest = Manifest.create(content, record=record)
        stage.seal(manifest, domains=plan.target.domains)
        stage.publish()
    report(f"published {Path(out).name}, {manifest.id}")
    return manifest


def check_destination(out: str | os.PathLike[str], *, force: bool) -> None:
    """ExportError unless a package can be published as `out`; before weights are looked for."""
    Stage.create(out, force=force).discard()


def _lowering(plan: ExportPlan) -> type[Lowering]:
    module, _, name = plan.target.emitter.partition(":")
    kind: type[Lowering] = getattr(import_module(module), name)
    return kind


def _float_layers(errors: Mapping[str, float]) -> dict[str, float]:
    """The linear layers that int8 would hurt, with what it would do to them."""
    return {name: error for name, error in errors.items() if not error <= MAX_LAYER_ERROR}


def _lower(
    tower: Tower, lowering: type[Lowering], precision: str, errors: Mapping[str, float]
) -> dict[str, LoweredGraph]:
    traced, parameters = tower.traced()
    dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
    int8 = set(errors) - set(_float_layers(errors))
    graphs = {}
    for name, recipe in tower.recipes().items():
        instance = lowering(traced, parameters, dtype=dtype, int8=int8)
        graph = instance.lower(recipe.source, recipe.entry, recipe.outputs)
        fused = graph.count(lowering.attention_op)
        if fused != recipe.attentions:
            raise ExportError(
                f"graph {name!r} has {fused} {lowering.attention_op} operators, "
                f"not {recipe.attentions}: attention was not fused"
            )
        graphs[name] = graph
    return graphs


def _content(
    plan: ExportPlan,
    source: WeightSource,
    stage: Stage,
    graphs: Mapping[str, GraphSpec],
    kept: Mapping[str, float],
) -> Content:
    return Content(
        name=plan.name,
        family="pe",
        architecture=plan.config.to_dict(),
        target=Target(
            backend=plan.backend,
            precision=plan.precision,
            options={"taps": list(plan.tapped), "float_layers": sorted(kept)},
        ),
        image=plan.image.to_dict(),
        text=_text(plan, source),
        graphs=dict(graphs),
        files=dict(stage.entries),
        weights=dict(source.provenance),
        versions={
            "perception_rt": __version__,
            **{name: version(name) for name in ("onnx", "onnxscript", "torch")},
        },
    )


def _text(plan: ExportPlan, source: WeightSource) -> dict[str, Any] | None:
    text = plan.config.text
    if text is None:
        return None
    known = text.vocab_size == VOCAB_SIZE and text.context_length >= MIN_CONTEXT
    spec = TextSpec(
        tokenizer="clip_bpe" if known else None,
        context_length=text.context_length,
        logit_scale=float(source.load("logit_scale").float().exp().item()),
    )
    return spec.to_dict()


def _record(
    plan: ExportPlan,
    fidelity: Mapping[str, Fidelity],
    latency: Mapping[str, Any],
    kept: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "fidelity": {name: result.to_dict() for name, result in fidelity.items()},
        "gate": {"min_cosine": MIN_COSINE[plan.precision]},
        "int8_error": {name: float(f"{error:.3g}") for name, error in kept.items()},
        "latency": dict(latency),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
        "export": {"seconds": round(seconds, 1), "peak_rss_bytes": peak_kib * 1024},
    }
