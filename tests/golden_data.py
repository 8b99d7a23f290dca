"""Reads the golden files: configuration, weights under our names, inputs and outputs."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

from perception_rt.config import PeConfig
from perception_rt.plm_config import PlmConfig

GOLDEN = Path(__file__).parent / "golden"
VISION_FILES = ("pe_core_cls", "pe_core_nocls_mlp", "pe_lang", "pe_spatial")
PLM_FILES = ("plm_tied_ropescaled", "plm_untied_noscale")
TIED_COPY = "output.tied_module.weight"


@dataclass(frozen=True)
class Golden:
    """One golden file; also a `WeightSource`."""

    path: Path
    config: PeConfig | PlmConfig
    weights: dict[str, torch.Tensor]
    inputs: dict[str, np.ndarray]
    outputs: dict[str, np.ndarray]

    @property
    def provenance(self) -> dict[str, str | int]:
        return {"source": "golden"}

    def load(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.weights[name][start:stop]

    def config_dict(self) -> dict:
        """The metadata as it stands in the file: the reference's own field names."""
        with safe_open(self.path, "pt") as file:
            return json.loads(file.metadata()["config"])


def golden(name: str) -> Golden:
    """A Perception Encoder."""
    data = _read(name, PeConfig)
    return replace(data, weights={_ours(k, data.config): v for k, v in data.weights.items()})


def plm_golden(name: str) -> Golden:
    """A Perception Language Model; a tied head's copy of the embedding is not in its weights."""
    data = _read(name, PlmConfig)
    return replace(data, weights={k: v for k, v in data.weights.items() if k != TIED_COPY})


def _read(name: str, kind: type[PeConfig] | type[PlmConfig]) -> Golden:
    path = GOLDEN / f"{name}.safetensors"
    with safe_open(path, "pt") as file:
        config = kind.from_dict(json.loads(file.metadata()["config"]))
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118

    def part(prefix: str) -> dict[str, torch.Tensor]:
        return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

    return Golden(
        path=path,
        config=config,
        weights=part("weights."),
        inputs={k: v.numpy() for k, v in part("inputs.").items()},
        outputs={k: v.numpy() for k, v in part("outputs.").items()},
    )


def _ours(key: str, config: PeConfig) -> str:
    if config.text is None:
        return f"visual.{key}"
    return key if key.startswith("visual.") or key == "logit_scale" else f"text.{key}"
