"""Reads the golden files: an architecture and the reference's weights under its own keys."""

import json
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from perception_rt.config import PeConfig

_GOLDEN = Path(__file__).parents[1] / "golden"
VISION_FILES = ("pe_core_cls", "pe_core_nocls_mlp", "pe_lang", "pe_spatial")
FILES = (*VISION_FILES, "clip_core")


def read_golden(name: str) -> tuple[PeConfig, dict[str, Tensor]]:
    """The configuration and the reference-named weights of a golden file."""
    with safe_open(_GOLDEN / f"{name}.safetensors", framework="pt") as file:
        config = PeConfig.from_dict(json.loads(file.metadata()["config"]))
        prefix = "weights."
        keys = [key for key in file.keys() if key.startswith(prefix)]  # noqa: SIM118
        return config, {key.removeprefix(prefix): file.get_tensor(key) for key in keys}


def our_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under our names, renamed independently of the tables under test."""
    if "logit_scale" not in weights:
        return {f"visual.{key}": tensor for key, tensor in weights.items()}
    return {
        key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}": tensor
        for key, tensor in weights.items()
    }
