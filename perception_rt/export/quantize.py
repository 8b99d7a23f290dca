"""Formats of quantised linear weights, and the measurement that decides which layers take them.

- `int8`: W8A8, weights symmetric per output channel, activations asymmetric uint8 per tensor,
  scaled when the engine runs.
- `int8_rows`: the same weights, activations symmetric per row, so that a token's result depends on
  no other token, and its integer sums are exact in any batch.
- `int8_blocks`, `int4_blocks`: weights symmetric per block of 32 input channels.
- `fp8`: E4M3 numbers; weights scaled per output channel, activations per tensor, by the largest
  magnitude that calibration met.

A layer whose output its scheme changes too much takes another format, or stays in float.

Legend: O channels out, C channels in, B blocks of 32 channels.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar

import ml_dtypes
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

T = TypeVar("T")
Array = np.ndarray[Any, Any]
Format = Literal["int8", "int8_rows", "int8_blocks", "int4_blocks", "fp8"]
Scheme = Literal["int8", "int8_rows", "fp8"]

BLOCK = 32
BITS = {"int8_blocks": 8, "int4_blocks": 4}
FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
FP8_MAX = 448.0

# Relative error of a layer's output above which it stays in float. Measured on calibration images
# per layer; rounding alone gives 0.01 in int8 and 0.04 in fp8, an outlier channel 0.1 and more.
MAX_LAYER_ERROR = 0.05


def channel_scale(weight: Array) -> Array:
    """float32 (O,) scales of a weight (O, C), such that the largest magnitude becomes 127."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(largest > 0, largest / np.float32(127), np.float32(1))
    return scale


def quantize_channels(weight: Array, scale: Array) -> Array:
    """int8 (O, C) of a weight (O, C): the nearest multiple of each channel's scale."""
    return np.clip(np.rint(weight / scale[:, None]), -127, 127).astype(np.int8)


def fp8_channel_scale(weight: Array) -> Array:
    """float32 (O,) scales of a weight (O, C), such that the largest magnitude becomes 448."""
    largest = np.abs(weight).max(axis=1).astype(np.float32)
    scale: Array = np.where(largest > 0, largest / np.float32(FP8_MAX), np.float32(1))
    return scale


def fp8_channels(weight: Array, scale: Array) -> Array:
    """E4M3 (O, C) of a weight (O, C) and its scales, as those are stored."""
    scaled = weight / scale.astype(np.float32)[:, None]
    return np.clip(scaled, -FP8_MAX, FP8_MAX).astype(FP8)


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


@dataclass(slots=True)
class Measured:
    """What calibration inputs say about linear layers, by the names of their weights.

    Attributes:
        errors: relative error of the output under a scheme, the largest that was met.
        largest: magnitude of the input, the largest that was met.
        refused: layers that a whole tower does not bear under the scheme, beside the others.
        decided: the layers that do not take the scheme, whatever was measured; None to go by that.
    """

    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    refused: set[str] = field(default_factory=set)
    decided: frozenset[str] | None = None

    def harmed(self) -> list[str]:
        """The layers that should not take the scheme."""
        if self.decided is not None:
            return sorted(self.decided & self.errors.keys())
        return sorted(
            name
            for name, error in self.errors.items()
            if name in self.refused or not error <= MAX_LAYER_ERROR
        )

    def add(self, found: "Measured", prefix: str = "") -> None:
        """Takes up another measurement, of a part whose weights have a prefix here."""
        for mine, theirs in ((self.errors, found.errors), (self.largest, found.largest)):
            for name, value in theirs.items():
                _raise(mine, prefix + name, value)
        self.refused |= {prefix + name for name in found.refused}


