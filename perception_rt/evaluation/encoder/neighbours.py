"""Task: classify by the nearest labelled examples.

Legend: N items, T training items.
"""

import numpy as np

from perception_rt.errors import InputError, describe
from perception_rt.evaluation.data.training_data import read_training
from perception_rt.evaluation.encoder.classification import classification_result
from perception_rt.evaluation.encoder.embeddings import embed_items
from perception_rt.evaluation.metrics.neighbours import neighbour_votes
from perception_rt.evaluation.outcomes import TaskResult
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.records import check_integer
from perception_rt.runtime.embedder import Embedder

_K = 20
_TEMPERATURE = 0.07
_CHUNK = 1024  # items whose cosines are in memory at once


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task: weighted votes of the nearest training items by cosine.

    Args:
        engine: a loaded encoder.
        data: as for `read_labelled`.
        options: `train_data`, `classes`, `k`, `temperature` and `num_frames`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable, or there are fewer training items than k.
    """
    train, test = read_training(data, options)
    k = check_integer("--k", _K if options.k is None else options.k, 1, len(train.ids))
    temperature = _TEMPERATURE if options.temperature is None else options.temperature
    if not 0 < temperature < float("inf"):
        raise InputError(f"--temperature must be above 0, not {describe(temperature)}")
    examples = embed_items(engine, train.items, options.num_frames, on_progress)
    vectors = embed_items(engine, test.items, options.num_frames, on_progress)
    votes = [
        neighbour_votes(
            vectors[start : start + _CHUNK] @ examples.T,
            train.labels,
            len(train.classes),
            k=k,
            temperature=temperature,
        )
        for start in range(0, len(vectors), _CHUNK)
    ]
    settings = {"train_items": len(train.ids), "k": k, "temperature": temperature}
    return classification_result(test, np.concatenate(votes), vectors, settings)
