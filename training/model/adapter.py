"""Writes trained LoRA updates as an adapter of PEFT.

A language model's layers have the paths of transformers' PerceptionLM, so that PEFT can load the
adapter into it. An encoder's have the names of this library, which tell the towers apart.
`perception-export --adapter` merges both.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from perception_rt.checkpoint.adapter import PREFIX
from perception_rt.checkpoint.locate import ADAPTER_CONFIG_NAME, ADAPTER_NAME
from perception_rt.checkpoint.names import stored_tensors
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.checkpoint.stored import Stored
from perception_rt.checkpoint.write import save_tensors
from perception_rt.config import PeConfig
from perception_rt.plm_config import PlmConfig
from training.atomic_files import write_text
from training.model.lora import split_updates
from training.recipe.schema import LoraConfig

ADAPTER_FOLDER = "adapter"  # within a run's folder


def export_adapter(
    weights: Mapping[str, Tensor],
    model: PeConfig | PlmConfig,
    config: LoraConfig,
    folder: Path,
    *,
    base: str | None = None,
) -> None:
    """Writes `adapter_config.json` and `adapter_model.safetensors`.

    Args:
        weights: tensors by parameter name, with `lora_a` and `lora_b` of the updated layers.
        model: architecture without updates.
        config: the recipe's section `lora`.
        folder: folder to create or fill.
        base: path or name of the base model, for PEFT's users; None if it is unknown.
    """
    shapes = {name: tuple(shape) for name, shape in expected_tensors(model).items()}
    entries = {n: Stored(name=n, shape=s, keys=(n,), shapes=(s,)) for n, s in shapes.items()}
    if isinstance(model, PlmConfig):
        table = stored_tensors("hf", shapes, model.decoder.head_dim)
        entries = {entry.name: entry for entry in table}
    tensors: dict[str, Tensor] = {}
    paths = []
    for name, (a, b) in split_updates(weights).items():
        entry = entries[name]
        (key,) = entry.keys
        # The layout may order the rows of the matrix in another way, and so those of B.
        rows = replace(entry, shape=tuple(b.shape), shapes=(tuple(b.shape),)).pack(b)
        path = key.removesuffix(".weight").removesuffix(".in_proj_weight")
        paths.append(path)
        tensors[f"{PREFIX}{path}.lora_A.weight"] = a.detach().cpu().float()
        tensors[f"{PREFIX}{path}.lora_B.weight"] = rows[key].detach().cpu().float()
    folder.mkdir(parents=True, exist_ok=True)
    save_tensors(tensors, folder / f"{ADAPTER_NAME}.safetensors")
    settings = _settings(config, paths, base)
    write_text(folder / ADAPTER_CONFIG_NAME, json.dumps(settings, indent=2) + "\n")


def _settings(config: LoraConfig, paths: list[str], base: str | None) -> dict[str, Any]:
    """PEFT's `LoraConfig`; other settings have its defaults."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "inference_mode": True,
        "r": config.rank,
        "lora_alpha": config.alpha,
        "lora_dropout": 0.0,
        "target_modules": sorted(paths),
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "modules_to_save": None,
        "use_dora": False,
        "use_rslora": False,
    }
