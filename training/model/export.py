"""Writes trained weights under the reference's names, for `perception-export --checkpoint`."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from perception_rt.checkpoint.source import open_checkpoint, state_dict
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from training.atomic_files import write_bytes, write_text
from training.recipe.schema import LanguageConfig

WEIGHTS_FILE = "model.safetensors"


def export_encoder(
    weights: Mapping[str, Tensor],
    config: PeConfig,
    folder: Path,
    *,
    name: str = WEIGHTS_FILE,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a Perception Encoder: safetensors, and its architecture as JSON beside them.

    Args:
        weights: tensors by parameter name.
        config: architecture.
        folder: existing folder to write to.
        name: file name of the weights.
        dtype: dtype to store.
    """
    save_checkpoint({key: tensor.to(dtype) for key, tensor in weights.items()}, folder / name)
    architecture = json.dumps(config.to_dict(), indent=2) + "\n"
    write_text((folder / name).with_suffix(".json"), architecture)


def export_language_model(
    weights: Mapping[str, Tensor],
    config: LanguageConfig,
    tokenizer: TokenizerSpec,
    tokenizer_file: bytes,
    folder: Path,
    *,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Writes a folder with weights, `params.json` and tokenizer.

    `params.json` holds the architecture under `model` and, like the reference's, the rules that
    turn images and videos into tiles under `data`.

    Args:
        weights: tensors by parameter name.
        config: the recipe.
        tokenizer: tokenizer specification.
        tokenizer_file: content of the tokenizer's file.
        folder: folder to create or fill.
        dtype: dtype to store.
    """
    data = config.data
    params = {
        "model": config.model.to_dict(),
        "data": {
            "vision_input_type": data.mode,
            "max_num_tiles": data.max_tiles,
            "max_video_frames": data.max_frames,
            "conversation_format": data.conversation,
        },
    }
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {key: tensor.to(dtype) for key, tensor in weights.items()}
    save_checkpoint(tensors, folder / WEIGHTS_FILE, layout="original")
    assert tokenizer.file is not None
    write_bytes(folder / tokenizer.file, tokenizer_file)
    write_text(folder / "params.json", json.dumps(params, indent=2) + "\n")


def load_weights(weights: Path) -> PerceptionEncoder:
    """Loads the output of `export_encoder` as a float32 model in evaluation mode.

    Args:
        weights: the safetensors file; the architecture is in the JSON file beside it.

    Raises:
        CheckpointError: a file is missing or damaged, or the weights do not fit the architecture.
    """
    architecture = weights.with_suffix(".json")
    try:
        config = PeConfig.from_dict(json.loads(architecture.read_text("utf-8")))
    except (OSError, ValueError):
        raise CheckpointError(f"{architecture} is missing or not an architecture") from None
    model = PerceptionEncoder(config)
    model.load_state_dict(state_dict(open_checkpoint(weights, config), model.state_dict()))
    return model.eval()
