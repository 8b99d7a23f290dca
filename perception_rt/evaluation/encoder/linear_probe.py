"""Task: classify by logistic regression on frozen embeddings.

Legend: N items, T training items, D width of embeddings.
"""

import numpy as np

from perception_rt.errors import InputError
from perception_rt.evaluation.data.labelled import Int64
from perception_rt.evaluation.data.training_data import read_training
from perception_rt.evaluation.encoder.classification import classification_result
from perception_rt.evaluation.encoder.embeddings import Float32, embed_items
from perception_rt.evaluation.encoder.logistic import Labels, Logistic, fit_logistic
from perception_rt.evaluation.outcomes import TaskResult
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.embedder import Embedder

# From strong to weak, so that each fit begins at the one before.
PENALTIES = tuple(10.0**exponent for exponent in range(0, -7, -1))
_FOLDS = 5  # one of them chooses the penalty
_SEED = 0


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task.

    A fifth of the training items of each class chooses the penalty; then all items are fitted
    with it. The items of `data` are used for the scores only.

    Args:
        engine: a loaded encoder.
        data: as for `read_labelled`.
        options: `train_data`, `classes` and `num_frames`.
        on_progress: called after each batch and each fit.

    Raises:
        InputError: the data are unusable, or a class has fewer than two training items.
        BackendError: torch is not installed.
    """
    train, test = read_training(data, options)
    held_out = validation_rows(train.labels, train.labelled_classes)
    examples = embed_items(engine, train.items, options.num_frames, on_progress)
    vectors = embed_items(engine, test.items, options.num_frames, on_progress)
    classes = len(train.classes)
    penalty, accuracies = choose_penalty(examples, train.labels, classes, held_out, on_progress)
    probe = fit_logistic(examples, train.labels, classes, penalty)
    settings = {
        "train_items": len(train.ids),
        "penalty": penalty,
        "validation": [
            {"penalty": value, "top-1": accuracy}
            for value, accuracy in zip(PENALTIES, accuracies, strict=True)
        ],
    }
    return classification_result(test, probe.scores(vectors), vectors, settings)


def validation_rows(labels: Int64, names: list[str]) -> Int64:
    """Rows that choose the penalty: a fifth of each class, at least one.

    Args:
        labels: int64 (T,).
        names: names of the classes, for errors.

    Raises:
        InputError: a class has fewer than two items.
    """
    generator = np.random.default_rng(_SEED)
    rows = []
    for number, name in enumerate(names):
        own = np.flatnonzero(labels == number)
        if len(own) < 2:
            raise InputError(f"class {name!r:.60} has fewer than two training items")
        rows.append(generator.permutation(own)[: max(1, len(own) // _FOLDS)])
    return np.sort(np.concatenate(rows))


def choose_penalty(
    features: Float32, labels: Labels, classes: int, held_out: Int64, on_progress: OnProgress
) -> tuple[float, list[float]]:
    """The penalty with the best accuracy on held-out rows, the strongest of equals; all accuracies.

    Args:
        features: float32 (T, D).
        labels: classes or shares of classes, as for `fit_logistic`.
        classes: number of classes.
        held_out: rows that are not fitted.
        on_progress: called after each fit.
    """
    fitted = np.setdiff1d(np.arange(len(labels)), held_out)
    accuracies: list[float] = []
    probe: Logistic | None = None
    for penalty in PENALTIES:
        probe = fit_logistic(features[fitted], labels[fitted], classes, penalty, probe)
        answers = probe.scores(features[held_out]).argmax(axis=1)
        accuracies.append(_accuracy(answers, labels[held_out]))
        on_progress("penalties", len(accuracies), len(PENALTIES))
    return PENALTIES[int(np.argmax(accuracies))], accuracies


def _accuracy(answers: Int64, labels: Labels) -> float:
    if labels.ndim == 1:
        return float((answers == labels).mean())
    return float(np.take_along_axis(labels, answers[:, None], axis=1).sum() / labels.sum())
