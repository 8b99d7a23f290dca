"""Finds the configuration file of timm or open_clip at a checkpoint and reads its encoder."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from perception_rt.checkpoint.json_fields import as_object
from perception_rt.checkpoint.json_files import folder_of, read_json
from perception_rt.checkpoint.open_clip_config import open_clip_encoder
from perception_rt.checkpoint.timm_encoder import WRAPPER, Encoder, timm_encoder
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.errors import InputError

TIMM_CONFIG = "config.json"
OPEN_CLIP_CONFIG = "open_clip_config.json"
_CONFIGS = (TIMM_CONFIG, OPEN_CLIP_CONFIG)
_OPEN_CLIP_PREFIX = "open_clip_"  # of open_clip's weights files, which may lie beside timm's
_WEIGHTS = ("*.safetensors", "*.bin")
_MAX_BYTES = 16 * 1024 * 1024  # timm stores names of up to 21,841 classes
# Fields that two descriptions of the same weights may differ in.
_FREE = frozenset({"drop_path", "proj_bias", "timm_grid"})


def find_encoder(path: Path | str, *, with_text: bool = True) -> Encoder | None:
    """Reads the encoder from `config.json` of timm or `open_clip_config.json` at a checkpoint.

    Args:
        path: as for `open_checkpoint`. Where both files are present, a weights file whose name
            starts with `open_clip_` belongs to open_clip's.
        with_text: whether the text tower is wanted.

    Returns:
        None if neither file is there; a `config.json` of another library is not looked at.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: names the file, and the field that is unknown, contradictory or not supported;
            or both files are in the folder, and `path` names no weights file.
    """
    path = Path(path)
    folder = folder_of(path)
    files = [file for name in _CONFIGS if is_encoder_file(file := folder / name)]
    if not files:
        return None
    file = files[0] if len(files) == 1 else folder / _chosen(path, folder)
    return read_encoder(file, with_text=with_text)


def is_encoder_file(file: Path) -> bool:
    """Whether a file is a configuration of timm or open_clip; CheckpointError if it is not JSON."""
    return file.is_file() and _library(file.name, read_json(file, _MAX_BYTES)) is not None


def read_encoder(file: Path, *, with_text: bool = True) -> Encoder:
    """Reads the encoder from a configuration of timm or open_clip; errors as `find_encoder`."""
    values = read_json(file, _MAX_BYTES)
    try:
        data = as_object(values, "the content")
        if _library(file.name, values) == OPEN_CLIP_CONFIG:
            return open_clip_encoder(data, with_text=with_text)
        return timm_encoder(data)
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None


def _library(name: str, values: object) -> str | None:
    """The usual name of a configuration like this one; None for one of another library."""
    fields = values if isinstance(values, Mapping) else {}
    if name == OPEN_CLIP_CONFIG or "model_cfg" in fields:
        return OPEN_CLIP_CONFIG
    is_timm = fields.get("model_type", WRAPPER) == WRAPPER
    return TIMM_CONFIG if "architecture" in fields and is_timm else None


def _chosen(path: Path, folder: Path) -> str:
    """The configuration that belongs to a weights file, of the two in its folder."""
    if path == folder:
        names = sorted(file.name for pattern in _WEIGHTS for file in folder.glob(pattern))
        raise InputError(
            f"{folder} has {TIMM_CONFIG} of timm and {OPEN_CLIP_CONFIG}: name the weights file to "
            f"export, one of {', '.join(names)}"
        )
    return OPEN_CLIP_CONFIG if path.name.startswith(_OPEN_CLIP_PREFIX) else TIMM_CONFIG


def check_agreement(given: PeConfig, found: PeConfig, source: str) -> None:
    """Checks that an architecture that was asked for is the one of the checkpoint's configuration.

    Args:
        given: the architecture; without a text tower, only the vision towers are compared.
        found: the architecture in the folder.
        source: what gave the first one, such as "--config".

    Raises:
        InputError: names the fields that differ, with both values.
    """
    towers = [("vision", _fixed(given.vision), _fixed(found.vision))]
    if given.text is not None and found.text is not None:
        towers.append(("text", given.text.to_dict(), found.text.to_dict()))
    differences = [
        f"{tower}.{name} is {ours[name]!r}, not {theirs[name]!r}"
        for tower, ours, theirs in towers
        for name in ours
        if name not in _FREE and ours[name] != theirs[name]
    ]
    if differences:
        raise InputError(
            f"{source} contradicts the configuration beside the weights: {'; '.join(differences)}"
        )


def _fixed(config: VisionConfig) -> dict[str, Any]:
    """The fields as far as weights depend on them."""
    return config.to_dict() | {
        "mlp_ratio": config.mlp_dim / config.width,
        "ls_init_value": config.ls_init_value is not None,
        "pool_type": "attn" if config.pool_type == "attn" else "without weights",
    }
