"""Finds the token that closes a JSON value which is being written.

A model that is not trained on JSON ends its answer where the value ends, after `{"count": 4`. There
it may not end yet. If the wish to end were only dropped, it would go on with digits or words until
its tokens are used up.

Legend: V vocabulary.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

# Tokens that close a value; the first that is allowed is taken.
_IN_STRING = (b'"',)
_ELSEWHERE = (b"}", b"]", b",")
_QUOTE, _BACKSLASH = b'"\\'


class JsonCloser:
    """Follows the tokens of one answer in JSON."""

    def __init__(self, spellings: Sequence[bytes], ids: Mapping[bytes, int]) -> None:
        """Starts before the first token.

        Args:
            spellings: bytes of each token id.
            ids: a token id of each spelling.
        """
        self._spellings = spellings
        self._ids = ids
        self._in_string = False
        self._escaped = False

    def push(self, token: int) -> None:
        """Takes the next token of the answer."""
        for byte in self._spellings[token]:
            if self._escaped:
                self._escaped = False
            elif byte == _QUOTE:
                self._in_string = not self._in_string
            else:
                self._escaped = self._in_string and byte == _BACKSLASH

    def closer(self, allowed: Array) -> int | None:
        """Returns the token that closes the innermost value, or separates it from the next.

        Args:
            allowed: bool (V,), tokens that may come next.

        Returns:
            A token id; None if no value can end here.
        """
        for spelling in _IN_STRING if self._in_string else _ELSEWHERE:
            token = self._ids.get(spelling)
            if token is not None and allowed[token]:
                return token
        return None