def measure_layers(module: nn.Module, run: Callable[[], T], scheme: Scheme) -> tuple[T, Measured]:
    """Measures each linear layer under a scheme.

    Args:
        module: in float32, each parameter in a storage of its own.
        run: calls the module on calibration inputs.
        scheme: what the layers would become.

    Returns:
        What `run` returned, in float32 as without the measurement; the layers.
    """
    mode = _Measuring(_names(module), scheme)
    with torch.inference_mode(), mode:
        result = run()
    return result, mode.measured


def refuse_layers(
    module: nn.Module, run: Callable[[], Tensor], measured: Measured, least: float
) -> None:
    """Adds layers to `measured.refused`, the worst first, until the others are faithful in fp8.

    Args:
        module: whose layers were measured, as for `measure_layers`.
        run: calls the module; its result has rows of features, (..., D).
        measured: what `measure_layers` found for fp8.
        least: cosine that each row must have with float32.
    """
    names = _names(module)
    with torch.inference_mode():
        exact = run()
    taken = sorted(set(measured.errors) - set(measured.harmed()), key=measured.errors.__getitem__)
    while taken:
        simulated = _Simulating(names, {name: measured.largest[name] for name in taken})
        with torch.inference_mode(), simulated:
            cosine = F.cosine_similarity(run(), exact, dim=-1).amin()
        if cosine >= least:
            return
        keep = len(taken) * 7 // 8
        measured.refused |= set(taken[keep:])
        taken = taken[:keep]


def _names(module: nn.Module) -> dict[int, str]:
    """Parameters by where their values are."""
    return {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters()}


class _Linears(TorchFunctionMode, ABC):
    """Sees every `F.linear` of some parameters."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is F.linear:
            name = self.names.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                return self.linear(name, result, *args)
        return result

    @abstractmethod
    def linear(
        self, name: str, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """What the layer shall return."""


class _Measuring(_Linears):
    """Compares every layer with its quantised twin."""

    def __init__(self, names: Mapping[int, str], scheme: Scheme) -> None:
        super().__init__(names)
        self.round_input, self.round_weight = _ROUNDING[scheme]
        self.measured = Measured()

    def linear(
        self, name: str, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The exact result; |quantised product - product| / |product| without the bias is noted."""
        exact = F.linear(x, weight)
        rounded = F.linear(self.round_input(x), self.round_weight(weight))
        error = rounded.sub_(exact).norm() / exact.norm().clamp(min=1e-30)
        _raise(self.measured.errors, name, float(error))
        _raise(self.measured.largest, name, float(x.abs().amax()))
        return result


class _Simulating(_Linears):
    """Puts fp8 twins of some layers in their places.

    `largest` has these layers, and the magnitudes that their inputs are scaled by.
    """

    def __init__(self, names: Mapping[int, str], largest: Mapping[str, float]) -> None:
        super().__init__(names)
        self.largest = largest

    def linear(
        self, name: str, result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The result in fp8 of a layer that takes it."""
        if name not in self.largest:
            return result
        x = _as_e4m3(x, torch.tensor(self.largest[name]))
        return F.linear(x, _fp8_rows(weight), bias)


def _raise(values: dict[str, float], name: str, value: float) -> None:
    """A maximum that NaN does not get past unseen."""
    if not value <= values.get(name, -math.inf):
        values[name] = value


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


def _fp8(x: Tensor) -> Tensor:
    """x as E4M3 numbers, its largest magnitude their largest."""
    return _as_e4m3(x, x.abs().amax())


def _fp8_rows(x: Tensor) -> Tensor:
    """x as E4M3 numbers, each row's largest magnitude their largest."""
    return _as_e4m3(x, x.abs().amax(dim=-1, keepdim=True))


def _as_e4m3(x: Tensor, largest: Tensor) -> Tensor:
    step = (largest / FP8_MAX).clamp(min=1e-30)
    return (x / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * step


# How inputs and weights are rounded.
_ROUNDING: Mapping[Scheme, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "int8": (_uint8, _int8_rows),
    "int8_rows": (_int8_rows, _int8_rows),
    "fp8": (_fp8, _fp8_rows),
}
