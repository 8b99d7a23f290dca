"""Finds a model's weight files, configuration and tokenizer at a path.

A hub snapshot has an index or one safetensors file, and Meta's `params.json` and `tokenizer.model`
in `original/`. A checkpoint of Meta's own code has all files in one folder, with the weights in
`consolidated.pth` or in `consolidated.00.pth`, `consolidated.01.pth`, ...
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perception_rt.errors import CheckpointError, InputError
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.tiles import TileSpec

INDEX_NAME = "model.safetensors.index.json"
CONFIG_NAME = "params.json"
TOKENIZER_NAME = "tokenizer.model"
HF_TOKENIZER_NAME = "tokenizer.json"
ORIGINAL_FOLDER = "original"
TORCH_SUFFIXES = (".pt", ".pth", ".bin")

# Fields of `params.json` under `data`, and our names.
_TILE_FIELDS = {
    "vision_input_type": "mode",
    "max_num_tiles": "max_tiles",
    "max_video_frames": "max_frames",
}
_CONSOLIDATED = "consolidated.pth"
_CONSOLIDATED_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_INDEX_BYTES = 64 * 1024 * 1024
_CONFIG_BYTES = 1024 * 1024
_SHARDS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightFiles:
    """The files of one model, all in one format.

    Attributes:
        label: base name of the path, or of the file found in it, for messages.
        paths: one or more existing files.
    """

    label: str
    paths: tuple[Path, ...]


def weight_files(path: Path) -> WeightFiles:
    """Returns the weight files at a path: a file, an index of shards, or a directory with either.

    In a directory, an index takes precedence over a single safetensors file, and that over Meta's
    `consolidated` files.

    Raises:
        CheckpointError: there are no weights, or some files are missing.
    """
    try:
        found = (
            _in_directory(path) if path.is_dir() else WeightFiles(label=path.name, paths=(path,))
        )
        if found.paths[0].name.endswith(".index.json") and found.paths[0].is_file():
            found = WeightFiles(label=found.label, paths=_shards(found.paths[0]))
        absent = [file for file in found.paths if not file.is_file()]
    except OSError as error:
        raise CheckpointError(f"cannot open {path.name:.80}: {error.strerror}") from None
    if absent and len(found.paths) == 1:
        raise CheckpointError(f"no weights file at {path}")
    if absent:
        raise CheckpointError(
            f"cannot read {absent[0].name}: it is missing from the {len(found.paths)} shards of "
            f"{found.label}"
        )
    return found


def _in_directory(directory: Path) -> WeightFiles:
    index = directory / INDEX_NAME
    if index.is_file():
        return WeightFiles(label=index.name, paths=(index,))
    found = sorted(directory.glob("*.safetensors"))
    if len(found) == 1:
        return WeightFiles(label=found[0].name, paths=(found[0],))
    if not found:
        if (directory / _CONSOLIDATED).is_file():
            return WeightFiles(label=_CONSOLIDATED, paths=(directory / _CONSOLIDATED,))
        parts = _consolidated_parts(directory)
        if parts:
            return WeightFiles(label="consolidated.*.pth", paths=parts)
    raise CheckpointError(
        f"directory {directory} must hold {INDEX_NAME}, {_CONSOLIDATED} or exactly one "
        f".safetensors file; it has {len(found)} .safetensors files"
    )


def _consolidated_parts(directory: Path) -> tuple[Path, ...]:
    """`consolidated.00.pth` up to the last one, whether or not all between exist."""
    names = (file.name for file in directory.glob("consolidated.*.pth"))
    ranks = [int(match[1]) for match in map(_CONSOLIDATED_PART.fullmatch, names) if match]
    return tuple(
        directory / f"consolidated.{rank:02d}.pth" for rank in range(max(ranks, default=-1) + 1)
    )


def _shards(index: Path) -> tuple[Path, ...]:
    """The shard files of an index; names with a folder are refused."""
    content = _read_json(index, _INDEX_BYTES)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index.name} has no object 'weight_map'")
    names = set(table.values()) if all(isinstance(v, str) for v in table.values()) else {""}
    for name in sorted(names):
        if not name.endswith(".safetensors") or any(c in name for c in "/\\\0"):
            raise CheckpointError(
                f"{index.name} names a shard {name!a:.80}: it must be a .safetensors file name "
                "without a folder"
            )
    if len(names) > _SHARDS:
        raise CheckpointError(f"{index.name} has {len(names)} shards; the limit is {_SHARDS}")
    return tuple(index.parent / name for name in sorted(names))


def _read_json(path: Path, limit: int) -> Any:
    try:
        if path.stat().st_size > limit:
            raise CheckpointError(f"{path.name} is larger than the limit of {limit} bytes")
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path.name} is not a readable JSON file") from error


def find_config(path: Path | str) -> PlmConfig | None:
    """Reads the language model's `params.json`, beside the weights or in `original/`.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        The architecture; None without such a file.

    Raises:
        CheckpointError: the file is not JSON.
        InputError: the file does not describe a Perception Language Model.
    """
    file = _beside(Path(path), CONFIG_NAME)
    if file is None:
        return None
    try:
        return PlmConfig.from_dict(_read_json(file, _CONFIG_BYTES))
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None


def find_tiles(path: Path | str, tile_size: int) -> TileSpec:
    """Reads a language model's image and video preprocessing from its `params.json`.

    Missing settings, or a missing file, give the settings of the released models.

    Args:
        path: as for `open_checkpoint`.
        tile_size: image size of the model's vision tower in pixels.

    Raises:
        CheckpointError: the file is not JSON.
        InputError: a setting is unusable; the message names it.
    """
    file = _beside(Path(path), CONFIG_NAME)
    content = {} if file is None else _read_json(file, _CONFIG_BYTES)
    data = content.get("data") if isinstance(content, dict) else None
    given = data if isinstance(data, dict) else {}
    fields = {ours: given[theirs] for theirs, ours in _TILE_FIELDS.items() if theirs in given}
    return TileSpec.from_dict({"tile_size": tile_size, **fields})


def find_tokenizer(path: Path | str) -> Path | None:
    """Finds the tokenizer's file, beside the weights or in `original/`.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        Path of `tokenizer.model`, else of the `tokenizer.json` of transformers, else None.
    """
    return _beside(Path(path), TOKENIZER_NAME) or _beside(Path(path), HF_TOKENIZER_NAME)


def _beside(path: Path, name: str) -> Path | None:
    directory = path if path.is_dir() else path.parent
    candidates = (directory / name, directory / ORIGINAL_FOLDER / name)
    return next((file for file in candidates if file.is_file()), None)
