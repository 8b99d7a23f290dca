"""Exports: from options to a plan, and from a plan and weights to a published package.

Components are handled one after the other and weights one tensor at a time. So the peak memory is
one component in eager, or one layer of a language model, and not several copies of the model.
"""

import os
import platform
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from perception_rt._version import __version__
from perception_rt.checkpoint.adapter import AdaptedWeights
from perception_rt.checkpoint.detection import BackboneWeights, open_backbone
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import (
    LICENSE_UNKNOWN,
    FileWeights,
    WeightSource,
    open_checkpoint,
)
from perception_rt.config import PeConfig
from perception_rt.errors import BackendError, CapacityError, ExportError, InputError
from perception_rt.export.architecture import (
    Report,
    WeightsPlace,
    find_architecture,
    locate_weights,
    refuse_foreign,
)
from perception_rt.export.backends.refit_source import RefitSource
from perception_rt.export.backends.tensorrt_engines import (
    EngineBuilder,
    EngineMaker,
    engine_name,
    library_for,
)
from perception_rt.export.backends.tensorrt_profiles import has_engine
from perception_rt.export.backends.torch_tensorrt import TorchTensorRt, load_compiler
from perception_rt.export.components.component import (
    Component,
    ModelExport,
    Reference,
    layer_notes,
    ranges_of,
)
from perception_rt.export.fidelity import MIN_COSINE, Fidelity, check_gate
from perception_rt.export.gate import check_gpu, run_gate
from perception_rt.export.graph.lowering import LoweredGraph, Lowering
from perception_rt.export.graph.onnx_writer import Place, write_graphs
from perception_rt.export.options import ExportOptions
from perception_rt.export.plan import HERE, BuildSettings, Plan, build_settings
from perception_rt.export.quantization.calibration import calibration_files, prompts
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.families import Config, Family, family_of, import_named
from perception_rt.memory import peak_rss_bytes
from perception_rt.package.contract import GraphSpec
from perception_rt.package.manifest import Content, Manifest, Target
from perception_rt.package.store import Stage
from perception_rt.package.trust import remember
from perception_rt.targets import Target as BackendRecord
from perception_rt.targets import get_target, operator_domains
from perception_rt.tensorrt_library import gpu_capability

# Called with the folder of a finished package; returns JSON values for its record.
Evaluator: TypeAlias = Callable[[Path], Mapping[str, Any]]


def export(
    options: ExportOptions,
    on_progress: Report | None = None,
    *,
    evaluate: Evaluator | None = None,
) -> Manifest:
    """Exports a model as an engine package and publishes it as `options.out`.

    Options are checked before weights are downloaded or read. Nothing is published unless the
    finished package is faithful to eager PyTorch.

    Args:
        options: the model, how to build it, and where to.
        on_progress: called with one line of text per step.
        evaluate: called before the package is published; what it returns becomes `evaluation` in
            the record. If it raises, nothing is published.

    Returns:
        The package's manifest; its `id` is the digest of the package's content.

    Raises:
        InputError: an option is unusable, or does not fit the model.
        CheckpointError: the weights are missing, damaged or of another architecture.
        BackendError: an engine cannot be built on this machine.
        ExportError: `options.out` is taken, or the package is not faithful.
    """
    report = on_progress or _ignore
    config = find_architecture(options)
    family = family_of(config)
    refuse_foreign(options, family)
    settings = build_settings(options, decodes=family.generates)
    check_machine(settings)
    with _parents(Path(options.out)), Stage.create(options.out, force=options.force) as stage:
        locate = cache(partial(locate_weights, options, report))
        plan = model_export(family).make_plan(options, config, settings, lambda: locate().path)
        plan, source = _open_source(plan, config, locate(), options, report)
        return _fill(stage, plan, source, None, report, evaluate)


def model_export(family: Family) -> type[ModelExport[Any, Any]]:
    """The class that plans and describes a family's packages."""
    found: type[ModelExport[Any, Any]] = import_named(family.component)
    return found


