"""Checks of a conformance run, their limits, and the report with its verdict.

Legend: N rows, D width.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from perception_rt.errors import InputError
from perception_rt.export.fidelity import MIN_COSINE, Fidelity
from perception_rt.package.manifest import Target

Array = np.ndarray[Any, Any]
Kind = Literal["cosine", "difference", "equal"]

# In float32 only the order of sums differs: 50 blocks leave less than 1e-10 of a cosine. A wrong
# weight may cost as little as 1e-6 where weights are random.
_EXACT = 1 - 1e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One comparison of the package with the library.

    Attributes:
        name: what is compared.
        part: part of the package that is wrong if the check fails.
        kind: "cosine" is the lowest of all rows, "difference" the largest absolute one, and "equal"
            the share of equal values.
        value: the figure.
        limit: least value that passes, or the largest of a "difference".
    """

    name: str
    part: str
    kind: Kind
    value: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the figure is within its limit; NaN is not."""
        if self.kind == "difference":
            return self.value <= self.limit
        return self.value >= self.limit

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        value = self.value if np.isfinite(self.value) else None
        return {
            "name": self.name, "part": self.part, "kind": self.kind, "value": value,
            "limit": self.limit, "passed": self.passed,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """Comparison of one layer's output.

    Attributes:
        name: such as "block 3".
        cosine: cosine of all its outputs, the lowest of all pictures.
    """

    name: str
    cosine: float

    def __str__(self) -> str:
        return f"{self.name} (cosine {shown_cosine(self.cosine)})"


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """Results of all comparisons of a package.

    Attributes:
        checks: the comparisons that decide.
        layers: layers that were compared because a check failed, from the input on.
        location: first layer that differs, or the part behind them; "" if none was looked for.
        notes: facts that do not decide.
    """

    checks: Sequence[Check]
    layers: Sequence[Layer] = ()
    location: str = ""
    notes: Sequence[str] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConformanceReport:
    """Result of `conform`.

    Attributes:
        package: name or path of the package, its id, model and precision.
        library: name and version of the library.
        weights: name or path of the library's weights.
        comparison: the comparisons.
    """

    package: Mapping[str, str]
    library: str
    weights: str
    comparison: Comparison

    @property
    def faithful(self) -> bool:
        """Whether every check passed."""
        return all(check.passed for check in self.comparison.checks)

    @property
    def verdict(self) -> str:
        """One line: whether the package is faithful, and where it first differs."""
        package = self.package
        shown = f"{package['name']} ({package['model']}, {package['precision']})"
        if self.faithful:
            return f"faithful: {shown} agrees with {self.library}"
        failed = [check for check in self.comparison.checks if not check.passed]
        parts = ", ".join(dict.fromkeys(check.part for check in failed))
        where = self.comparison.location
        at = f"; first difference: {where}" if where else ""
        return f"not faithful: {shown} differs from {self.library} in {parts}{at}"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        found = self.comparison
        return {
            "faithful": self.faithful,
            "verdict": self.verdict,
            "package": dict(self.package),
            "library": self.library,
            "weights": self.weights,
            "checks": [check.to_dict() for check in found.checks],
            "layers": [{"name": layer.name, "cosine": layer.cosine} for layer in found.layers],
            "location": found.location,
            "notes": list(found.notes),
        }


def least_cosine(target: Target, *, decoder: bool = False) -> float:
    """Least cosine for a package's precision: the limit of the export's gate, stricter in float32.

    Args:
        target: the target of the package.
        decoder: whether outputs of a language model's decoder are compared.
    """
    precision = target.precision
    if precision == "fp32":
        return _EXACT
    if precision == "fp8" and decoder:
        precision = "fp8 decoder"
    elif precision == "int4" and not decoder:
        precision = "int8"  # of the tile encoder
    elif precision == "int4" and target.options.get("blocks") == "int4":
        precision = "int4 blocks"
    return MIN_COSINE[precision]


def shown_cosine(value: float) -> str:
    """A cosine near 1 by its distance, such as "1 - 2e-12"."""
    return f"1 - {max(0.0, 1 - value):.1e}" if value > 0.999 else f"{value:.6f}"


def lowest_cosine(ours: Array, theirs: Array, name: str) -> float:
    """Lowest cosine of rows (..., D).

    Raises:
        InputError: the shapes differ, so the two are not the same model.
    """
    if ours.shape != theirs.shape:
        raise InputError(
            f"the package's {name} are {ours.shape}, the library's {theirs.shape}: the weights are "
            "those of another model, or have another head"
        )
    return Fidelity.compare(ours, theirs).cosine


def share_equal(ours: Array, theirs: Array) -> float:
    """Share of equal ids of (T,) and (T',); ids that only one has count as different."""
    longest, shared = max(len(ours), len(theirs)), min(len(ours), len(theirs))
    return 1.0 if longest == 0 else float((ours[:shared] == theirs[:shared]).sum() / longest)


def first_below(layers: Sequence[Layer], limit: float) -> int | None:
    """Index of the first layer whose cosine is below the limit; NaN is below."""
    below = (index for index, layer in enumerate(layers) if not layer.cosine >= limit)
    return next(below, None)
