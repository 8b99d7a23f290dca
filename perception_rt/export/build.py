"""The export, from plan and weights to a published package.

Towers are handled one after the other and weights one tensor at a time, so that the peak is one
tower in eager, or one layer of a language model, not the model several times over.
"""

import os
import platform
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from perception_rt._version import __version__
from perception_rt.checkpoint.source import WeightSource
from perception_rt.errors import BackendError, CapacityError, ExportError
from perception_rt.export.backends import torch_tensorrt
from perception_rt.export.backends.tensorrt_engines import (
    EngineBuilder,
    EngineMaker,
    engine_name,
    library_for,
)
from perception_rt.export.backends.tensorrt_profiles import has_engine
from perception_rt.export.components.component import (
    Component,
    ModelExport,
    Recipe,
    Reference,
)
from perception_rt.export.fidelity import MIN_COSINE, Fidelity, check_gate
from perception_rt.export.gate import check_gpu, run_gate
from perception_rt.export.graph.lowering import LoweredGraph, Lowering
from perception_rt.export.graph.onnx_writer import Place, write_graphs
from perception_rt.export.plan import HERE, ExportPlan, PlmPlan
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.export.refit_source import RefitSource
from perception_rt.families import family_of, import_named
from perception_rt.memory import peak_rss_bytes
from perception_rt.package.contract import GraphSpec
from perception_rt.package.manifest import Content, Manifest, Target
from perception_rt.package.store import Stage
from perception_rt.package.trust import remember
from perception_rt.targets import operator_domains
from perception_rt.tensorrt_library import gpu_capability

Report = Callable[[str], None]


def export_package(
    plan: ExportPlan | PlmPlan,
    source: WeightSource,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    refit: RefitSource | None = None,
    on_progress: Report | None = None,
) -> Manifest:
    """Exports a model and publishes it as the package directory `out`.

    Args:
        plan: what to make.
        source: the weights; read a few times over, tensor by tensor.
        out: must not exist, or be an empty directory, or a package that `force` may replace.
        force: replace an existing package.
        refit: package that the result must equal in all but its weights; see `refit_package`.
        on_progress: called with a line for each step.

    Raises:
        ExportError: the destination is not usable, or the gate failed; nothing is published.
        CheckpointError: the weights are not usable.
    """
    report = on_progress or (lambda line: None)
    started = time.monotonic()
    model: ModelExport[Any] = import_named(family_of(plan.config).component)(plan, source)
    with Stage.create(out, force=force) as stage:
        for path, data in model.files().items():
            stage.write(path, [data])
        components = _write_components(plan, model, stage, refit, report)
        content = _content(plan, model, stage, components)
        stage.seal(Manifest.create(content, record={}), domains=operator_domains)
        report("comparing the package with eager")
        fidelity, latency = run_gate(stage.directory, components.references)
        check_gate(fidelity, plan.gate)
        built: dict[str, Any] = {}
        if plan.engines:
            maker = _maker(plan, source) if refit is None or not refit.refittable else refit
            content, built = _add_engines(plan, maker, stage, content, report)
            stage.seal(Manifest.create(content, record={}), domains=operator_domains)
            built |= _engine_gate(plan, stage, components.references, maker, report)
        seconds = time.monotonic() - started
        record = {**_record(plan, fidelity, latency, components.excluded, seconds), **built}
        manifest = Manifest.create(content, record=record)
        stage.seal(manifest, domains=operator_domains)
        stage.publish()
    if plan.engines:
        _remember(manifest.id, report)
    report(f"published {Path(out).name}, {manifest.id}")
    return manifest