def check_machine(settings: BuildSettings, *, builds: bool = True) -> None:
    """Checks that this machine has what the settings need.

    Args:
        settings: how a package is to be built.
        builds: whether its engines are to be built, and not taken from another package.

    Raises:
        BackendError: a library or a GPU is missing.
        CapacityError: the GPU has no free memory.
        InputError: the calibration folder has no usable files.
    """
    if settings.engines and builds:
        if settings.route != "onnx":
            load_compiler()
        library_for(settings.engines, refittable=settings.refittable)
        if _has_gpu_for(settings):
            check_gpu()
    ranges_of(settings)
    if settings.calibration is not None:
        calibration_files(settings.calibration)
        prompts(settings.calibration)


def export_package(
    plan: Plan,
    source: WeightSource,
    out: str | os.PathLike[str],
    *,
    force: bool = False,
    refit: RefitSource | None = None,
    on_progress: Report | None = None,
) -> Manifest:
    """Exports a planned model and publishes it as the package directory `out`.

    Args:
        plan: what to make.
        source: weights of the plan's architecture; tensors are read several times.
        out: a path that does not exist or is an empty directory; its parent must exist.
        force: replace the package at `out`, if there is one.
        refit: package that the result must equal in all but its weights; see `refit_package`.
        on_progress: called with one line of text per step.

    Raises:
        ExportError: `out` is taken, or the package is not faithful; nothing is published.
        CheckpointError: the weights are unusable.
        BackendError: an engine cannot be built on this machine.
    """
    with Stage.create(out, force=force) as stage:
        return _fill(stage, plan, source, refit, on_progress or _ignore)


def _fill(
    stage: Stage,
    plan: Plan,
    source: WeightSource,
    refit: RefitSource | None,
    report: Report,
    evaluate: Evaluator | None = None,
) -> Manifest:
    """Fills a stage with the package, compares it with eager, and publishes it."""
    started = time.monotonic()
    model = model_export(family_of(plan.config))(plan, source)
    for note in model.notes():
        report(note)
    for path, data in model.files().items():
        stage.write(path, [data])
    written = _write_components(plan, model, stage, refit, report)
    content = _content(plan, model, stage, written)
    # The gate opens the stage as users open a package, so a manifest must be there before the
    # gate's results are. Sealing again puts them into the record, which the id leaves out. Engines
    # come last, since a package that fails the gate needs none.
    _seal(stage, content, {})
    report("comparing the package with eager")
    fidelity, latency = run_gate(stage.directory, written.references)
    check_gate(fidelity, plan.gate)
    engines: dict[str, Any] = {}
    if plan.engines:
        maker = refit if refit is not None and refit.refittable else _maker(plan, model)
        content, engines = _add_engines(plan, maker, stage, content, report)
        engines |= _gate_engines(plan, stage, content, written.references, maker, report)
    seconds = time.monotonic() - started
    record = _record(plan, fidelity, latency, written.excluded, seconds)
    if evaluate is not None:
        record["evaluation"] = dict(evaluate(stage.directory))
    manifest = _seal(stage, content, record | engines)
    out = stage.publish()
    if plan.engines:
        _remember(manifest.id, report)
    report(f"published {out.name}, {manifest.id}")
    return manifest


def _open_source(
    plan: Plan, given: Config, place: WeightsPlace, options: ExportOptions, report: Report
) -> tuple[Plan, WeightSource]:
    """The weights, and the plan with the biases that they have.

    `given` is the architecture that the options name, from which a detection backbone is made.
    """
    if place.path is None:
        return plan, with_adapter(RandomWeights(plan.config, options.seed), options.adapter, plan)
    license_note = place.license_note or LICENSE_UNKNOWN
    source: FileWeights | BackboneWeights
    if isinstance(plan.config, PeConfig) and plan.config.detection is not None:
        assert isinstance(given, PeConfig)
        source = open_backbone(
            place.path,
            plan.config,
            given,
            license_note=license_note,
            ema=options.ema,
            seed=options.seed,
        )
    else:
        source = open_checkpoint(
            place.path, plan.config, license_note=license_note, ema=options.ema, find_biases=True
        )
    for note in source.notes:
        report(note)
    plan = replace(plan, config=source.config)
    return plan, with_adapter(source, options.adapter, plan)


