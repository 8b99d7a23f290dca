"""From logits to a token id: the likeliest, or drawn by a generator of the request's own.

Knows nothing of models, batches or requests: a row of logits comes in, an id goes out, and one draw
takes one number from the generator, so that a seeded stream is the same in any company.

Legend: V vocabulary.
"""

from typing import Any

import numpy as np

from perception_rt.errors import BackendError

Array = np.ndarray[Any, Any]


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(
        self,
        *,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        allowed: Array | None = None,
    ) -> None:
        """All of what is given applies, in the order temperature, top_k, top_p.

        Args:
            temperature: what logits are divided by; 0 takes the likeliest token, and the rest of
                the options then change nothing.
            top_k: how many of the likeliest tokens are drawn from, at least 1.
            top_p: the fewest of the likeliest tokens that have this much probability together,
                in (0, 1].
            seed: of the draws; None for one that nobody knows.
            allowed: bool (V,), False for tokens that are never chosen.
        """
        self._temperature = temperature
        self._top_k = top_k
        self._top_p = top_p
        self._allowed = allowed
        self._random = np.random.default_rng(seed)

    @property
    def greedy(self) -> bool:
        """Whether it takes the likeliest of the allowed tokens, always."""
        return self._temperature == 0

    def choose(self, logits: Array) -> int:
        """The next token's id; of equals the lowest.

        Args:
            logits: float (V,).

        Raises:
            BackendError: no token can be chosen: a logit is NaN or infinite, or all are excluded.
        """
        if self._allowed is not None:
            logits = np.where(self._allowed, logits, -np.inf)
        likeliest = int(np.argmax(logits))  # of a NaN, if there is one
        if not np.isfinite(logits[likeliest]):
            raise BackendError("the model gave logits that no token can be chosen from")
        if self._temperature == 0:
            return likeliest
        # Shifted before the division, so that a tiny temperature gives zeros and no overflow.
        shifted = logits.astype(np.float64) - float(logits[likeliest])
        with np.errstate(over="ignore"):  # to -inf, by a temperature near 0
            weights = np.exp(shifted / self._temperature)
        ids = self._candidates(weights)
        cumulative = np.cumsum(weights[ids])
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(int(drawn), len(ids) - 1)])

    def _candidates(self, weights: Array) -> Array:
        """Ids to draw from; likeliest first where an option has cut them."""
        ids = np.flatnonzero(weights)
        if self._top_k is not None and self._top_k < len(ids):
            least = np.partition(weights[ids], -self._top_k)[-self._top_k]
            ids = _likeliest_first(ids[weights[ids] >= least], weights)[: self._top_k]
        if self._top_p is not None and self._top_p < 1:
            total = weights[ids].sum()
            # All tokens below this together have less than 1 - top_p, so none of them is needed.
            ids = ids[weights[ids] >= (1 - self._top_p) * total / len(ids)]
            ids = _likeliest_first(ids, weights)
            needed = np.searchsorted(np.cumsum(weights[ids]), self._top_p * total) + 1
            ids = ids[: int(needed)]
        return ids


def _likeliest_first(ids: Array, weights: Array) -> Array:
    """`ids` by falling weight, equals by rising id."""
    return ids[np.argsort(-weights[ids], kind="stable")]
