"""Finds a model's weight files, configuration and tokenizer at a path.

A hub snapshot has an index or one safetensors file, a `config.json`, and Meta's `params.json` and
`tokenizer.model` in `original/`. A checkpoint of Meta's own code has all files in one folder, with
the weights in `consolidated.pth` or in `consolidated.00.pth`, `consolidated.01.pth`, ... Older
releases of transformers write `pytorch_model.bin`, with or without an index. Training in this
project writes `model.json` beside an encoder.
"""

import re
import shlex
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from perception_rt.checkpoint.git_lfs import refuse_pointer
from perception_rt.checkpoint.hf_config import HubConfig, find_hub_config
from perception_rt.checkpoint.hf_plm import PlmFacts, check_agreement
from perception_rt.checkpoint.hf_processor import (
    ProcessorFacts,
    check_processor,
    read_end_ids,
    required,
)
from perception_rt.checkpoint.json_files import Section, find_beside, folder_of, read_json
from perception_rt.errors import CheckpointError, InputError
from perception_rt.families import Config, parse_config
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.tiles import TileSpec

INDEX_NAME = "model.safetensors.index.json"
TORCH_NAME = "pytorch_model.bin"
TORCH_INDEX_NAME = f"{TORCH_NAME}.index.json"
CONFIG_NAME = "params.json"
TOKENIZER_NAME = "tokenizer.model"
HF_TOKENIZER_NAME = "tokenizer.json"
RUN_CONFIG = "model.json"  # the architecture beside the weights of a finished run
RUN_CHECKPOINTS = "checkpoints"  # folder of an unfinished one
RUN_LAST = "LAST"  # file in it that names the newest checkpoint
RUN_MANIFEST = "checkpoint.json"  # file in each checkpoint
ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_NAME = "adapter_model"  # without its suffix
_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".pt.tar", ".pth.tar")
SUFFIXES = (".safetensors", *_TORCH_SUFFIXES)

# Fields of `params.json` under `data`, and our names.
_TILE_FIELDS = {
    "vision_input_type": "mode",
    "max_num_tiles": "max_tiles",
    "max_video_frames": "max_frames",
}
_TEMPLATES = (
    "chat_template.jinja",
    "chat_template.json",
    "processor_config.json",
    "tokenizer_config.json",
)
_CONSOLIDATED = "consolidated.pth"
_CONSOLIDATED_PART = re.compile(r"consolidated\.(\d\d)\.pth")
_SHARD = re.compile(r"-\d+-of-\d+\.\w+$")
_INDEX_BYTES = 64 * 1024 * 1024
_SHARDS = 1024
_LISTED = 5
# What training code saves beside weights.
_STATES = re.compile(r"(optimizer|scheduler|scaler|training_args|rng_state\w*)\.(pt|pth|bin)")
_DISTRIBUTED = ".metadata"  # of torch.distributed.checkpoint


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

    In a directory, an index takes precedence over a single safetensors file, that over Meta's
    `consolidated` files, and those over `pytorch_model.bin` and over a single file of torch.

    Raises:
        CheckpointError: there are no weights, some files are missing or are pointers of Git LFS, or
            the path is that of an adapter.
        InputError: the directory is an unfinished training run, or a checkpoint of one.
    """
    try:
        check_run(path)
        refuse_adapter(path)
        found = (
            _in_directory(path) if path.is_dir() else WeightFiles(label=path.name, paths=(path,))
        )
        if found.paths[0].name.endswith(".index.json") and found.paths[0].is_file():
            found = WeightFiles(label=found.label, paths=_shards(found.paths[0]))
        _refuse_shard(path)
        absent = [file for file in found.paths if not file.is_file()]
        for file in found.paths if not absent else ():
            refuse_pointer(file)
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


def _refuse_shard(path: Path) -> None:
    """CheckpointError for one of several shards whose index is beside it."""
    index = path.with_name(TORCH_INDEX_NAME if is_torch_file(path) else INDEX_NAME)
    if _SHARD.search(path.name) and index.is_file():
        raise CheckpointError(f"{path.name} is one shard of a model: pass {index}, or its folder")


def check_run(path: Path) -> None:
    """InputError for a training run that has not written its weights yet, with the command for it.

    The same for one of its checkpoints, which is for resuming only.
    """
    folders = (path, path / RUN_CHECKPOINTS)
    has_checkpoints = any((folder / RUN_LAST).is_file() for folder in folders)
    is_run = has_checkpoints and not any(path.glob("*.safetensors"))
    if is_run or (path / RUN_MANIFEST).is_file():
        kind = "an unfinished training run" if is_run else "a checkpoint of a training run"
        raise InputError(
            f"{path} is {kind}: python training/consolidate.py "
            f"{shlex.quote(str(path))} OUT makes a folder OUT from it, which can be exported"
        )


def _in_directory(directory: Path) -> WeightFiles:
    if (directory / _DISTRIBUTED).is_file():
        raise CheckpointError(
            f"directory {directory} is a distributed checkpoint: python -m "
            f"torch.distributed.checkpoint.format_utils dcp_to_torch {directory} model.pt makes a "
            "file of it"
        )
    for name in (INDEX_NAME, TORCH_INDEX_NAME):
        index = directory / name
        if index.is_file() and (name == INDEX_NAME or not any(directory.glob("*.safetensors"))):
            return WeightFiles(label=index.name, paths=(index,))
    found = _candidates(directory)
    safetensors = [file for file in found if not is_torch_file(file)]
    if not safetensors:
        if (directory / _CONSOLIDATED).is_file():
            return WeightFiles(label=_CONSOLIDATED, paths=(directory / _CONSOLIDATED,))
        parts = _consolidated_parts(directory)
        if parts:
            return WeightFiles(label="consolidated.*.pth", paths=parts)
        if (directory / TORCH_NAME).is_file():
            return WeightFiles(label=TORCH_NAME, paths=(directory / TORCH_NAME,))
    single = safetensors or found
    if len(single) == 1:
        return WeightFiles(label=single[0].name, paths=(single[0],))
    if not found:
        raise CheckpointError(
            f"directory {directory} has no weights: neither {INDEX_NAME} nor a file that ends in "
            f"{', '.join(SUFFIXES)}"
        )
    names = ", ".join(file.name for file in found[:_LISTED])
    if all(_SHARD.search(file.name) for file in single):
        lost = TORCH_INDEX_NAME if is_torch_file(single[0]) else INDEX_NAME
        raise CheckpointError(
            f"directory {directory} has {len(single)} shards of one model, {single[0].name} and so "
            f"on, without their index: put {lost} beside them"
        )
    more = ", ..." if len(found) > _LISTED else ""
    raise CheckpointError(
        f"directory {directory} has {len(found)} weight files and no {INDEX_NAME}: pass one of "
        f"{names}{more}"
    )


def _candidates(directory: Path) -> list[Path]:
    """The weight files in a directory by name, without adapters and states of optimizers."""
    return sorted(
        file
        for file in directory.iterdir()
        if file.name.endswith(SUFFIXES)
        and not file.is_dir()
        and not file.name.startswith((".", ADAPTER_NAME))
        and not _STATES.fullmatch(file.name)
    )


def is_torch_file(path: Path) -> bool:
    """Whether a file's name is that of a file of `torch.save`."""
    return path.name.endswith(_TORCH_SUFFIXES)


