"""The measurement that decides which linear layers are quantised, on calibration inputs.

A layer whose output its scheme changes too much takes another format, or stays in float. In fp8,
a layer that suffers from a few large channels is first tried with its channels balanced, in the
style of SmoothQuant: what its input is divided by, its weight is multiplied with.

Legend: O channels out, C channels in.
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

# Relative error of a layer's output above which it stays in float. Measured on calibration images
# per layer; rounding alone gives 0.01 in int8 and 0.04 in fp8, an outlier channel 0.1 and more.
MAX_LAYER_ERROR = 0.05


# Of a head in fp8: the part of the tokens of which the likeliest next one stays the same.
LEAST_AGREEMENT = 0.99
_WORTH = 0.9  # balanced channels are taken if they lower the error to this part of it
_MOST_BALANCE = 1000.0  # and no channel by more, so that float16 bears it


@dataclass(slots=True)
class Measured:
    """What calibration inputs say about linear layers, by the names of their weights.

    Attributes:
        errors: relative error of the output under a scheme, the largest that was met.
        largest: magnitude of the input, the largest that was met.
        inputs: the same of each channel, float32 (C,); in fp8 only.
        weights: magnitude of the weight's columns, float32 (C,); in fp8 only.
        ranges: of inputs, that clip a little; if they were asked for.
        clipped: layers for which those are better than the largest magnitude.
        refused: layers that a whole tower does not bear under the scheme, beside the others.
        balanced: layers whose channels are balanced.
        decided: the layers that do not take the scheme, whatever was measured; None to go by that.
    """

    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    clipped: set[str] = field(default_factory=set)
    refused: set[str] = field(default_factory=set)
    balanced: set[str] = field(default_factory=set)
    decided: frozenset[str] | None = None

    def decide(
        self, harmed: Collection[str], balanced: Collection[str], clipped: Collection[str]
    ) -> None:
        """Sets what was decided for other weights of the same architecture."""
        self.decided = frozenset(harmed)
        self.balanced = set(balanced) & self.inputs.keys()
        self.clipped = set(clipped) & self.ranges.keys()

    def harmed(self) -> list[str]:
        """The layers that should not take the scheme."""
        if self.decided is not None:
            return sorted(self.decided & self.errors.keys())
        return sorted(
            name
            for name, error in self.errors.items()
            if name in self.refused or not error <= MAX_LAYER_ERROR
        )

    def balance(self, name: str) -> Array | None:
        """What each channel of a layer's input is divided by, float32 (C,); None for nothing."""
        return self._balance(name) if name in self.balanced else None

    def range(self, name: str) -> float:
        """The largest magnitude of a layer's input that is not clipped; balanced, if it is."""
        balance = self.balance(name)
        if balance is not None:
            return float((self.inputs[name] / balance).max())
        return self.ranges[name] if name in self.clipped else self.largest[name]

    def add(self, found: "Measured", prefix: str = "") -> None:
        """Takes up the measurement of a part whose weights have a prefix here."""
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
        self.refused |= {prefix + name for name in found.refused}
        self.balanced |= {prefix + name for name in found.balanced}
        self.clipped |= {prefix + name for name in found.clipped}

    def _balance(self, name: str) -> Array:
        """Half of a channel's excess, as a logarithm, goes from the input to the weight."""
        inputs, weights = self.inputs[name], self.weights[name]
        logarithms = 0.5 * (_logarithms(inputs) - _logarithms(weights))
        factors = np.exp(logarithms - np.median(logarithms))
        balance: Array = np.clip(factors, 1 / _MOST_BALANCE, _MOST_BALANCE).astype(np.float32)
        return balance


def _logarithms(peaks: Array) -> Array:
    """Of magnitudes, of which the least count as a millionth of the largest."""
    logarithms: Array = np.log(np.maximum(peaks, max(1e-6 * float(peaks.max()), 1e-30)))
    return logarithms


class Ranges(Protocol):
    """Finds ranges of inputs that clip a little, as ModelOpt does."""

    def add(self, name: str, x: Tensor) -> None:
        """Takes note of an input of a layer."""

    def ranges(self) -> dict[str, float]:
        """The largest magnitude that is not clipped, of each layer."""


def measure_layers(
    module: nn.Module, run: Callable[[], T], scheme: Scheme, ranges: Ranges | None = None
) -> tuple[T, Measured]:
    """Measures each linear layer under a scheme.

    Args:
        module: in float32, each parameter in a storage of its own.
        run: calls the module on calibration inputs; in fp8 up to three times.
        scheme: what the layers would become.
        ranges: for fp8, what may find other ranges than the largest magnitudes.

    Returns:
        What `run` returned, in float32 as without the measurement; the layers.
    """
    names = _names(module)
    mode = _Measuring(names, scheme, ranges)
    with torch.inference_mode(), mode:
        result = run()
    measured = mode.measured
    if ranges is not None:
        measured.ranges = ranges.ranges()
        measured.clipped = set(measured.ranges)
        better = _again(names, run, measured, measured.clipped)
        measured.clipped = set(better)
        measured.errors |= better
    harmed = measured.harmed()
    if scheme == "fp8" and harmed:
        measured.balanced = set(harmed)
        better = _again(names, run, measured, harmed)
        better = {name: error for name, error in better.items() if error <= MAX_LAYER_ERROR}
        measured.balanced = set(better)
        measured.errors |= better
    return result, measured


