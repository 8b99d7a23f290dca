"""The commands `perception-export` and `perception-rt refit`: from arguments to an export."""

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from perception_rt._version import __version__
from perception_rt.cli.arguments import CommandParser
from perception_rt.cli.models import ListModels
from perception_rt.errors import InputError
from perception_rt.progress import Progress

if TYPE_CHECKING:
    from perception_rt.package.manifest import Manifest

REFIT_HELP = "give a package the weights of another checkpoint"


def export_parser() -> argparse.ArgumentParser:
    """Parser of `perception-export`."""
    parser = CommandParser(
        prog="perception-export",
        description="Make an engine package from a checkpoint.",
        examples=(
            "perception-export --model PE-Demo --precision int8 --out pe-demo",
            "perception-export --model PE-Core-L14-336 --image-size 448x336 --out core",
            "perception-export --checkpoint mine.pt --config mine.json --out mine",
        ),
    )
    _model_arguments(parser)
    _engine_arguments(parser)
    _tensorrt_arguments(parser)
    _evaluation_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="package to make")
    parser.add_argument("--force", action="store_true", help="replace an existing package")
    parser.add_argument("--json", action="store_true", help="print the result as JSON")
    parser.add_argument(
        "--list", action=ListModels, nargs=0, dest=argparse.SUPPRESS, default=argparse.SUPPRESS,
        help="print the models and exit",
    )  # fmt: skip
    parser.add_argument("--version", action="version", version=__version__)
    parser.set_defaults(command=run_export)
    return parser


def _model_arguments(parser: argparse.ArgumentParser) -> None:
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model", help="released model, such as PE-Core-L14-336 or PLM-1B, or PE-Demo or PLM-Demo"
    )
    what.add_argument("--checkpoint", metavar="PATH", help="weights of any PE or PLM")
    parser.add_argument(
        "--config",
        metavar="FILE",
        help="architecture of --checkpoint, as JSON; default: params.json, config.json, "
        "open_clip_config.json or model.json beside it",
    )
    parser.add_argument(
        "--weights",
        metavar="SOURCE",
        help="weights of --model: hf (default), random, or a path",
    )
    _weight_arguments(parser)
    parser.add_argument(
        "--towers",
        metavar="WHICH",
        help="towers of an encoder to export: all (default), or vision, also of a checkpoint "
        "that has no text tower",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="RNG seed of --weights random; default: 0"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="FILE",
        help="tokenizer of a PLM; default: tokenizer.model beside its weights",
    )


def _weight_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--ema", action="store_true", help="take the averaged copy (EMA) that a checkpoint holds"
    )
    parser.add_argument(
        "--adapter", metavar="DIR", help="LoRA adapter of PEFT to merge into the weights"
    )


def _engine_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--precision",
        help="fp32 (default), fp16, int8; int4 for a PLM; fp16 (default) or fp8 for tensorrt",
    )
    parser.add_argument("--fp8", action="store_true", help="same as --precision fp8")
    parser.add_argument(
        "--backend", help="onnxruntime or tensorrt; default: the first that has the precision"
    )
    parser.add_argument(
        "--image-size",
        metavar="HxW",
        help="input size of an encoder, or several separated by "
        "commas, the default first; default: the model's own",
    )
    parser.add_argument(
        "--center-crop", action="store_true", help="crop an encoder's images; default: squash them"
    )
    parser.add_argument(
        "--ignore-exif",
        action="store_true",
        help="leave images as stored; default: upright",
    )
    parser.add_argument(
        "--taps",
        metavar="LAYERS",
        help="blocks that `features` can return: all (default), none, or a list such as 5,11,-1",
    )
    parser.add_argument(
        "--detection",
        action="store_true",
        help="export a vision tower as a detection backbone (ViTDet) with a feature pyramid",
    )
    parser.add_argument(
        "--window",
        type=int,
        metavar="PATCHES",
        help="side of the attention windows of --detection; default: the tower's own grid",
    )
    parser.add_argument(
        "--global-blocks",
        metavar="LAYERS",
        help="blocks of --detection that attend to the whole image, such as 12,24,36,49; default: "
        "four, evenly spread",
    )
    parser.add_argument(
        "--blocks",
        metavar="FORMAT",
        help="decoder blocks of a PLM in int4: int8 (default) for fast prompts, int4 for half the "
        "memory",
    )
    parser.add_argument(
        "--max-length",
        type=int,
        metavar="TOKENS",
        help="longest sequence of a PLM, and for tensorrt the length of every cache; default: the "
        "model's own",
    )


