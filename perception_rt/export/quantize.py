"""Integer formats of linear weights, and the measurement that decides which layers take them.

- `int8`: W8A8, weights symmetric per output channel, activations asymmetric uint8 per tensor,
  scaled when the engine runs.
- `int8_rows`: the same weights, activations symmetric per row, so that a token's result depends on
  no other token, and its integer sums are exact in any batch.
- `int8_blocks`, `int4_blocks`: weights symmetric per block of 32 input channels.

A layer whose output W8A8 changes too much takes another format, or stays in float.

Legend: O channels out, C channels in, B blocks of 32 channels.
"""

from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
Array = np.ndarray[Any, Any]
Format = Literal["int8", "int8_rows", "int8_blocks", "int4_blocks"]

BLOCK = 32
BITS = {"int8_blocks": 8, "int4_blocks": 4}

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


def quantize_blocks(weight: Array, bits: int) -> tuple[Array, Array]:
    """A float32 weight (O, C) in blocks: whole steps of each block's own scale.

    The largest magnitude of a block becomes -2**(bits-1), the one end of the range that has no
    twin; so all steps are used.

    Returns:
        uint8 (O, B, 32 * bits / 8), each value plus 2**(bits-1), two to a byte for 4 bits, the low
        half first; float32 scales (O, B).
    """
    rows, channels = weight.shape
    blocks = -(-channels // BLOCK)
    padded = np.zeros((rows, blocks * BLOCK), np.float32)
    padded[:, :channels] = weight
    padded = padded.reshape(rows, blocks, BLOCK)
    top = 2 ** (bits - 1)
    low, high = padded.min(axis=-1), padded.max(axis=-1)
    extreme = np.where(high > -low, high, low)
    scale = (extreme / np.float32(-top)).astype(np.float32)
    inverse = np.divide(np.float32(1), scale, out=np.zeros_like(scale), where=scale != 0)
    padded *= inverse[..., None]
    np.rint(padded, out=padded)
    padded += top
    values = np.clip(padded, 0, 2 * top - 1, out=padded).astype(np.uint8)
    return (values if bits == 8 else values[..., ::2] | (values[..., 1::2] << 4)), scale


def layer_errors(
    module: nn.Module, run: Callable[[], T], *, rows: bool = False
) -> tuple[T, dict[str, float]]:
    """Relative output error of each linear layer under W8A8, by the name of its weight.

    Args:
        module: in float32, each parameter in a storage of its own.
        run: calls the module on calibration inputs.
        rows: activations are scaled per row and not per tensor.

    Returns:
        What `run` returned, in float32 as without the measurement; the errors.
    """
    names = {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters()}
    mode = _LinearErrors(names, _int8_rows if rows else _uint8)
    with torch.inference_mode(), mode:
        result = run()
    return result, mode.errors


class _LinearErrors(TorchFunctionMode):
    """Compares every `F.linear` with its simulated int8 twin; the largest error counts."""

    def __init__(self, names: Mapping[int, str], rounded: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.names = names
        self.rounded = rounded
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
                error = _int8_error(x, weight, self.rounded)
                self.errors[name] = max(error, self.errors.get(name, 0.0))
        return result


def _int8_error(x: Tensor, weight: Tensor, rounded_x: Callable[[Tensor], Tensor]) -> float:
    """|int8 product - product| / |product|, Frobenius norms, bias left out."""
    scale = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30) / 127
    rounded = (weight / scale).round_().clamp_(-127, 127).mul_(scale)
    exact = F.linear(x, weight)
    error = F.linear(rounded_x(x), rounded).sub_(exact)
    return float(error.norm() / exact.norm().clamp(min=1e-30))


def _uint8(x: Tensor) -> Tensor:
    """x rounded to 256 steps between its extremes, zero included."""
    low, high = x.amin().clamp(max=0.0), x.amax().clamp(min=0.0)
    step = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / step).round()
    return ((x / step).round() + zero).clamp(0, 255).sub(zero) * step


def _int8_rows(x: Tensor) -> Tensor:
    """x with each row rounded to 255 steps between plus and minus its largest magnitude."""
    step = (x.abs().amax(dim=-1, keepdim=True) / 127).clamp(min=1e-30)
    return (x / step).round() * step