def with_adapter(
    source: WeightSource, adapter: str | os.PathLike[str] | None, plan: Plan
) -> WeightSource:
    """The weights with a LoRA adapter merged; the weights themselves without one."""
    return source if adapter is None else AdaptedWeights(source, Path(adapter), plan.config)


def _ignore(line: str) -> None:
    pass


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the missing folders above `out`; removes them again if the export fails."""
    missing = [folder for folder in out.parents if not folder.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"cannot make the folder {out.parent}: {error.strerror}") from None
    try:
        yield
    except BaseException:
        for folder in missing:
            with suppress(OSError):
                folder.rmdir()
        raise


def _seal(stage: Stage, content: Content, record: Mapping[str, Any]) -> Manifest:
    manifest = Manifest.create(content, record=record)
    stage.seal(manifest, domains=operator_domains)
    return manifest


@dataclass
class _Written:
    """The components' graphs, references, and quantisation of their linear layers."""

    graphs: dict[str, GraphSpec] = field(default_factory=dict)
    references: list[Reference] = field(default_factory=list)
    excluded: dict[str, float] = field(default_factory=dict)  # errors of these layers
    formats: dict[str, Format] = field(default_factory=dict)
    smoothed: set[str] = field(default_factory=set)
    clipped: set[str] = field(default_factory=set)

    def add(self, measured: Measured, formats: Mapping[str, Format]) -> None:
        """Adds the decisions on a component's layers."""
        self.excluded |= {name: measured.errors[name] for name in measured.excluded()}
        self.formats |= formats
        self.smoothed |= measured.smoothed & formats.keys()
        self.clipped |= measured.clipped & formats.keys()


def _write_components(
    plan: Plan,
    model: ModelExport[Any, Any],
    stage: Stage,
    refit: RefitSource | None,
    report: Report,
) -> _Written:
    dtype = np.dtype(plan.float_dtype)
    written = _Written()
    places: dict[str, Place] = {}
    carry: Tensor | None = None
    components = list(model.components())
    # All of them in eager before any graph is written: a precision that does not suit the weights
    # is found out early.
    for component in components:
        report(f"{component.name}: running eager")
        reference = component.reference(carry)
        carry = reference.carry
        written.references.append(reference)
        measured = reference.measured
        if refit is None:
            _check_simulation(plan, component.name, measured)
        else:
            measured.decide(refit.excluded, refit.smoothed, refit.clipped)
        formats = component.formats(measured)
        written.add(measured, formats)
        for line in layer_notes(component.name, measured, formats):
            report(line)
    for component, reference in zip(components, written.references, strict=True):
        report(f"{component.name}: tracing and writing {plan.precision} graphs")
        formats, target = component.formats(reference.measured), get_target(component.backend)
        if target.writer:
            graphs = import_named(target.writer)(stage, component, formats, places)
        else:
            lowered = _lowered(target, component, dtype, formats, reference.measured)
            graphs = write_graphs(stage, f"{component.name}.data", lowered, places)
        if target is not plan.target:
            graphs = {n: replace(spec, backend=target.name) for n, spec in graphs.items()}
        written.graphs |= graphs
        if refit is not None:
            for name, spec in graphs.items():
                refit.check(name, stage.path(spec.file).read_bytes())
    return written


