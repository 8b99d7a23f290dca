"""The report of an evaluation: figures of one package, or of one against another.

`Report.to_dict` is the content of `report.json`, which `write_report` writes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from perception_rt._version import __version__
from perception_rt.evaluation.metrics.bootstrap import LEVEL, RESAMPLES, SEED
from perception_rt.evaluation.outcomes import Float64, Outcomes, TaskResult
from perception_rt.evaluation.report.figures import Comparison, Figure, GroupFigures

SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Run:
    """One package's results on a task.

    Attributes:
        package: facts about the package: `name`, `id`, `model`, `precision`, `backend`, `device`.
        result: the results.
        digest: digest of the data, as `data_digest` computes it.
    """

    package: Mapping[str, str]
    result: TaskResult
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PartReport:
    """Figures of one part of a task.

    Attributes:
        name: name of the part, such as "image to text"; "" if it is the only one.
        outcomes: the items.
        figures: the metrics of all items.
        groups: the metrics of each class or kind; empty if there are none.
        comparison: against the other package; None without one.
        other: the other package's items; None without one.
    """

    name: str
    outcomes: Outcomes
    figures: list[Figure]
    groups: list[GroupFigures]
    comparison: Comparison | None = None
    other: Outcomes | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; metrics from 0 to 1."""
        return self.summary() | {
            "groups": [
                {"name": group.name, "items": group.items, "metrics": group.values}
                for group in self.groups
            ],
            "answers": [self._answer(index) for index in range(len(self.outcomes))],
        }

    def summary(self) -> dict[str, Any]:
        """Plain JSON values without groups and answers."""
        return {
            "name": self.name,
            "items": len(self.outcomes),
            "metrics": [_figure(figure) for figure in self.figures],
            "against": None if self.comparison is None else self._comparison(self.comparison),
        }

    def _comparison(self, comparison: Comparison) -> dict[str, Any]:
        cosines = comparison.cosines
        return {
            "points_lost": [_figure(figure) for figure in comparison.lost],
            "changed_answers": len(comparison.changed),
            "cosine": None if cosines is None else cosine_summary(cosines),
        }

    def _answer(self, index: int) -> dict[str, Any]:
        own, other = self.outcomes, self.other
        found: dict[str, Any] = {"id": own.ids[index]}
        if own.texts:
            found["text"] = own.texts[index]
        found |= {"expected": own.expected[index], "answer": own.answers[index]}
        found["values"] = {
            name: float(column[index]) for name, column in own.columns.items() if column.ndim == 1
        }
        if other is not None:
            found["other_answer"] = other.answers[index]
        return found


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Report:
    """Result of `evaluate`.

    Attributes:
        task: name of the task.
        data: path of the data, as it was given.
        run: the package's results.
        against: the other package's results; None without one.
        parts: figures by part.
    """

    task: str
    data: str
    run: Run
    against: Run | None
    parts: list[PartReport]

    def value(self, metric: str, part: str = "") -> float:
        """A metric of a part, from 0 to 1; KeyError if there is none."""
        figures = [f for p in self.parts if p.name == part for f in p.figures]
        return {figure.name: figure.value for figure in figures}[metric]

    def to_dict(self, pictures: list[str] | None = None) -> dict[str, Any]:
        """Plain JSON values: the content of `report.json`.

        Args:
            pictures: names of the pictures beside it.
        """
        return {
            "schema": SCHEMA,
            "version": __version__,
            "task": self.task,
            "package": dict(self.run.package),
            "against": None if self.against is None else dict(self.against.package),
            "data": {"path": self.data, "digest": self.run.digest},
            "settings": dict(self.run.result.settings),
            "bootstrap": {"level": LEVEL, "resamples": RESAMPLES, "seed": SEED},
            "parts": [part.to_dict() for part in self.parts],
            "pictures": pictures or [],
        }

    def summary(self) -> dict[str, Any]:
        """Plain JSON values without paths, groups and answers, for the record of a package."""
        other = None if self.against is None else self.against.package
        return {
            "task": self.task,
            "data": self.run.digest,
            "against": None if other is None else {k: other[k] for k in ("id", "precision")},
            "parts": [part.summary() for part in self.parts],
        }


def cosine_summary(cosines: Float64) -> dict[str, float]:
    """Mean, lowest and 1st percentile of cosines."""
    return {
        "mean": float(cosines.mean()),
        "percentile_1": float(np.percentile(cosines, 1)),
        "lowest": float(cosines.min()),
    }


def _figure(figure: Figure) -> dict[str, Any]:
    return {"name": figure.name, "value": figure.value, "interval": [figure.low, figure.high]}
