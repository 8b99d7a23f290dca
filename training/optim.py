"""AdamW over groups of parameters, and the learning rate as a pure function of the step."""

import math

import torch
from torch import Tensor

from perception_rt.models.pe import PerceptionEncoder
from training.config import OptimConfig, ScheduleConfig


def build_optimizer(model: PerceptionEncoder, config: OptimConfig) -> torch.optim.AdamW:
    """AdamW with weight decay on matrices and none on norms, biases, gains and scalars.

    Each group has an `lr_scale`, for `set_learning_rate`.
    """
    text = {id(p) for p in model.text.parameters()}
    groups = []
    for lr_scale, in_text in ((1.0, False), (config.text_lr_scale, True)):
        tower = [p for p in model.parameters() if (id(p) in text) == in_text]
        for decay, matrices in ((config.weight_decay, True), (0.0, False)):
            chosen = [p for p in tower if decays(p) == matrices]
            groups.append({"params": chosen, "weight_decay": decay, "lr_scale": lr_scale})
    return torch.optim.AdamW(
        groups, lr=config.lr, betas=(config.beta1, config.beta2), eps=config.eps, fused=True
    )


def decays(parameter: Tensor) -> bool:
    """Whether weight decay acts on a parameter: whatever is a vector or a scalar is exempt."""
    return parameter.ndim >= 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Sets the rate of every group, scaled by the group's own factor."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


def learning_rate(step: int, peak: float, config: ScheduleConfig) -> float:
    """The rate of `step`, counted from 0: linear up to `peak`, then cosine down."""
    if step < config.warmup:
        return peak * (step + 1) / config.warmup
    progress = (step - config.warmup) / max(1, config.steps - config.warmup)
    cosine = (1.0 + math.cos(math.pi * progress)) / 2
    return peak * (config.final_fraction + (1.0 - config.final_fraction) * cosine)