def refuse_adapter(path: Path) -> None:
    """CheckpointError if a path leads to a LoRA adapter instead of a whole model."""
    folder = folder_of(path)
    alone = path.name.startswith(ADAPTER_NAME) if path != folder else not _candidates(folder)
    if alone and (folder / ADAPTER_CONFIG_NAME).is_file():
        raise CheckpointError(
            f"{path} is a LoRA adapter, not a whole model: pass its base model, and --adapter "
            f"{folder}"
        )


def _consolidated_parts(directory: Path) -> tuple[Path, ...]:
    """`consolidated.00.pth` up to the last one, whether or not all between exist."""
    names = (file.name for file in directory.glob("consolidated.*.pth"))
    ranks = [int(match[1]) for match in map(_CONSOLIDATED_PART.fullmatch, names) if match]
    return tuple(
        directory / f"consolidated.{rank:02d}.pth" for rank in range(max(ranks, default=-1) + 1)
    )


def _shards(index: Path) -> tuple[Path, ...]:
    """The shard files of an index, in the index's format; names with a folder are refused."""
    content = read_json(index, _INDEX_BYTES)
    table = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(table, dict) or not table:
        raise CheckpointError(f"{index.name} has no object 'weight_map'")
    suffix = ".bin" if index.name.endswith(".bin.index.json") else ".safetensors"
    names = set(table.values()) if all(isinstance(v, str) for v in table.values()) else {""}
    for name in sorted(names):
        if not name.endswith(suffix) or any(c in name for c in "/\\\0"):
            raise CheckpointError(
                f"{index.name} names a shard {name!a:.80}: it must be a {suffix} file name "
                "without a folder"
            )
    if len(names) > _SHARDS:
        raise CheckpointError(f"{index.name} has {len(names)} shards; the limit is {_SHARDS}")
    return tuple(index.parent / name for name in sorted(names))


def find_config(path: Path | str) -> Config | None:
    """Reads the architecture beside the weights: of `params.json`, `config.json` or `model.json`.

    `params.json` may be in `original/`. `model.json` is what this project's training writes.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        The architecture; None without such a file, or for a `config.json` of another model.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: a file lacks a field or disagrees with another, or the path is an unfinished
            training run.
    """
    path = Path(path)
    check_run(path)
    file = find_beside(path, CONFIG_NAME)
    if file is not None:
        config = _named(file, PlmConfig.from_dict)
        check_config(config, file.name, path)
        return config
    facts = _plm_facts(find_hub_config(path), path)
    if facts is not None:
        return facts.config()
    file = _of_run(path)
    return None if file is None else _named(file, parse_config)


