"""Drafts the next tokens from text seen before: what followed an earlier copy of the last tokens.

Answers about a document repeat it, so drafts are often right, and the decoder verifies several in
the time of one. A wrong draft costs time and changes no token. Knows no model.
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from perception_rt.package.contract import ENGINE_POSITIONS

Array = np.ndarray[Any, Any]

MAX_DRAFTS = ENGINE_POSITIONS - 1
# Number of last tokens that an earlier copy must share, and beyond which more do not matter.
_MIN_MATCH, _MAX_MATCH = 2, 8


class PromptLookup:
    """Tokens of one request, prompt and answer, searched for earlier copies of their end."""

    def __init__(
        self, prompt: Array, max_new_tokens: int, *, expected: Array | None = None
    ) -> None:
        """Creates a lookup.

        Args:
            prompt: int64 (T,) token ids; negative ones match nothing and end a draft.
            max_new_tokens: most tokens that are appended.
            expected: int64 token ids of more text to search, as if it had followed the prompt once.
        """
        known = [prompt]
        if expected is not None:
            known = [prompt, expected, np.array([-1]), prompt]
        size = sum(map(len, known))
        self._tokens = np.empty(size + max_new_tokens, np.int64)
        np.concatenate(known, out=self._tokens[:size])
        self._count = size

    def append(self, token: int) -> None:
        """Adds a token of the answer."""
        self._tokens[self._count] = token
        self._count += 1

    def draft(self, limit: int) -> list[int]:
        """Returns at most `limit` likely next tokens; none if the last tokens are new.

        The longest earlier copy of the last tokens decides; among equals, the latest.
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
        unknown = np.flatnonzero(following < 0)
        return [int(t) for t in following[: unknown[0] if len(unknown) else None]]


def agreed(drafts: Sequence[int], predicted: Iterable[int]) -> list[int]:
    """Returns the tokens that greedy decoding would have given one by one.

    Args:
        drafts: the drafted tokens.
        predicted: the model's next token before the first draft and after each draft; none is
            taken after the first wrong draft.

    Returns:
        The drafts before the first wrong one, and the model's own token in its place.
    """
    right: list[int] = []
    for index, token in enumerate(predicted):
        right.append(token)
        if index == len(drafts) or token != drafts[index]:
            break
    return right