def _again(
    names: Mapping[int, str], run: Callable[[], object], measured: Measured, layers: Collection[str]
) -> dict[str, float]:
    """The errors of those layers in fp8 that are better than before, as `measured` has them now."""
    again = _Again(names, measured, frozenset(layers))
    with torch.inference_mode(), again:
        run()
    return {n: error for n, error in again.errors.items() if error <= _WORTH * measured.errors[n]}


def refuse_layers(
    module: nn.Module, run: Callable[[], Tensor], exact: Tensor, measured: Measured, least: float
) -> None:
    """Adds layers to `measured.refused`, the worst first, until the others are faithful in fp8.

    Args:
        module: whose layers were measured, as for `measure_layers`.
        run: calls the module; its result has rows of features, (..., D).
        exact: that result in float32.
        measured: what `measure_layers` found for fp8.
        least: cosine that each row must have with float32.
    """
    names = _names(module)
    taken = sorted(set(measured.errors) - set(measured.harmed()), key=measured.errors.__getitem__)
    while taken:
        with torch.inference_mode(), _Simulating(names, measured, taken):
            cosine = F.cosine_similarity(run(), exact, dim=-1).amin()
        if cosine >= least:
            return
        keep = len(taken) * 7 // 8
        measured.refused |= set(taken[keep:])
        taken = taken[:keep]


class MeasuredHead:
    """What fp8 does to a head, which is read in pieces.

    Its noise is on the logits themselves, so besides the error it counts how often another token
    is the likeliest.
    """

    def __init__(self, tokens: Tensor) -> None:
        """A head on tokens (1, T, C)."""
        self._tokens = tokens
        self._largest = tokens.abs().amax()
        self._rounded = _as_e4m3(tokens, self._largest)
        self._likeliest = torch.full((2, 2, tokens.shape[1]), -math.inf)  # exact, fp8: logit, id
        self._squares = torch.zeros(2)  # of the difference, of the exact logits

    def add(self, exact: Tensor, weight: Tensor, start: int) -> None:
        """Rows of the head from an index on, (O, C), and the tokens' logits, (1, T, O)."""
        rounded = F.linear(self._rounded, _fp8_rows(weight))
        for row, logits in zip(self._likeliest, (exact[0], rounded[0]), strict=True):
            values, ids = logits.max(dim=-1)
            row[1] = torch.where(values > row[0], ids + start, row[1])
            row[0] = torch.maximum(values, row[0])
        difference = (rounded - exact).square().sum()
        self._squares += torch.stack([difference, exact.square().sum()])

    def put(self, measured: Measured, name: str) -> None:
        """Adds the layer; refused, if too many tokens change."""
        measured.errors[name] = float((self._squares[0] / self._squares[1]).sqrt())
        measured.largest[name] = float(self._largest)
        same = (self._likeliest[0, 1] == self._likeliest[1, 1]).float().mean()
        if not same >= LEAST_AGREEMENT:
            measured.refused.add(name)


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
        if func is F.linear:
            name = self.names.get(args[1].untyped_storage().data_ptr())
            if name is not None:
                return self.linear(name, *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    @abstractmethod
    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """What the layer shall return."""


class _Measuring(_Linears):
    """Compares every layer with its quantised twin."""

    def __init__(self, names: Mapping[int, str], scheme: Scheme, ranges: Ranges | None) -> None:
        super().__init__(names)
        self.round_input, self.round_weight = _ROUNDING[scheme]
        self.keeps_channels = scheme == "fp8"
        self.ranges = ranges
        self.measured = Measured()

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The exact result."""
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


class _Again(_Linears):
    """Compares some layers with their twins in fp8, by the ranges and balances that they have."""

    def __init__(
        self, names: Mapping[int, str], measured: Measured, layers: frozenset[str]
    ) -> None:
        super().__init__(names)
        self.measured = measured
        self.layers = layers
        self.errors: dict[str, float] = {}

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The exact result."""
        result = F.linear(input, weight, bias)
        if name in self.layers:
            twins = _twins(self.measured, name, input, weight)
            _raise(self.errors, name, _error(result, *twins, bias))
        return result


class _Simulating(_Linears):
    """Puts fp8 twins of some layers in their places."""

    def __init__(
        self, names: Mapping[int, str], measured: Measured, taken: Collection[str]
    ) -> None:
        super().__init__(names)
        self.measured = measured
        self.taken = frozenset(taken)

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The result in fp8 of a layer that takes it."""
        if name in self.taken:
            input, weight = _twins(self.measured, name, input, weight)
        return F.linear(input, weight, bias)


def _twins(measured: Measured, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's input and weight in fp8."""
    balance = measured.balance(name)
    if balance is not None:
        factors = torch.from_numpy(balance)
        x, weight = x / factors, weight * factors
    return _as_e4m3(x, torch.tensor(measured.range(name))), _fp8_rows(weight)


def _error(result: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None) -> float:
    """|rounded product - product| / |product|, of a layer's result and its rounded operands."""
    difference = F.linear(x, weight, bias).sub_(result)
    product = result if bias is None else result - bias
    return float(difference.norm() / product.norm().clamp(min=1e-30))


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
