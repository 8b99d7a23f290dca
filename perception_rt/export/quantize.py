"""int8 arithmetic, and the measurement that decides which linear layers take it.

Dynamic W8A8: weights symmetric per output channel, activations asymmetric uint8 per tensor, scaled
when the engine runs. A layer whose output that changes too much stays in float.

Legend: O channels out, C channels in.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Array = np.ndarray[Any, Any]

# Relative error of a layer's output above which it stays in float. Measured on calibration images
# per layer; rounding alone gives about 0.01, an outlier channel 0.1 and more.
MAX_LAYER_ERROR = 0.05


def channel_scale(weight: Array) -> Array:
    """float32 (O,) scales of a weight (O, C), such that the largest magnitude becomes 127."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return scale


def quantize_channels(weight: Array, scale: Array) -> Array:
    """int8 (O, C) of a weight (O, C): the nearest multiple of each channel's scale."""
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)


def layer_errors(module: nn.Module, run: Callable[[], object]) -> dict[str, float]:
    """Relative output error of each linear layer under int8, by the name of its weight.

    Args:
        module: in float32, each parameter in a storage of its own.
        run: calls the module on calibration inputs.
    """
    names = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters()}
    mode = _LinearErrors(names)
    with torch.inference_mode(), mode:
        run()
    return mode.errors


class _LinearErrors(TorchFunctionMode):
    """Compares every `F.linear` with its simulated int8 twin; the largest error counts."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        self.errors: dict[str, float] = {}

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            x, weight = args[0], args[1]
            name = self.names.get(weight.untyped_storage().data_ptr())
            if name is not None:
                error = _int8_error(x, weight)
                self.errors[name] = max(error, self.errors.get(name, 0.0))
        return result


def _int8_error(x: Tensor, weight: Tensor) -> float:
    """|int8 product - product| / |product|, Frobenius norms, bias left out."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (weight / scale).round().clamp(-127, 127) * scale
    exact = F.linear(x, weight)
    error = F.linear(_uint8(x), rounded) - exact
    return float(error.norm() / exact.norm().clamp(min=1e-30))


def _uint8(x: Tensor) -> Tensor:
    """x rounded to 256 steps between its extremes, zero included."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step
