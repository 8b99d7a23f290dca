"""The model that an export's options name: its architecture, its weights and its name."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from perception_rt.archs import PE_DEMO, PLM_DEMO, get_config
from perception_rt.checkpoint.encoder_config import (
    check_agreement,
    find_encoder,
    is_encoder_file,
    read_encoder,
)
from perception_rt.checkpoint.hf_config import find_hub_config
from perception_rt.checkpoint.hub import download
from perception_rt.checkpoint.locate import (
    CONFIG_NAME,
    check_config,
    find_config,
    parse_architecture,
    refuse_adapter,
    weight_files,
)
from perception_rt.config import PeConfig
from perception_rt.demo import LICENSE_NOTE, config_path, language_model_path, weights_path
from perception_rt.errors import CheckpointError, InputError
from perception_rt.export.options import ExportOptions
from perception_rt.families import FAMILIES, Config, Family, family_of
from perception_rt.processing.image import ImageSpec
from perception_rt.records import check_choice

_TOWERS = ("all", "vision")
_MAX_CONFIG_BYTES = 64 * 1024
# Starts of file names that tell nothing about the model.
_COMMON_NAMES = ("consolidated.", "model.", "open_clip_", "pytorch_model.")

Report = Callable[[str], None]


def find_architecture(options: ExportOptions) -> Config:
    """The architecture of the model that the options name; reads no weights.

    A configuration beside the weights must agree with an architecture from elsewhere.

    Raises:
        InputError: the model is unknown, there is no usable configuration, or two disagree.
        CheckpointError: the configuration beside the checkpoint is not JSON.
    """
    if options.towers is not None:
        check_choice("--towers", options.towers, _TOWERS)
    vision_only = options.towers == "vision"
    given, source = _given_architecture(options)
    path = _weights_path(options)
    if path is not None:
        given = _described(given, source, path, with_text=not vision_only)
    assert given is not None
    if vision_only and isinstance(given, PeConfig):
        given = replace(given, text=None)
    return given


def _described(given: Config | None, source: str, path: Path, *, with_text: bool) -> Config:
    """The architecture, compared with the configuration beside the weights or read from it."""
    found = find_encoder(path, with_text=with_text)
    if given is not None:
        check_config(given, source, path)
        if found is not None and isinstance(given, PeConfig):
            check_agreement(given, found.config, source)
        return given
    refuse_adapter(path)
    config = find_config(path) if found is None else found.config
    if config is None:
        weight_files(path)  # says so if there is nothing at the path, or more than one model
        hub = find_hub_config(path)
        beside = "no params.json, config.json, open_clip_config.json or model.json is beside it"
        if hub is not None:
            beside = f"{hub.file.name} beside it describes {hub.label}, which is no PE or PLM"
        raise InputError(f"--checkpoint needs --config, the architecture as JSON: {beside}")
    return config


def find_images(options: ExportOptions) -> ImageSpec | None:
    """Image preprocessing in the file of --config or the one beside the weights; else None."""
    if options.config is not None and _is_encoder(Path(options.config)):
        return read_encoder(Path(options.config), with_text=False).image
    path = _weights_path(options)
    found = None if path is None else find_encoder(path, with_text=False)
    return None if found is None else found.image


def _weights_path(options: ExportOptions) -> Path | None:
    """The checkpoint that the options name by a path; None if it has to be found or made."""
    if options.checkpoint is not None:
        return Path(options.checkpoint)
    weights = options.weights
    return None if weights is None or weights in ("hf", "random") else Path(weights)


def _given_architecture(options: ExportOptions) -> tuple[Config | None, str]:
    """The architecture that options give without the checkpoint, and the option that gives it."""
    if options.checkpoint is None:
        assert options.model is not None
        if options.model in _DEMOS:
            config = _read_config(_DEMOS[options.model][0])
        else:
            config = get_config(options.model, others=tuple(_DEMOS))
        return config, f"--model {options.model}"
    if options.config is None:
        return None, ""
    path = Path(options.config)
    if _is_encoder(path):
        return read_encoder(path, with_text=options.towers != "vision").config, path.name
    return _read_config(path), path.name


def _is_encoder(config: Path) -> bool:
    """Whether the file of --config is one of timm or open_clip."""
    try:
        return is_encoder_file(config)
    except CheckpointError:  # `_read_config` says what is wrong with it
        return False


def demo_configs() -> dict[str, Config]:
    """Architectures of the demo models by name."""
    return {name: _read_config(config) for name, (config, _) in _DEMOS.items()}


# Architecture and weights of each demo model.
_DEMOS: Mapping[str, tuple[Path, Path]] = {
    PE_DEMO: (config_path(), weights_path()),
    PLM_DEMO: (language_model_path() / CONFIG_NAME, language_model_path()),
}


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
    return parse_architecture(values, path)


def refuse_foreign(options: ExportOptions, family: Family) -> None:
    """InputError for an option that is set and belongs to another family than the model's."""
    for other in FAMILIES.values():
        for name in other.export_options if other is not family else ():
            value = getattr(options, name)
            if value is not None and value is not False:
                raise InputError(f"--{name.replace('_', '-')} is for {other.label}")


@dataclass(frozen=True, slots=True)
class WeightsPlace:
    """Location of weights.

    Attributes:
        path: file or folder; None for random weights.
        license_note: licence of the weights; None if it is unknown.
    """

    path: Path | None
    license_note: str | None = None


def locate_weights(options: ExportOptions, report: Report) -> WeightsPlace:
    """Locates the weights; downloads those of a released model unless they are in the cache.

    Raises:
        CheckpointError: the download failed.
    """
    if options.weights == "random":
        return WeightsPlace(None)
    path = _weights_path(options)
    if path is not None:
        return WeightsPlace(path)
    assert options.model is not None
    if options.model in _DEMOS:
        return WeightsPlace(_DEMOS[options.model][1], LICENSE_NOTE)
    report(f"looking for {options.model} in the hub cache, or downloading it")
    license_note = family_of(get_config(options.model)).license
    return WeightsPlace(download(options.model), license_note)


def model_name(options: ExportOptions) -> str:
    """Name of the model in its package."""
    if options.model is not None:
        name = options.model
    else:
        assert options.checkpoint is not None
        path = Path(options.checkpoint).absolute()
        # Files of these names are told apart by their folders only.
        common = path.name.startswith(_COMMON_NAMES) and not path.is_dir()
        name = path.parent.name if common else path.stem
    return name.removeprefix("facebook/").replace("Perception-LM-", "PLM-")
