"""What `perception-export` does with its arguments: which model, which weights, which plan."""

import argparse
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from perception_rt.archs import PE_DEMO, PLM_DEMO, get_config
from perception_rt.checkpoint.hub import PE_LICENSE, PLM_LICENSE, download
from perception_rt.checkpoint.locate import CONFIG_NAME, find_config, find_tiles, find_tokenizer
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.source import LICENSE_UNKNOWN, WeightSource, open_checkpoint
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.demo import LICENSE_NOTE, config_path, language_model_path, weights_path
from perception_rt.errors import InputError, PackageError
from perception_rt.export.build import check_builder, check_destination, export_package
from perception_rt.export.components.component import ranges_of
from perception_rt.export.plan import HERE, ExportPlan, PlmPlan, parse_image_size
from perception_rt.export.quantization.calibration import calibration_files, prompts
from perception_rt.package.manifest import Manifest
from perception_rt.plm_config import PlmConfig, is_plm
from perception_rt.processing.image import ImageSpec, Resize
from perception_rt.processing.llm_tokenizer import TokenizerSpec, detect_tokenizer, open_tokenizer
from perception_rt.processing.tiles import TileSpec
from perception_rt.targets import Target, get_target

_MAX_CONFIG_BYTES = 64 * 1024
# Ids that the built-in byte tokenizer needs: one per byte, and some for control tokens.
_MIN_BYTES_VOCABULARY = 320
_ENCODER_ONLY = ("image_size", "center_crop", "taps")
_LANGUAGE_ONLY = ("tokenizer", "blocks", "max_length")

Report = Callable[[str], None]
Config = PeConfig | PlmConfig


@dataclass(frozen=True, slots=True)
class _Weights:
    """Where weights are: a file or directory, or nowhere for random ones."""

    path: Path | None
    license_note: str = LICENSE_UNKNOWN


def run_export(options: argparse.Namespace, report: Report) -> Manifest:
    """Exports as the parsed arguments of `perception-export` say."""
    config = _config(options)
    _refuse_foreign_options(options, config)
    if isinstance(config, PlmConfig) and options.max_length is not None:
        config = _shortened(config, options.max_length)
    # What needs no weights is checked before they are looked for, and downloaded.
    draft = _plan(options, config, None)
    if draft.engines:
        check_builder(draft)
    ranges_of(draft)
    if draft.calibration is not None:
        calibration_files(draft.calibration)
        prompts(draft.calibration)
    with _parents(Path(options.out)):
        check_destination(options.out, force=options.force)
        weights = _weights(options, report)
        source: WeightSource = (
            RandomWeights(config, options.seed)
            if weights.path is None
            else open_checkpoint(weights.path, config, license_note=weights.license_note)
        )
        plan = _plan(options, config, weights.path) if isinstance(config, PlmConfig) else draft
        if isinstance(plan, PlmPlan) and plan.tokenizer is None:
            report("no tokenizer was found: the package takes token ids only (--tokenizer FILE)")
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


def _refuse_foreign_options(options: argparse.Namespace, config: Config) -> None:
    """InputError for an option that the model's family has no use for."""
    plm = isinstance(config, PlmConfig)
    for name in _ENCODER_ONLY if plm else _LANGUAGE_ONLY:
        if getattr(options, name):
            kind = "an encoder" if plm else "a language model"
            raise InputError(f"--{name.replace('_', '-')} is for {kind}")


def _plan(
    options: argparse.Namespace, config: Config, weights: Path | None
) -> ExportPlan | PlmPlan:
    precision = _precision(options)
    backend = options.backend or ("tensorrt" if precision == "fp8" else "onnxruntime")
    name = (options.model or _name_of(Path(options.checkpoint))).removeprefix("facebook/")
    common: dict[str, Any] = {
        "name": name.replace("Perception-LM-", "PLM-"),
        "backend": backend,
        "precision": precision or ("fp16" if backend == "tensorrt" else "fp32"),
        "engines": _engines(options.target, get_target(backend)),
        "allow_unfused": options.allow_unfused,
        "refittable": options.refittable,
        "route": options.route,
        "calibrator": options.calibrator,
        "calibration": None if options.calibration is None else Path(options.calibration),
    }
    if isinstance(config, PlmConfig):
        return PlmPlan(
            config=config,
            tiles=_tiles(config, weights),
            blocks=options.blocks or "int8",
            tokenizer=_tokenizer(options, config, weights),
            **common,
        )
    native = config.vision.image_size
    size = parse_image_size(options.image_size) if options.image_size else (native, native)
    resize: Resize = "center_crop" if options.center_crop else "squash"
    return ExportPlan(
        config=config,
        image=ImageSpec(height=size[0], width=size[1], resize=resize),
        taps=_taps(options.taps, config.vision),
        **common,
    )


