"""The export, from plan and weights to a published package.

Towers are handled one after the other and weights one tensor at a time, so that the peak is one
tower in eager, or one layer of a language model, not the model several times over.
"""

import os
import platform
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
from perception_rt.export.files import Place, write_graphs
from perception_rt.export.gate import run_gate
from perception_rt.export.lowering import LoweredGraph, Lowering
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.plm_towers import PlmExport
from perception_rt.export.quantize import MAX_LAYER_ERROR, Format
from perception_rt.export.towers import ModelExport, PeExport, Reference, Tower
from perception_rt.memory import peak_rss_bytes
from perception_rt.package.contract import GraphSpec
from perception_rt.package.manifest import Content, Manifest, Target
from perception_rt.package.store import Stage

Report = Callable[[str], None]


def export_package(
    plan: ExportPlan | PlmPlan,
    source: WeightSource,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Exports a model and publishes it as the package directory `out`.

    Args:
        plan: what to make.
        source: the weights; read a few times over, tensor by tensor.
        out: must not exist, or be an empty directory, or a package that `force` may replace.
        force: replace an existing package.
        on_progress: called with a line for each step.

    Raises:
        ExportError: the destination is not usable, or the gate failed; nothing is published.
        CheckpointError: the weights are not usable.
    """
    report = on_progress or (lambda line: None)
    started = time.monotonic()
    model: ModelExport = (
        PlmExport(plan, source) if isinstance(plan, PlmPlan) else PeExport(plan, source)
    )
    lowering = _lowering(plan)
    graphs: dict[str, GraphSpec] = {}
    places: dict[str, Place] = {}
    references: list[Reference] = []
    harmed: dict[str, float] = {}
    formats: dict[str, Format] = {}
    with Stage.create(out, force=force) as stage:
        for path, data in model.files().items():
            stage.write(path, [data])
        for tower in model.towers():
            report(f"{tower.name}: running eager")
            reference = tower.reference(quantized=plan.precision in ("int8", "int4"))
            references.append(reference)
            harmed |= _harmed_layers(reference.errors)
            chosen = tower.formats(reference.errors)
            formats |= chosen
            report(f"{tower.name}: tracing and writing {plan.precision} graphs")
            lowered = _lower(tower, lowering, plan.precision, chosen)
            graphs |= write_graphs(stage, f"{tower.name}.data", lowered, places)
        layers = {name: formats.get(name) for name in sorted(harmed)}
        content = _content(plan, model, stage, graphs, layers)
        stage.seal(Manifest.create(content, record={}), domains=plan.target.domains)
        report("comparing the package with eager")
        fidelity, latency = run_gate(stage.directory, references)
        check_gate(fidelity, plan.gate)
        record = _record(plan, fidelity, latency, harmed, time.monotonic() - started)
        manifest = Manifest.create(content, record=record)
        stage.seal(manifest, domains=plan.target.domains)
        stage.publish()
    report(f"published {Path(out).name}, {manifest.id}")
    return manifest


def check_destination(out: str | os.PathLike[str], *, force: bool) -> None:
    """ExportError unless a package can be published as `out`; before weights are looked for."""
    Stage.create(out, force=force).discard()


def _lowering(plan: ExportPlan | PlmPlan) -> type[Lowering]:
    module, _, name = plan.target.emitter.partition(":")
    kind: type[Lowering] = getattr(import_module(module), name)
    return kind


def _harmed_layers(errors: Mapping[str, float]) -> dict[str, float]:
    """The linear layers that W8A8 would hurt, with what it would do to them."""
    return {name: error for name, error in errors.items() if not error <= MAX_LAYER_ERROR}


def _lower(
    tower: Tower, lowering: type[Lowering], precision: str, formats: Mapping[str, Format]
) -> dict[str, LoweredGraph]:
    traced, parameters = tower.traced()
    dtype = np.dtype(np.float16 if precision == "fp16" else np.float32)
    graphs = {}
    for name, recipe in tower.recipes().items():
        instance = lowering(traced, parameters, dtype=dtype, formats=formats)
        graph = instance.lower(recipe.sources, recipe.outputs)
        for operator, wanted in (
            (lowering.attention_op, recipe.attentions),
            (lowering.cached_attention_op, recipe.cached_attentions),
        ):
            fused = graph.count(operator)
            if fused != wanted:
                raise ExportError(
                    f"graph {name!r} has {fused} {operator} operators, not {wanted}: attention "
                    "was not fused"
                )
        graphs[name] = graph
    return graphs


def _content(
    plan: ExportPlan | PlmPlan,
    model: ModelExport,
    stage: Stage,
    graphs: Mapping[str, GraphSpec],
    layers: Mapping[str, Format | None],
) -> Content:
    return Content(
        name=plan.name,
        family=model.family,
        architecture=plan.config.to_dict(),
        target=Target(
            backend=plan.backend,
            precision=plan.precision,
            options=model.options(layers),
        ),
        image=model.image(),
        text=model.text(),
        graphs=dict(graphs),
        files=dict(stage.entries),
        weights=dict(model.source.provenance),
        versions={
            "perception_rt": __version__,
            **{name: version(name) for name in ("onnx", "onnxscript", "torch")},
        },
    )


def _record(
    plan: ExportPlan | PlmPlan,
    fidelity: Mapping[str, Fidelity],
    latency: Mapping[str, Any],
    harmed: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    return {
        "fidelity": {name: result.to_dict() for name, result in fidelity.items()},
        "gate": {"min_cosine": {name: MIN_COSINE[plan.gate(name)] for name in fidelity}},
        "int8_error": {name: float(f"{error:.3g}") for name, error in harmed.items()},
        "latency": dict(latency),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
        "export": {"seconds": round(seconds, 1), "peak_rss_bytes": peak_rss_bytes()},
    }
