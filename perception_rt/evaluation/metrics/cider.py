"""CIDEr-D: similarity of captions to those of people, weighed by how rare their words are.

Legend: N items.
"""

import math
from collections import Counter
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from perception_rt.evaluation.metrics.caption_tokens import caption_tokens

Float64 = NDArray[np.float64]
Ngram = tuple[str, ...]

_LONGEST = 4
_SIGMA = 6.0
_SCALE = 10.0


def cider(captions: Sequence[str], references: Sequence[Sequence[str]]) -> Float64:
    """CIDEr-D of each caption, 0 to 10, float64 (N,); tables give 100 times the mean.

    The rarity of an n-gram is its share of items whose references have it, so an item's score
    depends on all items, and scores of a single item are 0. As in COCO's code, a caption's length
    is its number of word pairs.

    Args:
        captions: a caption of each item, (N,).
        references: captions by people of each item, at least one each, (N,).
    """
    counted = [[_ngrams(text) for text in texts] for texts in references]
    found = Counter(ngram for texts in counted for ngram in set().union(*texts))
    log_items = math.log(len(captions))
    rarity = {ngram: log_items - math.log(items) for ngram, items in found.items()}
    scores = np.zeros(len(captions))
    for index, (caption, texts) in enumerate(zip(captions, counted, strict=True)):
        own = _ngrams(caption)
        total = sum(_similarity(own, other, rarity, log_items) for other in texts)
        scores[index] = _SCALE * total / len(texts)
    return scores


def _ngrams(caption: str) -> Counter[Ngram]:
    words = caption_tokens(caption)
    return Counter(
        tuple(words[start : start + size])
        for size in range(1, _LONGEST + 1)
        for start in range(len(words) - size + 1)
    )


def _similarity(
    own: Counter[Ngram], other: Counter[Ngram], rarity: dict[Ngram, float], unseen: float
) -> float:
    """Mean over the sizes of n-grams of the clipped cosine, less for captions of other lengths."""
    total = 0.0
    for size in range(1, _LONGEST + 1):
        mine, theirs = (
            {n: count * rarity.get(n, unseen) for n, count in counts.items() if len(n) == size}
            for counts in (own, other)
        )
        shared = sum(min(mine[n], theirs[n]) * theirs[n] for n in mine.keys() & theirs.keys())
        if shared:
            total += shared / math.hypot(*mine.values()) / math.hypot(*theirs.values())
    longer = _pairs(own) - _pairs(other)
    return math.exp(-(longer**2) / (2 * _SIGMA**2)) * total / _LONGEST


def _pairs(counts: Counter[Ngram]) -> int:
    return sum(count for ngram, count in counts.items() if len(ngram) == 2)
