"""What a run leaves on disk: a resumable state, and weights in the reference's names.

Every file appears whole or not at all: it is written beside its place and then renamed. The state
holds tensors and plain values only, so that loading it runs no code.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from perception_rt.checkpoint.source import open_checkpoint, state_dict
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError
from perception_rt.models.pe import PerceptionEncoder
from training.config import TrainConfig, leaves

STATE_FILE = "state.pt"
WEIGHTS_FILE = "model.safetensors"
MODEL_FILE = "model.json"
RECIPE_FILE = "recipe.yaml"
METRICS_FILE = "metrics.jsonl"

_FORMAT = 1


def write_whole(path: Path, write: Callable[[Path], None]) -> None:
    """Calls `write` with a temporary path beside `path`, then puts the result in place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file, whole or not at all."""
    write_whole(path, lambda temporary: _write_text(temporary, text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def save_state(
    path: Path,
    *,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    config: TrainConfig,
) -> None:
    """Saves everything that `step` steps have changed.

    The data and every random draw are functions of (seed, step, rank), so the step stands for them.
    """
    state = {
        "format": _FORMAT,
        "step": step,
        "config": dict(_decisive(config)),
        "model": model.state_dict(),
        "optimizer": optimizer.state_dict(),
    }
    write_whole(path, lambda temporary: torch.save(state, temporary))


def load_state(
    path: Path, *, model: nn.Module, optimizer: torch.optim.Optimizer, config: TrainConfig
) -> int:
    """Restores a saved state and returns its step.

    Raises:
        CheckpointError: the file is damaged, or belongs to a run that computes something else; the
            message names the first setting that differs.
    """
    try:
        state = torch.load(path, weights_only=True)
    except Exception:  # a damaged file raises whatever it makes the reader trip over
        raise CheckpointError(f"{path.name} is damaged or not a training state") from None
    if not isinstance(state, dict) or state.get("format") != _FORMAT:
        raise CheckpointError(f"{path.name} is not a training state of format {_FORMAT}")
    saved, wanted = state["config"], dict(_decisive(config))
    for key in [*wanted, *saved]:
        if saved.get(key) != wanted.get(key):
            raise CheckpointError(
                f"{path.name} was saved with {key} = {saved.get(key)}, not {wanted.get(key)}"
            )
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    step: int = state["step"]
    return step


def _decisive(config: TrainConfig) -> list[tuple[str, Any]]:
    """The settings that decide what a run computes: all but how it reports and saves."""
    settings = leaves(config.to_dict())
    return [(k, v) for k, v in settings if not k.startswith("run.") or k == "run.seed"]


def export_weights(
    model: PerceptionEncoder, weights: Path, *, dtype: torch.dtype = torch.float32
) -> None:
    """Writes safetensors in the reference's names, and the architecture as JSON beside them."""
    tensors = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    save_checkpoint(tensors, weights)
    write_text(weights.with_suffix(".json"), json.dumps(model.config.to_dict(), indent=2) + "\n")


def load_weights(weights: Path) -> PerceptionEncoder:
    """Reads what `export_weights` wrote as a float32 model in evaluation mode.

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
