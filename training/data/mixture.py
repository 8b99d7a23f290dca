"""Chooses the dataset and the line of every sample of a run, by arithmetic on sample numbers.

Sample n is the r-th sample of its dataset, where both are pure functions of n and the seed. So a
run can continue anywhere, with any number of ranks. Each L consecutive ranks of a dataset with L
lines, an epoch, cover all its lines.
"""

import math
from collections.abc import Collection
from functools import lru_cache
from hashlib import blake2b
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError

Ints: TypeAlias = NDArray[np.int64]

_BLOCK = 16384  # samples within which the shares are exact
_ROUNDS = 6  # Feistel rounds; four already make a pseudo-random permutation


def parse_mix(mix: str, known: Collection[str]) -> dict[str, float]:
    """Parses "name:weight,name:weight" into shares that sum to 1.

    Args:
        mix: the recipe's `data.mix`.
        known: dataset names of the recipe.

    Raises:
        InputError: an entry is malformed, a name is unknown or repeated, or a weight is not
            positive.
    """
    weights: dict[str, float] = {}
    for entry in mix.split(","):
        name, _, text = (part.strip() for part in entry.rpartition(":"))
        if name not in known:
            raise InputError(
                f"data.mix has {entry.strip()!r:.60}; an entry is name:weight, and names are "
                f"{', '.join(known):.200}"
            )
        if name in weights:
            raise InputError(f"data.mix has {name!r:.60} twice")
        weights[name] = _weight(name, text)
    if len(weights) >= _BLOCK:
        raise InputError(f"data.mix has {len(weights)} datasets; the limit is {_BLOCK - 1}")
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def _weight(name: str, text: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = math.nan
    if not 0 < weight < 1e12:
        raise InputError(f"data.mix: the weight of {name!r:.60} must be positive, not {text!r:.40}")
    return weight


class Mix:
    """Mixes datasets in proportion to their shares.

    Every block of 16384 samples has the same number of samples of each dataset, at least one, in
    random places. So shares are exact to 1 in 16384, except that tiny datasets take from the
    largest.

    Args:
        shares: share of each dataset; they sum to 1.
        seed: RNG seed.
    """

    def __init__(self, shares: list[float], seed: int) -> None:
        counts = np.maximum(1, np.floor(np.multiply(shares, _BLOCK)).astype(np.int64))
        counts[np.argmax(counts)] += _BLOCK - counts.sum()
        self._counts = counts
        self._seed = seed
        self._block = lru_cache(maxsize=4)(self._make_block)

    def pick(self, number: int) -> tuple[int, int]:
        """Returns the dataset's index of sample `number`, and the sample's rank in that dataset."""
        block, place = divmod(number, _BLOCK)
        datasets, ranks = self._block(block)
        chosen = int(datasets[place])
        return chosen, block * int(self._counts[chosen]) + int(ranks[place])

    def _make_block(self, block: int) -> tuple[Ints, Ints]:
        """Dataset index of each sample of a block, and the sample's rank in that dataset."""
        rng = np.random.default_rng((self._seed, block))
        datasets = rng.permutation(np.repeat(np.arange(len(self._counts)), self._counts))
        ranks = np.empty(_BLOCK, np.int64)
        for dataset, count in enumerate(self._counts):
            ranks[datasets == dataset] = np.arange(count)
        return datasets, ranks


def shuffled(index: int, size: int, key: str) -> int:
    """Returns entry `index` of a shuffled `range(size)`, in constant memory.

    Args:
        index: from 0 to size - 1.
        size: at least 1.
        key: selects the shuffle.
    """
    assert 0 <= index < size
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    secret = blake2b(key.encode(), digest_size=16).digest()
    while True:
        left, right = index >> half, index & mask
        for turn in range(_ROUNDS):
            data = right.to_bytes(8, "little") + bytes([turn])
            digest = blake2b(data, key=secret, digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
        index = left << half | right
        if index < size:  # otherwise continue along the cycle until it re-enters the range
            return index
