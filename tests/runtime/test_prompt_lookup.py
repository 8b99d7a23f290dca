"""Drafts from earlier text: which are made, and which are accepted."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from perception_rt.runtime.generation.prompt_lookup import PromptLookup, agreed


def drafts(tokens: list[int], limit: int = 8, *, prompt: int | None = None) -> list[int]:
    """Drafts after `tokens`, the first `prompt` of which are the prompt."""
    cut = len(tokens) if prompt is None else prompt
    lookup = PromptLookup(np.array(tokens[:cut]), len(tokens) - cut + 1)
    for token in tokens[cut:]:
        lookup.append(token)
    return lookup.draft(limit)


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([1, 2, 3, 4, 1, 2], [3, 4, 1, 2]),
        ([1, 2, 3, 1, 2, 9, 1, 2], [9, 1, 2]),  # the latest among equals
        ([5, 1, 2, 3, 9, 1, 2, 8, 5, 1, 2], [3, 9, 1, 2, 8, 5, 1, 2]),  # a longer match first
        ([7, 7, 7, 7], [7]),
        ([1, 2, 3, 4], []),
        ([3, 1, 4, 1], []),  # one equal token is too few
        ([1], []),
        ([-1, -1, -1, -1], []),
        ([1, 2, 3, -1, 4, 1, 2], [3]),  # an image ends a draft
        ([1, 2, -1, 1, 2], []),
    ],
)
def test_drafts(tokens: list[int], expected: list[int]) -> None:
    for prompt in (1, len(tokens)):
        assert drafts(tokens, prompt=prompt) == expected


@given(st.lists(st.integers(-1, 3), min_size=1, max_size=40), st.integers(1, 10))
def test_a_draft_follows_the_same_two_tokens(tokens: list[int], limit: int) -> None:
    found = drafts(tokens, limit)
    assert len(found) <= limit and -1 not in found
    if -1 not in tokens:
        assert bool(found) == (tokens[-2:] in [tokens[i - 2 : i] for i in range(2, len(tokens))])
    if found:
        text = tokens[-2:] + found
        assert any(tokens[i : i + len(text)] == text for i in range(len(tokens)))


@pytest.mark.parametrize(
    ("drafted", "predicted", "expected"),
    [
        ([1, 2, 3], [1, 2, 3, 4], [1, 2, 3, 4]),
        ([1, 2, 3], [1, 5, 3, 4], [1, 5]),
        ([1, 2, 3], [9, 2, 3, 4], [9]),
        ([], [7], [7]),
    ],
)
def test_what_greedy_decoding_would_have_given(
    drafted: list[int], predicted: list[int], expected: list[int]
) -> None:
    assert agreed(drafted, predicted) == expected
