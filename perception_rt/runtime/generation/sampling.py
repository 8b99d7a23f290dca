"""Chooses a token id from a row of logits: the likeliest, or sampled by the request's own RNG.

Knows nothing of models and batches. Each sampled token consumes one random number, so a seeded
request gives the same tokens whatever other requests run.

Legend: V vocabulary.
"""

from typing import Any

import numpy as np

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.constraint import Constraint

Array = np.ndarray[Any, Any]


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: "int | np.random.Generator | None" = None,  # importing it loads compiled modules
        allowed: Array | None = None,
        repetition_penalty: float = 1.0,
        seen: Array | None = None,
        constraint: Constraint | None = None,
    ) -> None:
        """Creates a sampler that applies penalty, temperature, top_k and top_p in this order.

        Args:
            temperature: divides the logits; 0 takes the likeliest token and ignores the rest.
            top_k: samples from this many of the likeliest tokens, at least 1.
            top_p: samples from the smallest set of likeliest tokens with this probability, in
                (0, 1].
            seed: RNG seed, or an RNG to draw from; None draws a fresh seed.
            allowed: bool (V,), False for tokens that are never chosen.
            repetition_penalty: divides positive logits of tokens seen so far, and multiplies
                negative ones; 1 changes nothing.
            seen: bool (V,), True for the tokens of the prompt; the chosen ones are added. Needed
                for a penalty.
            constraint: what the answer must follow; it is told each token. None for no constraint.
        """
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._allowed = allowed
        self._penalty = repetition_penalty
        self._seen = None if repetition_penalty == 1 or seen is None else seen.copy()
        self._constraint = constraint
        self._rng = np.random.default_rng(seed)

    @property
    def greedy(self) -> bool:
        """Whether it always takes the allowed token with the largest logit."""
        return self._temperature == 0 and self._seen is None and self._constraint is None

    def choose(self, logits: Array) -> int:
        """Returns the next token id, the lowest one among equals, and counts it as seen.

        Args:
            logits: float (V,).

        Raises:
            BackendError: a logit is NaN or infinite, or no token is allowed.
            InputError: the constraint cannot be followed.
        """
        if self._seen is not None:
            scores, logits = logits[self._seen], logits.copy()
            logits[self._seen] = np.where(
                scores < 0, scores * self._penalty, scores / self._penalty
            )
        token = self._choose(logits)
        if self._seen is not None:
            self._seen[token] = True
        if self._constraint is not None:
            self._constraint.accept(token)
        return token

    def _choose(self, logits: Array) -> int:
        """The next token id, from logits after the penalty."""
        if self._allowed is not None:
            logits = np.where(self._allowed, logits, -np.inf)
        if self._constraint is not None:
            logits = self._constraint.apply(logits)
        likeliest = int(np.argmax(logits))  # the index of a NaN, if there is one
        if not np.isfinite(logits[likeliest]):
            raise BackendError("the model gave logits that no token can be chosen from")
        if self._temperature == 0:
            return likeliest
        # Shifted before the division, so that a tiny temperature underflows to 0 without overflow.
        shifted = logits.astype(np.float64) - float(logits[likeliest])
        with np.errstate(over="ignore"):  # to -inf, by a temperature near 0
            weights = np.exp(shifted / self._temperature)
        ids = self._candidates(weights)
        cumulative = np.cumsum(weights[ids])
        drawn = np.searchsorted(cumulative, self._rng.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def _candidates(self, weights: Array) -> Array:
        """Ids to sample from; likeliest first if top_k or top_p cut them."""
        ids = np.flatnonzero(weights)
        if self._top_k is not None and self._top_k < len(ids):
            least = np.partition(weights[ids], -self._top_k)[-self._top_k]
            ids = _likeliest_first(ids[weights[ids] >= least], weights)[: self._top_k]
        if self._top_p is not None and self._top_p < 1:
            total = weights[ids].sum()
            # Tokens below this weight sum to less than 1 - top_p, so none is needed.
            ids = ids[weights[ids] >= (1 - self._top_p) * total / len(ids)]
            ids = _likeliest_first(ids, weights)
            needed = np.searchsorted(np.cumsum(weights[ids]), self._top_p * total) + 1
            ids = ids[: int(needed)]
        return ids


def _likeliest_first(ids: Array, weights: Array) -> Array:
    """Sorts ids by falling weight, equal ones by rising id."""
    return ids[np.argsort(-weights[ids], kind="stable")]
