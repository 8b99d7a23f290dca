"""Reads the golden files: configuration, weights under our names, inputs and outputs."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from perception_rt.config import PeConfig

GOLDEN = Path(__file__).parent / "golden"
VISION_FILES = ("pe_core_cls", "pe_core_nocls_mlp", "pe_lang", "pe_spatial")


@dataclass(frozen=True)
class Golden:
    """One golden file; also a `WeightSource`."""

    path: Path
    config: PeConfig
    weights: dict[str, torch.Tensor]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def provenance(self) -> dict[str, str | int]:
        return {"source": "golden"}

    def load(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def config_dict(self) -> dict:
        """The metadata as it stands in the file: the reference's own field names."""
        with safe_open(self.path, "pt") as file:
            return json.loads(file.metadata()["config"])


def golden(name: str) -> Golden:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = PeConfig.from_dict(json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Golden(
        path=path,
        config=config,
        weights={_ours(k, config): v for k, v in part("weights.").items()},
        inputs={k: v.numpy() for k, v in part("inputs.").items()},
        outputs={k: v.numpy() for k, v in part("outputs.").items()},
    )


def _ours(key: str, config: PeConfig) -> str:
    if config.text is None:
        return f"visual.{key}"
    return key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}"
