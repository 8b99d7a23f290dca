"""Measures on calibration inputs which linear layers can be quantised.

A layer whose output changes too much takes another format or stays in float. In fp8, a layer that
suffers from a few large channels is first tried with its channels smoothed, as in SmoothQuant: its
input is divided by a factor per channel, and its weight multiplied by the same factors.

Legend: O output channels, C input channels, T tokens.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from perception_rt.export.quantization.formats import FP8_MAX, Scheme

T = TypeVar("T")
Array = np.ndarray[Any, Any]

# Relative error of a layer's output above which the layer is excluded. Rounding alone gives 0.01 in
# int8 and 0.04 in fp8, an outlier channel 0.1 and more.
MAX_LAYER_ERROR = 0.05
# For a head in fp8: share of the tokens whose likeliest successor stays the same.
LEAST_AGREEMENT = 0.99
_WORTH = 0.9  # smoothing or clipping is kept if the error falls to this part of what it was
_MAX_SMOOTHING = 1000.0  # largest factor of a channel; larger ones overflow in float16


@dataclass(slots=True)
class Measured:
    """Measurements of linear layers on calibration inputs, by weight name.

    Attributes:
        errors: largest relative error of the output under the scheme.
        largest: largest magnitude of the input.
        inputs: largest magnitude of each input channel, float32 (C,); fp8 only.
        weights: largest magnitude of each weight column, float32 (C,); fp8 only.
        ranges: input ranges that clip outliers, from a range finder.
        clipped: layers for which `ranges` is better than `largest`.
        rejected: layers that are excluded for another reason than their own error.
        smoothed: layers whose channels are smoothed.
        decided: excluded layers, set by `decide`; None to derive them from the measurement.
    """

    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    clipped: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)
    smoothed: set[str] = field(default_factory=set)
    decided: frozenset[str] | None = None

    def decide(
        self, excluded: Collection[str], smoothed: Collection[str], clipped: Collection[str]
    ) -> None:
        """Takes over the decisions of another export of the same architecture."""
        self.decided = frozenset(excluded)
        self.smoothed = set(smoothed) & self.inputs.keys()
        self.clipped = set(clipped) & self.ranges.keys()

    def excluded(self) -> list[str]:
        """The layers that do not take the scheme, sorted."""
        if self.decided is not None:
            return sorted(self.decided & self.errors.keys())
        return sorted(
            name
            for name, error in self.errors.items()
            if name in self.rejected or not error <= MAX_LAYER_ERROR
        )

    def smoothing(self, name: str) -> Array | None:
        """Factors that a layer's input channels are divided by, float32 (C,); None for none.

        Half of each channel's excess, as a logarithm, moves from the input to the weight.
        """
        if name not in self.smoothed:
            return None
        logarithms = 0.5 * (_logarithms(self.inputs[name]) - _logarithms(self.weights[name]))
        factors = np.exp(logarithms - np.median(logarithms))
        clipped: Array = np.clip(factors, 1 / _MAX_SMOOTHING, _MAX_SMOOTHING).astype(np.float32)
        return clipped

    def range(self, name: str) -> float:
        """Largest magnitude of a layer's input, after smoothing, that is not clipped."""
        smoothing = self.smoothing(name)
        if smoothing is not None:
            return float((self.inputs[name] / smoothing).max())
        return self.ranges[name] if name in self.clipped else self.largest[name]

    def add(self, found: "Measured", prefix: str = "") -> None:
        """Adds the measurement of a submodule whose weight names have a prefix here."""
        for mine, theirs in (
            (self.errors, found.errors),
            (self.largest, found.largest),
            (self.inputs, found.inputs),
            (self.weights, found.weights),
            (self.ranges, found.ranges),
        ):
            for name, value in theirs.items():
                assert prefix + name not in mine
                mine[prefix + name] = value  # type: ignore[assignment]
        self.rejected |= {prefix + name for name in found.rejected}
        self.smoothed |= {prefix + name for name in found.smoothed}
        self.clipped |= {prefix + name for name in found.clipped}


def _logarithms(peaks: Array) -> Array:
    """Logarithms of magnitudes; the smallest count as a millionth of the largest."""
    logarithms: Array = np.log(np.maximum(peaks, max(1e-6 * float(peaks.max()), 1e-30)))
    return logarithms


