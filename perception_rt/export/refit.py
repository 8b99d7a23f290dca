"""New weights for a package that is there, as a fine-tuned checkpoint has: nothing else changes.

The new package has the same graphs, formats, processing and tokenizer. Engines that were exported
with `--refittable` hold no weights and are taken over as they are; others are built anew.
"""

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.export.build import check_builder, export_package
from perception_rt.export.components.component import ranges_of
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.refit_source import RefitSource
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import Package, open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.targets import ONNX

Report = Callable[[str], None]


def refit_package(
    package: str | os.PathLike[str],
    weights: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    expect: str | None = None,
    calibration: str | os.PathLike[str] | None = None,
    force: bool = False,
    on_progress: Report | None = None,
) -> Manifest:
    """Publishes what a package would be with other weights of its architecture.

    Args:
        package: a package directory.
        weights: a checkpoint, as `open_checkpoint` takes it.
        out: must not exist, or be an empty directory, or a package that `force` may replace; the
            package itself, too.
        expect: the package id that must be found.
        calibration: a folder of images that fp8 finds the ranges of activations on; None for
            synthetic ones.
        force: replace an existing package.
        on_progress: called with a line for each step.

    Raises:
        PackageError: the package is damaged, or not what an export of today makes.
        CheckpointError: the weights are unusable, or of another architecture.
        ExportError: a graph of the new weights has another structure, `out` is not usable, or the
            gate failed; nothing is published.
    """
    with open_package(package, expect=expect) as old:
        old.verify()
        plan = plan_of(old)
        if calibration is not None:
            plan = replace(plan, calibration=Path(calibration))
        kept = RefitSource(old)
        # What is missing is said before any work.
        if plan.engines and not kept.refittable:
            check_builder(plan)
        ranges_of(plan)
        source = open_checkpoint(Path(weights), plan.config)
        return export_package(plan, source, out, force=force, refit=kept, on_progress=on_progress)


def plan_of(package: Package) -> ExportPlan | PlmPlan:
    """The plan that a package was exported by; PackageError if there can be no such plan."""
    content = package.manifest.content
    options = content.target.options
    if any(spec.backend is not None or spec.kind != ONNX for spec in content.graphs.values()):
        raise PackageError(
            f"package {package.name!r} has graphs for several backends or in other formats than "
            "ONNX, which cannot be refitted: export it again"
        )
    try:
        common: dict[str, Any] = {
            "name": content.name,
            "backend": content.target.backend,
            "precision": content.target.precision,
            "engines": tuple(options.get("engines", ())),
            "allow_unfused": options.get("allow_unfused", False),
            "refittable": options.get("refittable", False),
            "route": options.get("route", "onnx"),
            "calibrator": options.get("calibrator", "max"),
        }
        if content.family == "pe":
            return ExportPlan(
                config=PeConfig.from_dict(content.architecture),
                image=ImageSpec.from_dict(content.image),
                taps=tuple(options["taps"]),
                **common,
            )
        return PlmPlan(
            config=PlmConfig.from_dict(content.architecture),
            tiles=TileSpec.from_dict(content.image),
            blocks=options.get("blocks", "int8"),
            tokenizer=_tokenizer(package),
            **common,
        )
    except (InputError, KeyError, TypeError) as error:
        raise PackageError(f"package {package.name!r} was not made by an export: {error}") from None


def _tokenizer(package: Package) -> tuple[TokenizerSpec, bytes | None] | None:
    text = package.manifest.content.text
    if text is None:
        return None
    spec = TokenizerSpec.from_dict(text, "text")
    return spec, None if spec.file is None else package.read(spec.file)
