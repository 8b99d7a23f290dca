"""Guesses at the next tokens: what followed the last time that the text was here.

Answers about a document repeat it, so the guesses are often right, and the decoder checks many
tokens in the time of one. A wrong guess costs time and changes nothing. Knows no model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from perception_rt.package.contract import ENGINE_POSITIONS

Array = np.ndarray[Any, Any]

MAX_DRAFTS = ENGINE_POSITIONS - 1
_MIN_MATCH, _MAX_MATCH = 2, 8  # tokens that must, and that need at most, be the same


class PromptLookup:
    """The tokens of one request, prompt and answer, to be searched for their own end."""

    def __init__(self, prompt: Array, max_new_tokens: int) -> None:
        """Takes the prompt's ids, int64 (T,); one below 0 equals nothing and ends a guess."""
        self._tokens = np.empty(len(prompt) + max_new_tokens, np.int64)
        self._tokens[: len(prompt)] = prompt
        self._count = len(prompt)

    def append(self, token: int) -> None:
        """Adds a token of the answer."""
        self._tokens[self._count] = token
        self._count += 1

    def draft(self, limit: int) -> list[int]:
        """At most `limit` tokens that may come next, none where the end is new.

        The longest repeated end decides, of equals the latest.
        """
        tokens = self._tokens[: self._count]
        if tokens[-1] < 0:
            return []
        places = np.flatnonzero(tokens[:-1] == tokens[-1])
        matched = 1
        while matched < min(_MAX_MATCH, self._count - 1) and tokens[-1 - matched] >= 0:
            earlier = places[places >= matched]
            longer = earlier[tokens[earlier - matched] == tokens[-1 - matched]]
            if len(longer) == 0:
                break
            places, matched = longer, matched + 1
        if matched < _MIN_MATCH:
            return []
        following = tokens[int(places[-1]) + 1 :][:limit]
        known = np.flatnonzero(following < 0)
        return [int(t) for t in following[: known[0] if len(known) else None]]


def agreed(drafts: Sequence[int], predicted: Sequence[int]) -> list[int]:
    """The tokens that greedy decoding would have given one by one.

    Args:
        drafts: the guesses.
        predicted: what the model says comes next, before the first guess and after each.

    Returns:
        The guesses before the first wrong one, and the model's own token in its place.
    """
    right = 0
    while right < len(drafts) and drafts[right] == predicted[right]:
        right += 1
    return list(predicted[: right + 1])
