"""What `perception-export` does with its arguments: which model, which weights, which plan."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from perception_rt.archs import DEMO_MODEL, get_config
from perception_rt.checkpoint.hub import PE_LICENSE, download
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import WeightSource, open_checkpoint
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.demo import LICENSE_NOTE, config_path, weights_path
from perception_rt.errors import InputError
from perception_rt.export.build import check_destination, export_package
from perception_rt.export.plan import ExportPlan, parse_image_size
from perception_rt.package.manifest import Manifest
from perception_rt.processing.image import ImageSpec, Resize

_MAX_CONFIG_BYTES = 64 * 1024


def run_export(options: argparse.Namespace, report: Callable[[str], None]) -> Manifest:
    """Exports as the parsed arguments of `perception-export` say."""
    plan = _plan(options)
    with _parents(Path(options.out)):
        check_destination(options.out, force=options.force)
        source = _source(options, plan.config, report)
        return export_package(plan, source, options.out, force=options.force, on_progress=report)


@contextmanager
def _parents(out: Path) -> Iterator[None]:
    """Makes the missing folders above `out`; an export that fails leaves none of them."""
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


def _plan(options: argparse.Namespace) -> ExportPlan:
    config = _config(options)
    native = config.vision.image_size
    size = parse_image_size(options.image_size) if options.image_size else (native, native)
    resize: Resize = "center_crop" if options.center_crop else "squash"
    return ExportPlan(
        name=(options.model or Path(options.checkpoint).stem).removeprefix("facebook/"),
        config=config,
        backend=options.backend,
        precision=_precision(options),
        image=ImageSpec(height=size[0], width=size[1], resize=resize),
        taps=_taps(options.taps, config.vision),
    )


def _precision(options: argparse.Namespace) -> str:
    if options.fp8 and options.precision not in (None, "fp8"):
        raise InputError(f"--fp8 and --precision {options.precision} contradict each other")
    precision: str = "fp8" if options.fp8 else options.precision or "fp32"
    return precision


def _taps(text: str | None, vision: VisionConfig) -> tuple[int, ...] | None:
    """`all`, `none`, or block indices from the front or, negative, from the end."""
    if text is None or text == "all":
        return None
    if text == "none":
        return ()
    try:
        indices = [int(part) for part in text.split(",")]
    except ValueError:
        raise InputError(f"--taps must be all, none or integers, not {text!r:.60}") from None
    return tuple(vision.block_index(index) for index in indices)


def _config(options: argparse.Namespace) -> PeConfig:
    if options.checkpoint is not None:
        if options.config is None:
            raise InputError("--checkpoint needs --config, the architecture as JSON")
        if options.weights is not None:
            raise InputError("--weights goes with --model; --checkpoint is the weights")
        return _read_config(Path(options.config))
    if options.config is not None:
        raise InputError("--config goes with --checkpoint; --model has its own architecture")
    if options.model == DEMO_MODEL:
        return _read_config(config_path())
    return get_config(options.model)


def _read_config(path: Path) -> PeConfig:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read config {path}: {error.strerror}") from None
    if len(data) > _MAX_CONFIG_BYTES:
        raise InputError(f"config {path} has {len(data)} bytes; at most {_MAX_CONFIG_BYTES}")
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError(f"config {path} is not JSON") from None
    return PeConfig.from_dict(values)


def _source(
    options: argparse.Namespace, config: PeConfig, report: Callable[[str], None]
) -> WeightSource:
    if options.checkpoint is not None:
        return open_checkpoint(options.checkpoint, config)
    if options.weights == "random":
        return RandomWeights(config, options.seed)
    if options.weights not in (None, "hf"):
        return open_checkpoint(options.weights, config)
    if options.model == DEMO_MODEL:
        return open_checkpoint(weights_path(), config, license_note=LICENSE_NOTE)
    report(f"looking for {options.model} in the hub cache, or downloading it")
    return open_checkpoint(download(options.model), config, license_note=PE_LICENSE)