@dataclass
class _Components:
    """What was written of a model's towers, and what their linear layers were measured to need."""

    graphs: dict[str, GraphSpec] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    excluded: dict[str, float] = field(default_factory=dict)
    formats: dict[str, Format] = field(default_factory=dict)
    smoothed: set[str] = field(default_factory=set)
    clipped: set[str] = field(default_factory=set)

    def options(self, plan: ExportPlan | PlmPlan, model: ModelExport[Any]) -> dict[str, Any]:
        """The target's options: what a reader of the graphs could not know."""
        options = model.options({name: self.formats.get(name) for name in sorted(self.excluded)})
        if self.smoothed:
            options["balanced_layers"] = sorted(self.smoothed)
        if self.clipped:
            options["clipped_layers"] = sorted(self.clipped)
        if plan.calibrator != "max":
            options["calibrator"] = plan.calibrator
        return options


def _write_components(
    plan: ExportPlan | PlmPlan,
    model: ModelExport[Any],
    stage: Stage,
    refit: RefitSource | None,
    report: Report,
) -> _Components:
    lowering = _lowering(plan)
    done = _Components()
    carry: Tensor | None = None
    places: dict[str, Place] = {}
    for component in model.components():
        report(f"{component.name}: running eager")
        reference = component.reference(plan.scheme, carry)
        carry = reference.carry
        done.references.append(reference)
        measured = reference.measured
        if refit is not None:
            measured.decide(refit.excluded, refit.smoothed, refit.clipped)
        done.excluded |= {name: measured.errors[name] for name in measured.excluded()}
        formats = component.formats(measured)
        done.formats |= formats
        done.smoothed |= measured.smoothed & formats.keys()
        done.clipped |= measured.clipped & formats.keys()
        report(f"{component.name}: tracing and writing {plan.precision} graphs")
        lowered = _lower(component, lowering, plan, formats, measured)
        written = write_graphs(stage, f"{component.name}.data", lowered, places)
        done.graphs |= written
        if refit is not None:
            for name, spec in written.items():
                refit.check(name, stage.path(spec.file).read_bytes())
    return done


def check_destination(out: str | os.PathLike[str], *, force: bool) -> None:
    """ExportError unless a package can be published as `out`; before weights are looked for."""
    Stage.create(out, force=force).discard()


def _lowering(plan: ExportPlan | PlmPlan) -> type[Lowering]:
    module, _, name = plan.target.emitter.partition(":")
    kind: type[Lowering] = getattr(import_module(module), name)
    return kind


def _lower(
    component: Component[Any],
    lowering: type[Lowering],
    plan: ExportPlan | PlmPlan,
    formats: Mapping[str, Format],
    measured: Measured,
) -> dict[str, LoweredGraph]:
    traced, parameters = component.traced()
    dtype = np.dtype(plan.float_dtype)
    graphs = {}
    for name, recipe in component.recipes().items():
        instance = lowering(traced, parameters, dtype=dtype, formats=formats, measured=measured)
        graphs[name] = instance.lower(recipe.sources, recipe.outputs)
        _check_fused(name, graphs[name], lowering, recipe)
    return graphs


def _check_fused(name: str, graph: LoweredGraph, lowering: type[Lowering], recipe: Recipe) -> None:
    """ExportError unless attention became the operators that it should."""
    wanted: Counter[str] = Counter()
    for times, operators in (
        (recipe.attentions, lowering.attention_ops),
        (recipe.cached_attentions, lowering.cached_attention_ops),
    ):
        if times:
            wanted.update({operator: times * count for operator, count in operators.items()})
    for operator, count in wanted.items():
        fused = graph.count(operator)
        if fused != count:
            raise ExportError(
                f"graph {name!r} has {fused} {operator} operators, not {count}: attention was "
                "not fused"
            )


def _content(
    plan: ExportPlan | PlmPlan,
    model: ModelExport[Any],
    stage: Stage,
    components: _Components,
) -> Content:
    return Content(
        name=plan.name,
        family=family_of(plan.config).name,
        architecture=plan.config.to_dict(),
        target=Target(
            backend=plan.backend,
            precision=plan.precision,
            options=components.options(plan, model),
        ),
        image=model.image(),
        text=model.text(),
        graphs=components.graphs,
        files=dict(stage.entries),
        weights=dict(model.source.provenance),
        versions={
            "perception_rt": __version__,
            **{name: version(name) for name in ("onnx", "onnxscript", "torch")},
        },
    )


