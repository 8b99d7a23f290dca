"""Task: find images or videos by their captions, and captions by their images or videos.

Legend: N items, T captions, D width of embeddings.
"""

import numpy as np

from perception_rt.evaluation.data.captioned import Captioned, read_captioned
from perception_rt.evaluation.encoder.embeddings import embed_items
from perception_rt.evaluation.metrics.retrieval import Int64, dual_softmax, first_match_ranks
from perception_rt.evaluation.outcomes import Float32, Float64, Outcomes, TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.embedder import Embedder

_DEPTHS = (1, 5, 10)


def run(engine: Embedder, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task.

    Recall at K is the share of queries with a match among the K best. An image matches each of its
    captions; a caption matches its image only.

    Args:
        engine: a loaded encoder with a text tower.
        data: as for `read_captioned`.
        options: `dual_softmax` and `num_frames`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable.
    """
    pairs = read_captioned(data)
    texts = engine.embed_texts(
        pairs.captions, on_progress=lambda done, total: on_progress("captions", done, total)
    )
    vectors = embed_items(engine, pairs.items, options.num_frames, on_progress)
    similarity = vectors @ texts.T  # (N, T)
    weigh = bool(options.dual_softmax)
    scale = np.float32(engine.logit_scale)
    to_text = dual_softmax(scale * similarity) if weigh else similarity
    to_item = dual_softmax(scale * similarity.T) if weigh else similarity.T
    kind = pairs.items[0].kind
    return TaskResult(
        parts={
            f"{kind} to text": _to_text(pairs, to_text, vectors),
            f"text to {kind}": _to_item(pairs, to_item, texts),
        },
        metrics=[mean_of(f"R@{depth}") for depth in _DEPTHS],
        settings={"captions": len(pairs.captions), "dual_softmax": weigh},
    )


def _to_text(pairs: Captioned, scores: Float32, vectors: Float32) -> Outcomes:
    """Items as queries of the captions; scores (N, T)."""
    numbers = np.arange(len(pairs.items))
    captions: list[list[str]] = [[] for _ in pairs.items]
    for caption, owner in zip(pairs.captions, pairs.owners, strict=True):
        captions[owner].append(caption)
    return Outcomes(
        ids=pairs.ids,
        expected=captions,
        answers=[pairs.captions[best] for best in scores.argmax(axis=1)],
        columns=_recalls(first_match_ranks(scores, numbers, pairs.owners)),
        vectors=vectors,
        pictures=pairs.items,
    )


def _to_item(pairs: Captioned, scores: Float32, texts: Float32) -> Outcomes:
    """Captions as queries of the items; scores (T, N)."""
    best = scores.argmax(axis=1)
    counts = np.zeros(len(pairs.items), np.int64)
    ids = []
    for owner in pairs.owners:
        ids.append(f"{pairs.ids[owner]}#{counts[owner]}")
        counts[owner] += 1
    return Outcomes(
        ids=ids,
        expected=[pairs.ids[owner] for owner in pairs.owners],
        answers=[pairs.ids[found] for found in best],
        columns=_recalls(first_match_ranks(scores, pairs.owners, np.arange(len(pairs.items)))),
        vectors=texts,
        texts=pairs.captions,
        pictures=[pairs.items[owner] for owner in pairs.owners],
        found=[pairs.items[found] for found in best],
    )


def _recalls(ranks: Int64) -> dict[str, Float64]:
    return {f"R@{depth}": (ranks < depth).astype(np.float64) for depth in _DEPTHS}