def _lowered(
    target: BackendRecord,
    component: Component[Any],
    dtype: np.dtype[Any],
    formats: Mapping[str, Format],
    measured: Measured,
) -> dict[str, LoweredGraph]:
    """The component's graphs in the operators of its backend."""
    lowering: type[Lowering] = import_named(target.emitter)
    return {
        name: lowering(
            made.traced, made.parameters, dtype=dtype, formats=formats, measured=measured
        ).lower(name, recipe)
        for made in component.traced()
        for name, recipe in made.recipes.items()
    }


def _check_simulation(plan: Plan, component: str, measured: Measured) -> None:
    """ExportError if the component's simulated output is below the limit of the gate."""
    least = MIN_COSINE[plan.gate(f"{component}.")]
    if measured.cosine is None or measured.cosine >= least:
        return
    raise ExportError(
        f"{component}: its weights do not suit {plan.precision}: with "
        f"{len(measured.excluded())} of {len(measured.errors)} linear layers in float, cosine with "
        f"eager is {measured.cosine:.6f} (at least {least} is required). Export in another "
        "precision, such as fp16. Nothing was published"
    )


def _content(plan: Plan, model: ModelExport[Any, Any], stage: Stage, written: _Written) -> Content:
    options = model.options({name: written.formats.get(name) for name in sorted(written.excluded)})
    if written.smoothed:
        options["balanced_layers"] = sorted(written.smoothed)
    if written.clipped:
        options["clipped_layers"] = sorted(written.clipped)
    if plan.calibrator != "max":
        options["calibrator"] = plan.calibrator
    return Content(
        name=plan.name,
        family=family_of(plan.config).name,
        architecture=plan.config.to_dict(),
        target=Target(backend=plan.backend, precision=plan.precision, options=options),
        image=model.image(),
        text=model.text(),
        graphs=written.graphs,
        files=dict(stage.entries),
        weights=dict(model.source.provenance),
        versions={
            "perception_rt": __version__,
            **{name: version(name) for name in ("onnx", "onnxscript", "torch")},
        },
    )


def _has_gpu_for(settings: BuildSettings) -> bool:
    """Whether this machine has a GPU that engines are built for, so that they can be compared."""
    gpu = gpu_capability()
    return gpu is not None and not {gpu, HERE}.isdisjoint(settings.engines)


def _maker(plan: Plan, model: ModelExport[Any, Any]) -> EngineMaker:
    if plan.route == "onnx":
        return EngineBuilder(plan)
    return TorchTensorRt(plan.engines, model.torch_module)


def _add_engines(
    plan: Plan, maker: EngineMaker, stage: Stage, content: Content, report: Report
) -> tuple[Content, dict[str, Any]]:
    """Stages an engine of each graph for each GPU, one in memory at a time.

    Returns:
        The content with the engines; the part of the record that describes them.
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
            del engine  # so that its memory is free for the next one
    options = {**content.target.options, "engines": files, "builder": maker.label}
    if plan.route != "onnx":
        options["route"] = plan.route
    for name in ("allow_unfused", "refittable"):
        if getattr(plan, name):
            options[name] = True
    target = replace(content.target, options=options)
    return replace(content, target=target, files=dict(stage.entries)), {"engines": made}


def _gate_engines(
    plan: Plan,
    stage: Stage,
    content: Content,
    references: list[Reference],
    maker: EngineMaker,
    report: Report,
) -> dict[str, Any]:
    """Compares engines with eager, and returns the results for the record; {} without their GPU.

    Raises:
        ExportError: an engine is not faithful to eager.
        BackendError, CapacityError: an engine that was built just now does not run.
    """
    if not _has_gpu_for(plan):
        return {}
    _seal(stage, content, {})
    report("comparing the engines with eager on the GPU")
    try:
        fidelity, latency = run_gate(stage.directory, references, device="cuda")
    except (BackendError, CapacityError) as error:
        if not isinstance(maker, RefitSource):
            raise
        # Engines of an earlier package may be for another GPU or TensorRT than this machine's.
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
        report(f"load it with expect={package_id!r}: noting that it was made here failed: {error}")


def _record(
    plan: Plan,
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
