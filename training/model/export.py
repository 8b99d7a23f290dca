"""What a run leaves on disk: how files are written, and weights in the reference's names.

Every file appears whole or not at all: it is written beside its place and then renamed.
"""

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
    """Writes safetensors in the reference's names, and the architecture as JSON beside them."""
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
    """Writes a folder that `perception-export --checkpoint` takes: weights, params.json, tokenizer.

    `params.json` has the architecture under `model` and, as the reference's, how images and videos
    become tiles under `data`.
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
    """Reads what `export_encoder` wrote as a float32 model in evaluation mode.

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