class Ranges(Protocol):
    """Finds input ranges that clip outliers, as ModelOpt does."""

    def add(self, name: str, x: Tensor) -> None:
        """Records an input of a layer."""

    def ranges(self) -> dict[str, float]:
        """Largest magnitude that is not clipped, by layer."""


def measure_layers(
    module: nn.Module, run: Callable[[], T], scheme: Scheme, ranges: Ranges | None = None
) -> tuple[T, Measured]:
    """Measures every linear layer of a module under a scheme.

    Args:
        module: in float32, each parameter in a storage of its own.
        run: calls the module on calibration inputs; called up to three times in fp8.
        scheme: quantisation of the layers.
        ranges: range finder for fp8; None uses the largest magnitudes.

    Returns:
        The result of `run`, in float32 and not changed by the measurement; the layers.
    """
    names = _names(module)
    mode = _Measuring(names, scheme, ranges)
    with torch.inference_mode(), mode:
        result = run()
    measured = mode.measured
    if ranges is not None:
        measured.ranges = ranges.ranges()
        measured.clipped = set(measured.ranges)
        better = _improved(names, run, measured, measured.clipped)
        measured.clipped = set(better)
        measured.errors |= better
    excluded = measured.excluded()
    if scheme == "fp8" and excluded:
        measured.smoothed = set(excluded)
        better = _improved(names, run, measured, excluded)
        better = {name: error for name, error in better.items() if error <= MAX_LAYER_ERROR}
        measured.smoothed = set(better)
        measured.errors |= better
    return result, measured


def _improved(
    names: Mapping[int, str], run: Callable[[], object], measured: Measured, layers: Collection[str]
) -> dict[str, float]:
    """Errors in fp8 with the current ranges and smoothing, of those layers that they improve."""
    mode = _Remeasuring(names, measured, layers)
    with torch.inference_mode(), mode:
        run()
    return {n: error for n, error in mode.errors.items() if error <= _WORTH * measured.errors[n]}


def exclude_layers(
    module: nn.Module, run: Callable[[], Tensor], exact: Tensor, measured: Measured, least: float
) -> None:
    """Adds layers to `measured.rejected`, the worst first, until the module is faithful in fp8.

    Args:
        module: the module whose layers were measured.
        run: calls the module; returns rows of features, (..., D).
        exact: the same result in float32.
        measured: measurement by `measure_layers` for fp8.
        least: cosine that each row must have with float32.
    """
    names = _names(module)
    taken = sorted(set(measured.errors) - set(measured.excluded()), key=measured.errors.__getitem__)
    while taken:
        with torch.inference_mode(), _Simulating(names, measured, taken):
            cosine = F.cosine_similarity(run(), exact, dim=-1).amin()
        if cosine >= least:
            return
        keep = len(taken) * 7 // 8
        measured.rejected |= set(taken[keep:])
        taken = taken[:keep]


class MeasuredHead:
    """Measures fp8 on a decoder's head, which is read in pieces.

    Noise on the head is noise on the logits, so besides the error it counts how often another token
    becomes the likeliest.
    """

    def __init__(self, tokens: Tensor) -> None:
        """Measures on normalised hidden states, float32 (1, T, C)."""
        self._largest = tokens.abs().amax()
        self._rounded = _as_e4m3(tokens, self._largest)
        self._likeliest = torch.full((2, 2, tokens.shape[1]), -math.inf)  # exact, fp8: logit, id
        self._squares = torch.zeros(2)  # sums over the difference and over the exact logits

    def add(self, exact: Tensor, weight: Tensor, start: int) -> None:
        """Adds a piece of the head.

        Args:
            exact: logits of the tokens in float32, (1, T, O).
            weight: rows of the head, (O, C).
            start: index of the first row.
        """
        rounded = F.linear(self._rounded, _fp8_rows(weight))
        for row, logits in zip(self._likeliest, (exact[0], rounded[0]), strict=True):
            values, ids = logits.max(dim=-1)
            row[1] = torch.where(values > row[0], ids + start, row[1])
            row[0] = torch.maximum(values, row[0])
        difference = (rounded - exact).square().sum()
        self._squares += torch.stack([difference, exact.square().sum()])

    def put(self, measured: Measured, name: str) -> None:
        """Adds the head to a measurement; rejects it if too many tokens change."""
        measured.errors[name] = float((self._squares[0] / self._squares[1]).sqrt())
        measured.largest[name] = float(self._largest)
        same = (self._likeliest[0, 1] == self._likeliest[1, 1]).float().mean()
        if not same >= LEAST_AGREEMENT:
            measured.rejected.add(name)