def _shortened(config: PlmConfig, length: int) -> PlmConfig:
    """The architecture with shorter sequences, which is the same model."""
    most = config.decoder.max_seqlen
    if not 1 <= length <= most:
        raise InputError(f"--max-length {length} is not in 1 to the model's {most}")
    return replace(config, decoder=replace(config.decoder, max_seqlen=length))


def _tiles(config: PlmConfig, weights: Path | None) -> TileSpec:
    size = config.vision.image_size
    return TileSpec(tile_size=size) if weights is None else find_tiles(weights, size)


def _name_of(checkpoint: Path) -> str:
    """A file's name, or its folder's where all files of this kind have the same name."""
    path = checkpoint.absolute()
    common = path.name.startswith(("consolidated.", "model."))
    return path.parent.name if common else path.stem


def _precision(options: argparse.Namespace) -> str | None:
    """The one that was asked for."""
    if options.fp8 and options.precision not in (None, "fp8"):
        raise InputError(f"--fp8 and --precision {options.precision} contradict each other")
    precision: str | None = "fp8" if options.fp8 else options.precision
    return precision


def _engines(text: str | None, target: Target) -> tuple[str, ...]:
    """What engines are built for."""
    if text is None:
        return (HERE,) if target.has_engines else ()
    return () if text == "none" else tuple(text.lower().split(","))


def _tokenizer(
    options: argparse.Namespace, config: PlmConfig, weights: Path | None
) -> tuple[TokenizerSpec, bytes | None] | None:
    """The one that was named or lies beside the weights; plain bytes for random weights."""
    vocab_size, image = config.decoder.vocab_size, config.image_token_id
    found = options.tokenizer or (None if weights is None else find_tokenizer(weights))
    if found is not None:
        return detect_tokenizer(found, vocab_size=vocab_size, image_token_id=image)
    if options.weights != "random" or vocab_size < _MIN_BYTES_VOCABULARY:
        return None
    spec = TokenizerSpec(kind="bytes", vocab_size=vocab_size, image_token_id=image)
    try:
        open_tokenizer(spec)
    except PackageError:  # the architecture's image token is one of the bytes
        return None
    return spec, None


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


def _config(options: argparse.Namespace) -> Config:
    if options.checkpoint is not None:
        if options.weights is not None:
            raise InputError("--weights goes with --model; --checkpoint is the weights")
        if options.config is not None:
            return _read_config(Path(options.config))
        found = find_config(options.checkpoint)
        if found is None:
            raise InputError("--checkpoint needs --config, the architecture as JSON")
        return found
    if options.config is not None:
        raise InputError("--config goes with --checkpoint; --model has its own architecture")
    if options.model == PE_DEMO:
        return _read_config(config_path())
    if options.model == PLM_DEMO:
        return _read_config(language_model_path() / CONFIG_NAME)
    return get_config(options.model)


def _read_config(path: Path) -> Config:
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
    return PlmConfig.from_dict(values) if is_plm(values) else PeConfig.from_dict(values)


def _weights(options: argparse.Namespace, report: Report) -> _Weights:
    if options.checkpoint is not None:
        return _Weights(Path(options.checkpoint))
    if options.weights == "random":
        return _Weights(None)
    if options.weights not in (None, "hf"):
        return _Weights(Path(options.weights))
    if options.model in (PE_DEMO, PLM_DEMO):
        path = weights_path() if options.model == PE_DEMO else language_model_path()
        return _Weights(path, LICENSE_NOTE)
    report(f"looking for {options.model} in the hub cache, or downloading it")
    plm = isinstance(get_config(options.model), PlmConfig)
    return _Weights(download(options.model), PLM_LICENSE if plm else PE_LICENSE)