def _tensorrt_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--target",
        metavar="GPUS",
        help="compute capabilities to build tensorrt engines for, such as sm89,sm120; here "
        "(default) for this machine's GPU; none for graphs alone",
    )
    parser.add_argument(
        "--allow-unfused",
        action="store_true",
        help="let tensorrt take attention apart if it has no fused kernel",
    )
    parser.add_argument(
        "--refittable",
        action="store_true",
        help="build tensorrt engines without weights, which perception-rt refit can keep",
    )
    parser.add_argument(
        "--route",
        default="onnx",
        help="how tensorrt engines are built: onnx (default), or torch-tensorrt for an encoder in "
        "fp16",
    )
    parser.add_argument(
        "--calibration",
        metavar="DIR",
        help="folder of images, and prompts.txt, for fp8's activation ranges; default: synthetic "
        "ones",
    )
    parser.add_argument(
        "--calibrator",
        default="max",
        help="fp8's activation ranges: max (default), the largest magnitude; or modelopt, if "
        "NVIDIA's ModelOpt is installed",
    )


def _evaluation_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--eval-data", metavar="DATA", help="evaluate the package on these data before it is "
        "published, and record its scores and the points lost against fp32"
    )  # fmt: skip
    parser.add_argument(
        "--eval-task", default="zero-shot", metavar="TASK",
        help="task of perception-rt eval (default: zero-shot)",
    )  # fmt: skip
    parser.add_argument(
        "--eval-option", action="append", default=[], metavar="NAME=VALUE",
        help="option of the task, such as classes=names.txt; may be repeated",
    )  # fmt: skip


def add_refit_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `perception-rt refit`."""
    parser.add_argument("package", metavar="DIR", help="an engine package")
    parser.add_argument("--weights", required=True, metavar="PATH", help="a checkpoint")
    _weight_arguments(parser)
    parser.add_argument("--out", required=True, metavar="DIR", help="package to make")
    parser.add_argument("--force", action="store_true", help="replace an existing package")
    parser.add_argument("--expect", metavar="ID", help="id that the package must have")
    parser.add_argument(
        "--calibration", metavar="DIR", help="folder of images for fp8's activation ranges"
    )


def run_export(arguments: argparse.Namespace) -> None:
    """Runs `perception-export`."""
    with _needing_torch():
        from perception_rt.export.build import export
        from perception_rt.export.options import (
            ExportOptions,
            parse_global_blocks,
            parse_image_sizes,
            parse_taps,
            parse_target,
        )
    if arguments.fp8 and arguments.precision not in (None, "fp8"):
        raise InputError(f"--fp8 and --precision {arguments.precision} contradict each other")
    options = ExportOptions(
        out=arguments.out,
        model=arguments.model,
        checkpoint=arguments.checkpoint,
        config=arguments.config,
        weights=arguments.weights,
        ema=arguments.ema,
        adapter=arguments.adapter,
        towers=arguments.towers,
        seed=arguments.seed,
        precision="fp8" if arguments.fp8 else arguments.precision,
        backend=arguments.backend,
        target=None if arguments.target is None else parse_target(arguments.target),
        image_size=parse_image_sizes(arguments.image_size) if arguments.image_size else None,
        center_crop=arguments.center_crop,
        ignore_exif=arguments.ignore_exif,
        taps=None if arguments.taps is None else parse_taps(arguments.taps),
        detection=arguments.detection,
        window=arguments.window,
        global_blocks=(
            None
            if arguments.global_blocks is None
            else parse_global_blocks(arguments.global_blocks)
        ),
        tokenizer=arguments.tokenizer,
        blocks=arguments.blocks,
        max_length=arguments.max_length,
        allow_unfused=arguments.allow_unfused,
        refittable=arguments.refittable,
        route=arguments.route,
        calibration=arguments.calibration,
        calibrator=arguments.calibrator,
        force=arguments.force,
    )
    if arguments.eval_data is None:
        if arguments.eval_option:
            raise InputError("--eval-option needs --eval-data")
        with Progress() as progress:
            manifest = export(options, progress.step)
    else:
        from perception_rt.cli.export_evaluation import ExportEvaluation

        evaluation = ExportEvaluation(arguments, options)
        with Progress() as progress:
            manifest = export(options, progress.step, evaluate=evaluation.evaluator(progress))
        evaluation.show(manifest)
    _print_made(arguments, manifest)


def run_refit(arguments: argparse.Namespace) -> None:
    """Runs `perception-rt refit`."""
    with _needing_torch():
        from perception_rt.export.refit import refit_package
    with Progress() as progress:
        manifest = refit_package(
            arguments.package,
            arguments.weights,
            arguments.out,
            expect=arguments.expect,
            ema=arguments.ema,
            adapter=arguments.adapter,
            calibration=arguments.calibration,
            force=arguments.force,
            on_progress=progress.step,
        )
    _print_made(arguments, manifest)


@contextmanager
def _needing_torch() -> Iterator[None]:
    """InputError that says what to install if an import of the exporter fails."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] == "perception_rt":
            raise
        raise InputError(
            f"exporting needs {error.name}: pip install 'perception_rt[export]'"
        ) from None


def _print_made(arguments: argparse.Namespace, manifest: "Manifest") -> None:
    note = manifest.content.weights.get("note")
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    if arguments.json:
        made = {"package": arguments.out, "id": manifest.id, "record": dict(manifest.record)}
        print(json.dumps(made, indent=2))
    else:
        print(f"{arguments.out}  {manifest.id}")