def parse_architecture(values: Any, file: Path) -> Config:
    """The architecture in the JSON values of a file: our fields, or a PerceptionLM's `config.json`.

    Raises:
        InputError: names unknown, missing and mistyped keys.
    """
    if not isinstance(values, dict):
        return parse_config(values)
    facts = _plm_facts(HubConfig(file=file, root=Section(file.name, values)), file)
    return parse_config(values) if facts is None else facts.config()


def check_config(
    config: Config, source: str, path: Path | str, *, except_length: bool = False
) -> None:
    """InputError if the `config.json` beside weights disagrees with an architecture.

    Args:
        config: the architecture.
        source: its source, for messages.
        path: as for `open_checkpoint`.
        except_length: whether the longest sequence may differ.
    """
    facts = _plm_facts(find_hub_config(path), Path(path))
    if facts is not None and isinstance(config, PlmConfig):
        check_agreement(config, source, facts, except_length=except_length)


def _plm_facts(hub: HubConfig | None, path: Path) -> PlmFacts | None:
    """Content of a PerceptionLM's `config.json`, compared with its processor; else None."""
    if hub is None or not hub.is_plm:
        return None
    facts = PlmFacts(hub)
    check_processor(path, facts)
    return facts


def _of_run(path: Path) -> Path | None:
    """The architecture that training writes beside the weights, under their name."""
    file = path / RUN_CONFIG if path.is_dir() else path.with_suffix(".json")
    return file if file != path and file.is_file() else None


def _named(file: Path, read: Callable[[Any], Config]) -> Config:
    """The architecture in a file, which errors name."""
    try:
        return read(read_json(file))
    except InputError as error:
        raise InputError(f"{file.name}: {error}") from None


def find_tiles(path: Path | str, tile_size: int) -> TileSpec:
    """Reads a language model's image and video preprocessing: `params.json`, processor's files.

    Without a `config.json`, missing settings or a missing file give the settings of the released
    models.

    Args:
        path: as for `open_checkpoint`.
        tile_size: image size of the model's vision tower in pixels.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: a setting is unusable or missing, or two files disagree; the message names it.
    """
    path = Path(path)
    file = find_beside(path, CONFIG_NAME)
    content = {} if file is None else read_json(file)
    data = content.get("data") if isinstance(content, dict) else None
    given = data if isinstance(data, dict) else {}
    fields = {ours: given[theirs] for theirs, ours in _TILE_FIELDS.items() if theirs in given}
    facts = None
    hub = find_hub_config(path)
    if hub is not None and hub.is_plm:
        facts = ProcessorFacts(path, tile_size)
        for theirs, ours in _TILE_FIELDS.items():
            fact = facts.found.get(ours)
            if fact is not None and fields.get(ours, fact.value) != fact.value:
                raise InputError(
                    f"data.{theirs} is {fields[ours]} in {CONFIG_NAME}, and {fact.name} is "
                    f"{fact.value} in {facts.file}; they must agree"
                )
            if fact is None and ours not in fields and ours != "max_frames":
                raise required(facts.name(theirs))
        fields |= {ours: fact.value for ours, fact in facts.found.items()}
    try:
        return TileSpec.from_dict({"tile_size": tile_size, **fields})
    except InputError as error:
        source = CONFIG_NAME if facts is None else facts.file
        concerned = [t for t, ours in _TILE_FIELDS.items() if f"image.{ours} " in str(error)]
        names = "".join(f" ({name})" for name in concerned)
        raise InputError(f"{source}{names}: {error}") from None


def find_tokenizer(path: Path | str) -> Path | None:
    """Finds the tokenizer's file, beside the weights or in `original/`.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        Path of `tokenizer.model`, else of the `tokenizer.json` of transformers, else None.
    """
    path = Path(path)
    found = find_beside(path, TOKENIZER_NAME) or find_beside(path, HF_TOKENIZER_NAME)
    if found is not None:
        refuse_pointer(found)
    return found


def find_end_ids(path: Path | str) -> tuple[int, ...] | None:
    """Reads the tokens that end an answer from transformers' files beside the weights.

    Args:
        path: as for `open_checkpoint`.

    Returns:
        Token ids; None if the tokenizer's own end tokens are meant.

    Raises:
        CheckpointError: a file is not JSON.
        InputError: the ids are unusable, or `config.json` is the only description and has none.
    """
    path = Path(path)
    hub = find_hub_config(path)
    if hub is None or not hub.is_plm:
        return None
    ids = read_end_ids(path, hub.root)
    if ids is None and find_beside(path, CONFIG_NAME) is None:
        raise hub.root.error(
            "eos_token_id is missing, also in generation_config.json: add the ids of the tokens "
            "that end an answer"
        )
    return ids


def find_chat_template(path: Path | str) -> str | None:
    """Name of transformers' file with a chat template beside the weights; None without one.

    Args:
        path: as for `open_checkpoint`.

    Raises:
        CheckpointError: a file is not JSON.
    """
    path = Path(path)
    for name in _TEMPLATES:
        file = find_beside(path, name)
        if file is not None and (file.suffix != ".json" or "chat_template" in read_json(file)):
            return name
    return None
