"""Results of an evaluation, item by item, and the metrics that sum them up.

Intervals, groups and comparisons of two packages are computed from the items, so a task only fills
in `Outcomes` and names its metrics.

Legend: N items, D width of embeddings, C classes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.bulk.listing import Item

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
Columns = Mapping[str, Float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """A figure of a set of items.

    Attributes:
        name: name in tables and reports, such as "top-1".
        compute: the figure, 0 to 1, of columns that all have the same items. Items may be repeated,
            as the bootstrap draws them.
    """

    name: str
    compute: Callable[[Columns], float]


def mean_of(column: str, name: str | None = None) -> Metric:
    """The mean of a column as a metric; it has the column's name by default."""
    return Metric(name=name or column, compute=lambda columns: float(columns[column].mean()))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Outcomes:
    """Results of a task's items, in the order of the data.

    Attributes:
        ids: name of each item, unique; the same data gives the same names with every package.
        expected: right answer of each item, a JSON value.
        answers: answer of the package, a JSON value.
        columns: figures of the items by name, float64 (N,), such as "correct" with 0 and 1; or
            counts per class, float64 (N, C), which the report leaves out.
        groups: class or kind of each item, for the results per class; empty if there are none.
        vectors: float32 (N, D) unit embeddings, or None.
        texts: text of each item, such as a question or a caption; empty if there are none.
        pictures: image or video of each item, which `bulk.contents.Contents` reads when a sheet is
            drawn or the data are hashed; empty if there are none.
        found: image or video that each answer names, for sheets; empty for answers of other kinds.
        drawings: pictures of each item's answer for sheets, such as its right mask and the
            predicted one; empty if there are none.
        files: all images and videos, where items have several; hashed with the pictures.
    """

    ids: Sequence[str]
    expected: Sequence[Any]
    answers: Sequence[Any]
    columns: Columns
    groups: Sequence[str] = ()
    vectors: Float32 | None = None
    texts: Sequence[str] = ()
    pictures: Sequence[Item] = ()
    found: Sequence[Item] = ()
    drawings: Sequence[Sequence[Image.Image]] = ()
    files: Sequence[Item] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TaskResult:
    """Results of a task.

    Attributes:
        parts: outcomes by direction or subset, such as "image to text"; one part named "" for most
            tasks.
        metrics: figures that are computed of each part.
        settings: how the task was run, JSON values for the report: prompts, templates, k.
        classes: names of the classes, in order, if `expected` and `answers` are such names: the
            report then has a confusion matrix. Empty for tasks of another kind.
    """

    parts: Mapping[str, Outcomes]
    metrics: Sequence[Metric]
    settings: Mapping[str, Any] = field(default_factory=dict)
    classes: Sequence[str] = ()
