"""Results of tasks that give each item a score per class.

Legend: N items, C classes, D width of embeddings.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.evaluation.data.labelled import Labelled
from perception_rt.evaluation.metrics.classification import label_ranks, mean_per_class
from perception_rt.evaluation.outcomes import Float32, Metric, Outcomes, TaskResult, mean_of

_TOP_1 = "top-1"
_TOP_5 = "top-5"
_LABEL = "label"


def classification_result(
    data: Labelled, scores: NDArray[np.floating], vectors: Float32, settings: Mapping[str, Any]
) -> TaskResult:
    """Top-1, top-5 (of more than five classes) and the mean of top-1 per class.

    Args:
        data: the items and their classes.
        scores: (N, C), higher is better.
        vectors: embeddings of the items, float32 (N, D).
        settings: as in `TaskResult`.
    """
    ranks = label_ranks(scores, data.labels)
    names = data.labelled_classes
    metrics = [mean_of(_TOP_1)]
    columns = {_TOP_1: (ranks == 0).astype(np.float64), _LABEL: data.labels.astype(np.float64)}
    if len(names) > 5:
        metrics.append(mean_of(_TOP_5))
        columns[_TOP_5] = (ranks < 5).astype(np.float64)
    metrics.append(
        Metric(
            name="mean per class",
            compute=lambda columns: mean_per_class(columns[_TOP_1], columns[_LABEL]),
        )
    )
    expected = [names[label] for label in data.labels]
    outcomes = Outcomes(
        ids=data.ids,
        expected=expected,
        answers=[names[best] for best in scores.argmax(axis=1)],
        columns=columns,
        groups=expected,
        vectors=vectors,
        pictures=data.items,
    )
    settings = {"classes": len(names), **settings}
    return TaskResult(parts={"": outcomes}, metrics=metrics, settings=settings, classes=names)
