"""Rounds the operands of a linear layer as each scheme does, in float32."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from perception_rt.export.quantization.formats import FP8_MAX, Scheme


def uint8(x: Tensor) -> Tensor:
    """x rounded to 256 steps between its extremes, zero included."""
    return _between(x, x.amin(), x.amax())


def uint8_items(x: Tensor) -> Tensor:
    """x with each item (1, ...) of it rounded as `uint8` does."""
    inner = tuple(range(1, x.ndim))
    return _between(x, x.amin(dim=inner, keepdim=True), x.amax(dim=inner, keepdim=True))


def _between(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def int8_rows(x: Tensor) -> Tensor:
    """x with each row rounded to 255 steps between plus and minus its largest magnitude."""
    step = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / step).round() * step


def fp8(x: Tensor) -> Tensor:
    """x rounded to E4M3, scaled by its largest magnitude."""
    return as_e4m3(x, x.abs().amax())


def fp8_rows(x: Tensor) -> Tensor:
    """x rounded to E4M3, each row scaled by its largest magnitude."""
    return as_e4m3(x, x.abs().amax(dim=-1, keepdim=True))


def as_e4m3(x: Tensor, largest: Tensor) -> Tensor:
    """x rounded to E4M3, scaled and clipped at `largest`."""
    step = (largest / FP8_MAX).clamp(min=1e-30)
    return (x / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * step


# How inputs and weights are rounded under each scheme.
ROUNDING: Mapping[Scheme, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "int8": (uint8, int8_rows),
    "int8_rows": (int8_rows, int8_rows),
    "fp8": (fp8, fp8_rows),
}
