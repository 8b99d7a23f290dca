"""Refits packages: the same package with the weights of another checkpoint.

Graphs, formats, processing and tokenizer stay. Engines that were exported with `--refittable` hold
no weights and are kept; others are built again.
"""

import os
from dataclasses import replace
from pathlib import Path

from perception_rt.checkpoint.locate import check_config
from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.errors import InputError, PackageError
from perception_rt.export.architecture import Report
from perception_rt.export.backends.refit_source import RefitSource
from perception_rt.export.build import check_machine, export_package, model_export, with_adapter
from perception_rt.export.plan import BuildSettings, Plan
from perception_rt.families import get_family
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import Package, open_package
from perception_rt.targets import ONNX


def refit_package(
    package: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    expect: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    ema: bool = False,
    adapter: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Publishes the package that an export of other weights with the same decisions would be.

    Args:
        package: a package directory.
        weights: a checkpoint of the same architecture, as `open_checkpoint` takes it.
        out: a path that does not exist or is an empty directory, or a package that `force` may
            replace, which can be `package` itself.
        expect: id that `package` must have.
        calibration: folder of images for fp8's activation ranges; None for synthetic images.
        ema: take the averaged copy (EMA) of the weights.
        adapter: folder of a LoRA adapter of PEFT to merge into the weights; None for none.
        force: replace an existing package.
        on_progress: called with one line of text per step.

    Raises:
        PackageError: the package is damaged, or no export makes such a package.
        CheckpointError: the weights are unusable, or of another architecture.
        InputError: the `config.json` beside the weights describes another architecture, or they
            are an unfinished training run.
        BackendError: an engine cannot be built on this machine.
        ExportError: a graph has another structure than in the package, `out` is taken, or the
            result is not faithful to eager; nothing is published.
    """
    with open_package(package, expect=expect) as old:
        old.verify()
        plan = plan_of(old)
        if calibration is not None:
            plan = replace(plan, calibration=Path(calibration))
        kept = RefitSource(old)
        check_machine(plan, builds=not kept.refittable)
        check_config(plan.config, f"package {old.name!r}", Path(weights), except_length=True)
        source = open_checkpoint(Path(weights), plan.config, ema=ema)
        adapted = with_adapter(source, adapter, plan)
        return export_package(plan, adapted, out, force=force, refit=kept, on_progress=on_progress)


def plan_of(package: Package) -> Plan:
    """The plan that a package was exported by; PackageError if no export makes such a package."""
    content = package.manifest.content
    options = content.target.options
    if any(spec.backend is not None or spec.kind != ONNX for spec in content.graphs.values()):
        raise PackageError(
            f"package {package.name!r} has graphs for several backends or in other formats than "
            "ONNX, which cannot be refitted: export it again"
        )
    try:
        settings = BuildSettings(
            name=content.name,
            backend=content.target.backend,
            precision=content.target.precision,
            engines=tuple(options.get("engines", ())),
            allow_unfused=options.get("allow_unfused", False),
            refittable=options.get("refittable", False),
            route=options.get("route", "onnx"),
            calibrator=options.get("calibrator", "max"),
        )
        return model_export(get_family(content.family)).plan_of(package, settings)
    except (InputError, KeyError, TypeError) as error:
        raise PackageError(f"package {package.name!r} was not made by an export: {error}") from None
