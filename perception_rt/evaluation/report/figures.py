"""Figures of a task's outcomes: with intervals, per group, and against another package."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from perception_rt.errors import InputError
from perception_rt.evaluation.metrics.bootstrap import bootstrap_intervals
from perception_rt.evaluation.outcomes import Columns, Float64, Metric, Outcomes, TaskResult

_POINTS = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """A metric's value and its 95 % bootstrap interval."""

    name: str
    value: float
    low: float
    high: float


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """Figures of the items of one class or kind: metric values by name."""

    name: str
    items: int
    values: dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Comparison:
    """A package against another on the same items.

    Attributes:
        lost: the other's figures minus these, in points; above 0, this package is worse. Intervals
            are paired: both packages' figures are of the same drawn items.
        changed: indices of the items whose answers differ.
        cosines: cosine of the two embeddings of each item, float64 (N,); None without embeddings
            of the same width.
    """

    lost: Sequence[Figure]
    changed: Sequence[int]
    cosines: Float64 | None

    def most_changed(self) -> list[int]:
        """Indices of the changed items, the lowest cosine first; without cosines, in order."""
        if self.cosines is None:
            return list(self.changed)
        return sorted(self.changed, key=self.cosines.__getitem__)


def figures(outcomes: Outcomes, metrics: Sequence[Metric]) -> list[Figure]:
    """The metrics of all items."""
    columns = outcomes.columns
    intervals = bootstrap_intervals([metric.compute for metric in metrics], columns)
    return [
        Figure(name=metric.name, value=metric.compute(columns), low=low, high=high)
        for metric, (low, high) in zip(metrics, intervals, strict=True)
    ]


def group_figures(outcomes: Outcomes, metrics: Sequence[Metric]) -> list[GroupFigures]:
    """The metrics of each group, in the order of its first item; empty without groups."""
    rows: dict[str, list[int]] = {}
    for index, group in enumerate(outcomes.groups):
        rows.setdefault(group, []).append(index)
    return [
        GroupFigures(
            name=group,
            items=len(own),
            values={m.name: m.compute(_rows(outcomes.columns, own)) for m in metrics},
        )
        for group, own in rows.items()
    ]


def item_value(outcomes: Outcomes, metric: Metric, index: int) -> float:
    """A metric of one item."""
    return metric.compute(_rows(outcomes.columns, [index]))


def compare(own: Outcomes, other: Outcomes, metrics: Sequence[Metric]) -> Comparison:
    """Compares the outcomes of two packages on the same items.

    Raises:
        InputError: the items differ.
    """
    if list(own.ids) != list(other.ids) or list(own.expected) != list(other.expected):
        raise InputError("the packages were evaluated on different items")
    computes = [metric.compute for metric in metrics]
    intervals = bootstrap_intervals(computes, own.columns, other.columns)
    lost = [
        Figure(
            name=metric.name,
            value=_POINTS * (metric.compute(other.columns) - metric.compute(own.columns)),
            low=_POINTS * low,
            high=_POINTS * high,
        )
        for metric, (low, high) in zip(metrics, intervals, strict=True)
    ]
    pairs = zip(own.answers, other.answers, strict=True)
    return Comparison(
        lost=lost,
        changed=[index for index, (answer, theirs) in enumerate(pairs) if answer != theirs],
        cosines=_cosines(own, other),
    )


def check_same_task(own: TaskResult, other: TaskResult) -> None:
    """InputError unless two results have the same parts."""
    if list(own.parts) != list(other.parts):
        raise InputError("the packages were evaluated on different items")


def _cosines(own: Outcomes, other: Outcomes) -> Float64 | None:
    if own.vectors is None or other.vectors is None or own.vectors.shape != other.vectors.shape:
        return None
    products = own.vectors.astype(np.float64) * other.vectors
    cosines: Float64 = products.sum(axis=1)
    return cosines


def _rows(columns: Columns, indices: Sequence[int]) -> Columns:
    return {name: column[list(indices)] for name, column in columns.items()}