def check_builder(plan: ExportPlan | PlmPlan) -> None:
    """BackendError unless the plan's engines can be built here; before weights are looked for."""
    if plan.route != "onnx":
        torch_tensorrt.load_compiler()
    library_for(plan.engines, refittable=plan.refittable)
    if _is_here(plan):
        check_gpu()


def _is_here(plan: ExportPlan | PlmPlan) -> bool:
    """Whether the GPU is here that engines are built for, and so can be compared."""
    gpu = gpu_capability()
    return gpu is not None and not {gpu, HERE}.isdisjoint(plan.engines)


def _maker(plan: ExportPlan | PlmPlan, source: WeightSource) -> EngineMaker:
    if plan.route == "onnx":
        return EngineBuilder(plan)
    assert isinstance(plan, ExportPlan)
    return torch_tensorrt.TorchTensorRt(plan, source)


def _add_engines(
    plan: ExportPlan | PlmPlan, maker: EngineMaker, stage: Stage, content: Content, report: Report
) -> tuple[Content, dict[str, Any]]:
    """Stages an engine of each graph for each GPU; the content with them, and the record of them.

    One engine at a time is in memory.
    """
    files: dict[str, dict[str, str]] = {name: {} for name in plan.engines}
    made: dict[str, Any] = {}
    for graph, spec in content.graphs.items():
        if not has_engine(graph):
            continue
        for gpu in plan.engines:
            report(f"{graph}: an engine for {gpu} by {maker.label}")
            engine = maker.engine(graph, spec, stage.path(spec.file), gpu)
            file = engine_name(graph, gpu)
            stage.write(file, [engine.data])
            files[gpu][graph] = file
            made[file] = engine.record
            del engine  # before there is another
    options = {**content.target.options, "engines": files, "builder": maker.label}
    if plan.route != "onnx":
        options["route"] = plan.route
    for name in ("allow_unfused", "refittable"):
        if getattr(plan, name):
            options[name] = True
    target = replace(content.target, options=options)
    return replace(content, target=target, files=dict(stage.entries)), {"engines": made}


def _engine_gate(
    plan: ExportPlan | PlmPlan,
    stage: Stage,
    references: list[Reference],
    maker: EngineMaker,
    report: Report,
) -> dict[str, Any]:
    """What the record says of the engines, if the GPU is here that they were built for.

    Raises:
        ExportError: one is not faithful to eager.
        BackendError, CapacityError: one that was built just now does not run.
    """
    if not _is_here(plan):
        return {}
    report("comparing the engines with eager on the GPU")
    try:
        fidelity, latency = run_gate(stage.directory, references, device="cuda")
    except (BackendError, CapacityError) as error:
        if not isinstance(maker, RefitSource):
            raise
        # Engines that are kept may be for another GPU or TensorRT than those that are here.
        report(f"the engines are not compared: {error}")
        return {}
    check_gate(fidelity, plan.gate)
    return {
        "engine_fidelity": {name: result.to_dict() for name, result in fidelity.items()},
        "engine_latency": latency,
    }


def _remember(package_id: str, report: Report) -> None:
    """Lets this user load the engines without naming the package."""
    try:
        remember(package_id)
    except OSError as error:
        report(f"load it with expect={package_id!r}; that it was made here is not noted: {error}")


def _record(
    plan: ExportPlan | PlmPlan,
    fidelity: Mapping[str, Fidelity],
    latency: Mapping[str, Any],
    excluded: Mapping[str, float],
    seconds: float,
) -> dict[str, Any]:
    return {
        "fidelity": {name: result.to_dict() for name, result in fidelity.items()},
        "gate": {"min_cosine": {name: MIN_COSINE[plan.gate(name)] for name in fidelity}},
        "layer_error": {name: float(f"{error:.3g}") for name, error in excluded.items()},
        "latency": dict(latency),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
        "export": {"seconds": round(seconds, 1), "peak_rss_bytes": peak_rss_bytes()},
    }