def _names(module: nn.Module) -> dict[int, str]:
    """Parameter names by storage address."""
    return {p.untyped_storage().data_ptr(): n for n, p in module.named_parameters()}


class _Linears(TorchFunctionMode, ABC):
    """Intercepts every `F.linear` on some parameters."""

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
        if func is F.linear:
            name = self.names.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                return self.linear(name, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The result that the layer returns instead."""


class _Measuring(_Linears):
    """Compares every layer with its quantised form; returns the exact result."""

    def __init__(self, names: Mapping[int, str], scheme: Scheme, ranges: Ranges | None) -> None:
        super().__init__(names)
        self.round_input, self.round_weight = _ROUNDING[scheme]
        self.keeps_channels = scheme == "fp8"
        self.ranges = ranges
        self.measured = Measured()

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        result = F.linear(input, weight, bias)
        error = _error(result, self.round_input(input), self.round_weight(weight), bias)
        _raise(self.measured.errors, name, error)
        _raise(self.measured.largest, name, float(input.abs().amax()))
        if self.keeps_channels:
            for peaks, values in ((self.measured.inputs, input), (self.measured.weights, weight)):
                found = values.flatten(0, -2).abs().amax(dim=0).numpy()
                peaks[name] = np.maximum(peaks.get(name, found), found)
        if self.ranges is not None:
            self.ranges.add(name, input)
        return result


class _Fp8Linears(_Linears):
    """Intercepts some layers, whose ranges and smoothing in fp8 are known."""

    def __init__(
        self, names: Mapping[int, str], measured: Measured, layers: Collection[str]
    ) -> None:
        super().__init__(names)
        self.measured = measured
        self.layers = frozenset(layers)

    def rounded(self, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's input and weight as fp8 represents them."""
        smoothing = self.measured.smoothing(name)
        if smoothing is not None:
            factors = torch.from_numpy(smoothing)
            x, weight = x / factors, weight * factors
        return _as_e4m3(x, torch.tensor(self.measured.range(name))), _fp8_rows(weight)


class _Remeasuring(_Fp8Linears):
    """Measures the errors of some layers in fp8; returns the exact result."""

    def __init__(
        self, names: Mapping[int, str], measured: Measured, layers: Collection[str]
    ) -> None:
        super().__init__(names, measured, layers)
        self.errors: dict[str, float] = {}

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        result = F.linear(input, weight, bias)
        if name in self.layers:
            error = _error(result, *self.rounded(name, input, weight), bias)
            _raise(self.errors, name, error)
        return result


class _Simulating(_Fp8Linears):
    """Computes some layers in fp8."""

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if name in self.layers:
            input, weight = self.rounded(name, input, weight)
        return F.linear(input, weight, bias)


def _error(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """|rounded product - product| / |product|, of a layer's result and its rounded operands."""
    difference = F.linear(x, weight, bias).sub_(result)
    product = result if bias is None else result - bias
    return float(difference.norm() / product.norm().clamp(min=1e-30))


def _raise(values: dict[str, float], name: str, value: float) -> None:
    """Raises a maximum to a value; NaN counts as larger than every number."""
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
    """x rounded to E4M3, scaled by its largest magnitude."""
    return _as_e4m3(x, x.abs().amax())


def _fp8_rows(x: Tensor) -> Tensor:
    """x rounded to E4M3, each row scaled by its largest magnitude."""
    return _as_e4m3(x, x.abs().amax(dim=-1, keepdim=True))


def _as_e4m3(x: Tensor, largest: Tensor) -> Tensor:
    step = (largest / FP8_MAX).clamp(min=1e-30)
    return (x / step).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * step


# How inputs and weights are rounded under each scheme.
_ROUNDING: Mapping[Scheme, tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]] = {
    "int8": (_uint8, _int8_rows),
    "int8_rows": (_int8_rows, _int8_rows),
    "fp8": (_fp8, _fp8_rows),
}
