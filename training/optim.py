"""AdamW with parameter groups, and the learning rate schedule."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.errors import InputError
from training.recipe.schema import OptimConfig, ScheduleConfig


def build_optimizer(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> torch.optim.AdamW:
    """Creates AdamW with weight decay on matrices only, not on norms, biases, gains or scalars.

    Args:
        parameters: names and parameters; frozen parameters are skipped.
        config: the recipe's section `optim`. Each group stores its factor as `lr_scale`.

    Raises:
        InputError: a prefix in `lr_scales` matches no trained parameter.
    """
    groups: dict[tuple[float, float, Any], list[nn.Parameter]] = {}
    for name, parameter in trained_parameters(parameters, config):
        decay = config.weight_decay if decays(parameter) else 0.0
        # A fused update needs parameters on one device mesh.
        mesh = getattr(parameter, "device_mesh", None)
        groups.setdefault((lr_scale(name, config.lr_scales), decay, mesh), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": group, "weight_decay": decay, "lr_scale": scale}
            for (scale, decay, _), group in groups.items()
        ],
        lr=config.lr,
        betas=(config.beta1, config.beta2),
        eps=config.eps,
        fused=True,
    )


def trained_parameters(
    parameters: Iterable[tuple[str, nn.Parameter]], config: OptimConfig
) -> list[tuple[str, nn.Parameter]]:
    """Returns the parameters that are not frozen.

    Raises:
        InputError: a prefix in `lr_scales` matches none of them.
    """
    trained = [(name, p) for name, p in parameters if p.requires_grad]
    for prefix in config.lr_scales:
        if not any(name.startswith(prefix) for name, _ in trained):
            raise InputError(f"optim.lr_scales: no trained parameter's name starts with {prefix!r}")
    return trained


def lr_scale(name: str, scales: Mapping[str, float]) -> float:
    """Returns a parameter's learning rate factor: the one of its longest matching prefix, or 1."""
    fitting = [prefix for prefix in scales if name.startswith(prefix)]
    return scales[max(fitting, key=len)] if fitting else 1.0


def decays(parameter: Tensor) -> bool:
    """Whether weight decay applies to a parameter: to matrices, not to vectors or scalars."""
    return parameter.ndim >= 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the learning rate of every group to `lr` times the group's factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(step: int, peak: float, config: ScheduleConfig) -> float:
    """Returns the learning rate of `step`, counted from 0: linear warm-up, then cosine decay."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * cosine)
