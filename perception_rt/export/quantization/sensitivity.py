"""Measures on calibration inputs which linear layers can be quantised.

A layer whose output changes too much takes another format or stays in float. In fp8, and in int8
with one scale per tensor, a layer that suffers from a few large channels is first tried with its
channels smoothed, as in SmoothQuant: its input is divided by a factor per channel, and its weight
multiplied by the same factors. Where a LayerNorm makes the input, its gain and bias can be divided
instead.

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

from perception_rt.export.quantization.formats import Scheme
from perception_rt.export.quantization.rounding import (
    ROUNDING,
    as_e4m3,
    fp8_rows,
    int8_rows,
    uint8_items,
)

T = TypeVar("T")
Array = np.ndarray[Any, Any]

# Relative error of a layer's output above which the layer is excluded. Rounding alone gives 0.01 in
# int8 and 0.04 in fp8, an outlier channel 0.1 and more.
MAX_LAYER_ERROR = 0.05
# Share of a module's layers that `back_off` leaves in float at most: beyond it, int8 gains little.
MOST_IN_FLOAT = 1 / 3
_WORTH = 0.9  # smoothing or clipping is kept if the error falls to this part of what it was
_MAX_SMOOTHING = 1000.0  # largest factor of a channel; larger ones overflow in float16
# Schemes with one activation scale per tensor, which a large channel coarsens for all others.
_PER_TENSOR: Collection[Scheme] = ("fp8", "int8")


@dataclass(slots=True)
class Measured:
    """Measurements of linear layers on calibration inputs, by weight name.

    Attributes:
        errors: largest relative error of the output under the scheme.
        largest: largest magnitude of the input.
        inputs: largest magnitude of each input channel, float32 (C,); fp8 and int8 only.
        weights: largest magnitude of each weight column, float32 (C,); fp8 and int8 only.
        norms: gain and bias of the LayerNorm that makes the input; no entry if nothing or
            something else makes it.
        ranges: input ranges that clip outliers, from a range finder.
        clipped: layers for which `ranges` is better than `largest`.
        rejected: layers that are excluded for another reason than their own error.
        smoothed: layers whose channels are smoothed.
        decided: excluded layers, set by `decide` or `back_off`; None to derive them from `errors`
            and `rejected`.
        cosine: least cosine of the whole module's output with float32, simulated; None if unknown.
    """

    errors: dict[str, float] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    inputs: dict[str, Array] = field(default_factory=dict)
    weights: dict[str, Array] = field(default_factory=dict)
    norms: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ranges: dict[str, float] = field(default_factory=dict)
    clipped: set[str] = field(default_factory=set)
    rejected: set[str] = field(default_factory=set)
    smoothed: set[str] = field(default_factory=set)
    decided: frozenset[str] | None = None
    cosine: float | None = None

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
        """Adds the measurement of a submodule whose parameter names have a prefix here."""
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
        for name, norm in found.norms.items():
            self.norms[prefix + name] = tuple(prefix + parameter for parameter in norm)
        self.rejected |= {prefix + name for name in found.rejected}
        self.smoothed |= {prefix + name for name in found.smoothed}
        self.clipped |= {prefix + name for name in found.clipped}
        if found.decided is not None:
            decided = {prefix + name for name in found.decided}
            self.decided = frozenset(decided | (self.decided or set()))
        self.cosine = found.cosine


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
        run: calls the module on calibration inputs; called up to three times in fp8, twice in int8.
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
        better = _improved(names, run, measured, measured.clipped, scheme)
        measured.clipped = set(better)
        measured.errors |= better
    excluded = measured.excluded()
    if scheme in _PER_TENSOR and excluded:
        _smooth(names, run, measured, excluded, scheme, most=MAX_LAYER_ERROR)
    return result, measured


def _smooth(
    names: Mapping[int, str],
    run: Callable[[], object],
    measured: Measured,
    layers: Collection[str],
    scheme: Scheme,
    *,
    most: float = math.inf,
    worth: float = _WORTH,
) -> None:
    """Smooths those layers that it improves, to an error of at most `most`."""
    before = measured.smoothed
    layers = measured.inputs.keys() & layers
    measured.smoothed = before | layers
    better = _improved(names, run, measured, layers, scheme, worth)
    better = {name: error for name, error in better.items() if error <= most}
    measured.smoothed = before | set(better)
    measured.errors |= better


def _improved(
    names: Mapping[int, str],
    run: Callable[[], object],
    measured: Measured,
    layers: Collection[str],
    scheme: Scheme,
    worth: float = _WORTH,
) -> dict[str, float]:
    """Errors under the current ranges and smoothing, of layers for which they are worth it."""
    mode = _Remeasuring(names, measured, layers, scheme)
    with torch.inference_mode(), mode:
        run()
    return {n: error for n, error in mode.errors.items() if error <= worth * measured.errors[n]}


def simulate(module: nn.Module, run: Callable[[], T], measured: Measured, scheme: Scheme) -> T:
    """Returns the result of `run` with all layers but the excluded ones under the scheme.

    In int8, each item of a batch is rounded as if it came in a call of its own, as it does by
    default.
    """
    taken = measured.errors.keys() - measured.excluded()
    with torch.inference_mode(), _Simulating(_names(module), measured, taken, scheme):
        return run()


def least_cosine(result: Tensor, exact: Tensor) -> float:
    """Least cosine of any two rows (..., D)."""
    return float(F.cosine_similarity(result, exact, dim=-1).amin())


def back_off(
    module: nn.Module,
    calibrate: Callable[[], object],
    judge: Callable[[], Tensor],
    measured: Measured,
    target: float,
) -> None:
    """Decides which layers int8 smooths and excludes, by the error of the module's output.

    A module that reaches the target stays as `measure_layers` left it. Otherwise the layers that
    gain by it are smoothed, first those after a norm. If that is not enough, the worst stay in
    float: as few as reach the target, but no more than MOST_IN_FLOAT and the layers above
    MAX_LAYER_ERROR. Sets `measured.cosine`.

    Args:
        module: the module whose layers were measured.
        calibrate: calls the module as it was called when they were measured.
        judge: calls the module, perhaps on other inputs; returns rows of features, (N, ..., D).
        measured: measurement by `measure_layers` for int8.
        target: cosine that each row should have with float32.
    """
    names = _names(module)
    with torch.inference_mode():
        exact = judge()

    def cosine(taken: Collection[str]) -> float:
        with torch.inference_mode(), _Simulating(names, measured, taken, "int8"):
            return least_cosine(judge(), exact)

    def is_enough() -> bool:
        excluded = measured.excluded()
        measured.cosine = cosine(measured.errors.keys() - excluded)
        return measured.cosine >= target and len(excluded) <= spare

    spare = int(MOST_IN_FLOAT * len(measured.errors))
    if is_enough():
        return
    # Smoothing in a norm costs nothing, so any gain is worth it.
    rest = measured.norms.keys() - measured.smoothed
    _smooth(names, calibrate, measured, rest, "int8", worth=1.0)
    if is_enough():
        return
    _smooth(names, calibrate, measured, measured.errors.keys() - measured.smoothed, "int8")
    best_first = sorted(measured.errors, key=lambda name: (measured.errors[name], name))
    good = sum(error <= MAX_LAYER_ERROR for error in measured.errors.values())
    # The number of layers in int8: the largest that reaches the target, or else the least.
    least, most = sorted((good, len(best_first) - spare))
    tried = most
    while least < most:
        if cosine(best_first[:tried]) >= target:
            least = tried
        else:
            most = tried - 1
        tried = (least + most + 1) // 2
    measured.decided = frozenset(best_first[least:])
    measured.smoothed -= measured.decided
    measured.cosine = cosine(best_first[:least])


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
        with torch.inference_mode(), _Simulating(names, measured, taken, "fp8"):
            cosine = F.cosine_similarity(run(), exact, dim=-1).amin()
        if cosine >= least:
            return
        keep = len(taken) * 7 // 8
        measured.rejected |= set(taken[keep:])
        taken = taken[:keep]


def _names(module: nn.Module) -> dict[int, str]:
    """Parameter names by storage address."""
    return {_address(p): n for n, p in module.named_parameters()}


class _Linears(TorchFunctionMode, ABC):
    """Intercepts every `F.linear` on some parameters."""

    def __init__(self, names: Mapping[int, str]) -> None:
        super().__init__()
        self.names = names
        # Output of the last LayerNorm, and its parameters. Keeping the tensor keeps its address.
        self.normed: tuple[Tensor, tuple[str, ...]] | None = None

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            name = self.names.get(_address(args[1]))
            if name is not None:
                return self.linear(name, *args, **kwargs)
        result = func(*args, **kwargs)
        if func is F.layer_norm:
            tensors = [x for x in (*args[2:], *kwargs.values()) if isinstance(x, Tensor)]
            names = [self.names.get(_address(x)) for x in tensors]
            self.normed = result, tuple(name for name in names if name is not None)
        return result

    @abstractmethod
    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        """The result that the layer returns instead."""

    def is_constant(self, x: Tensor) -> bool:
        """Whether an input is a parameter; its products are folded, and not quantised."""
        return _address(x) in self.names

    def norm_of(self, x: Tensor) -> tuple[str, ...]:
        """Parameters of the LayerNorm of which x is the output or a part; () if there is none."""
        if self.normed is None or _address(self.normed[0]) != _address(x):
            return ()
        return self.normed[1]


def _address(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


class _Measuring(_Linears):
    """Compares every layer with its quantised form; returns the exact result."""

    def __init__(self, names: Mapping[int, str], scheme: Scheme, ranges: Ranges | None) -> None:
        super().__init__(names)
        self.round_input, self.round_weight = ROUNDING[scheme]
        self.keeps_channels = scheme in _PER_TENSOR
        self.ranges = ranges
        self.measured = Measured()
        self.others: set[str] = set()  # layers with an input that no LayerNorm makes

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        result = F.linear(input, weight, bias)
        error = _error(result, self.round_input(input), self.round_weight(weight), bias)
        _raise(self.measured.errors, name, error)
        _raise(self.measured.largest, name, float(input.abs().amax()))
        if self.keeps_channels and not self.is_constant(input):
            self.keep_channels(name, input, weight)
        if self.ranges is not None:
            self.ranges.add(name, input)
        return result

    def keep_channels(self, name: str, x: Tensor, weight: Tensor) -> None:
        for peaks, values in ((self.measured.inputs, x), (self.measured.weights, weight)):
            found = values.flatten(0, -2).abs().amax(dim=0).numpy()
            peaks[name] = np.maximum(peaks.get(name, found), found)
        norm = self.norm_of(x)
        if norm == () or self.measured.norms.get(name, norm) != norm:
            self.others.add(name)
            self.measured.norms.pop(name, None)
        elif name not in self.others:
            self.measured.norms[name] = norm


class _Quantized(_Linears):
    """Intercepts some layers, whose ranges and smoothing are known."""

    def __init__(
        self,
        names: Mapping[int, str],
        measured: Measured,
        layers: Collection[str],
        scheme: Scheme,
    ) -> None:
        super().__init__(names)
        self.measured = measured
        self.layers = frozenset(layers)
        self.scheme = scheme
        self.rounding = ROUNDING[scheme]

    def takes(self, name: str, x: Tensor) -> bool:
        """Whether to intercept a product; one of constants is folded, so it is not quantised."""
        return name in self.layers and not self.is_constant(x)

    def rounded(self, name: str, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """A layer's input and weight as the scheme represents them."""
        smoothing = self.measured.smoothing(name)
        if smoothing is not None:
            factors = torch.from_numpy(smoothing)
            x, weight = x / factors, weight * factors
        if self.scheme == "fp8":
            return as_e4m3(x, torch.tensor(self.measured.range(name))), fp8_rows(weight)
        round_input, round_weight = self.rounding
        return round_input(x), round_weight(weight)


class _Remeasuring(_Quantized):
    """Measures the errors of some layers; returns the exact result."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.errors: dict[str, float] = {}

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        result = F.linear(input, weight, bias)
        if self.takes(name, input):
            error = _error(result, *self.rounded(name, input, weight), bias)
            _raise(self.errors, name, error)
        return result


class _Simulating(_Quantized):
    """Computes some layers under the scheme; in int8 as if each item came in a call of its own."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        if self.scheme == "int8":
            self.rounding = uint8_items, int8_rows

    def linear(
        self, name: str, input: Tensor, weight: Tensor, bias: Tensor | None = None
    ) -> Tensor:
        if self.takes(name, input):
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
