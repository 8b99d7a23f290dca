"""Predictable outputs that depend on the inputs alone, without an engine.

A test double for everything above a session: equal inputs give equal outputs in any batch, and
different inputs give different outputs. They are unrelated to the model's real outputs.

The decoder writes the first channel of each token into its caches. Its prediction depends on every
number in the caches up to the token, in all layers and heads. So a mixed-up row, an overwritten or
unwritten slot or a NaN changes the predicted tokens.

Legend: N sequences, T tokens, C channels, L logit positions, V vocabulary; K heads, S slots and
E channels per head of a cache; t image tokens per tile.
"""

import hashlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.reader import Package
from perception_rt.runtime.session import Engine, State

Array = np.ndarray[Any, Any]

_BITS = {2: np.uint16, 4: np.uint32}  # unsigned integers by the itemsize of a float
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FEATURE_VALUES = 2048  # values of an image token: float16 has every integer up to this


class ReferenceEngine:
    """Draws each output row from a generator seeded with a hash of the input row."""

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = spec

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """float32 in (-1, 1), of the spec's shapes."""
        (source,) = inputs.values()
        specs = [self._spec.output(name) for name in outputs]
        return [np.stack([_row(row, spec) for row in source]) for spec in specs]

    def close(self) -> None:
        """Does nothing."""


class ReferenceEmbedding:
    """Puts token ids or hashes of tiles into the first channel, and zeros into the others."""

    def __init__(self, spec: GraphSpec) -> None:
        (self._output,) = spec.outputs

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """float32 (N, T, C) of ids (N, T), or (N, t, C) of tiles."""
        ((name, source),) = inputs.items()
        _, tokens, channels = self._output.shape
        if name == contract.TOKENS:
            first = source
        else:
            first = np.stack([_tile_values(tile, int(tokens)) for tile in source])
        hidden = np.zeros((*first.shape, int(channels)), np.float32)
        hidden[..., 0] = first
        return [hidden]

    def close(self) -> None:
        """Does nothing."""


class ReferenceDecoder:
    """One part of a decoder; passes a hash of its caches to the next in the second channel."""

    def __init__(self, spec: GraphSpec) -> None:
        self._spec = spec

    def run(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], state: Mapping[str, State]
    ) -> list[Array]:
        """Hidden state, float32 (N, T, C), or logits in [-1, 1), float32 (N, L, V)."""
        hidden = inputs[contract.HIDDEN]
        hashes = _append(hidden, inputs[contract.PAST_LENGTHS], list(state.values()))
        (output,) = outputs
        if output == contract.LOGITS:
            chosen = np.take_along_axis(hashes, inputs[contract.LOGIT_POSITIONS], axis=1)
            vocab_size = int(self._spec.output(output).shape[2])
            draws = _mixed(chosen[..., None] + np.arange(vocab_size, dtype=np.uint64) * _GOLDEN)
            return [(draws >> np.uint64(40)).astype(np.float32) / np.float32(2**23) - 1]
        hidden = hidden.copy()
        hidden[..., 1] = hashes >> np.uint64(40)  # 24 bits, which float32 represents exactly
        return [hidden]

    def close(self) -> None:
        """Does nothing."""


def check_device(device: str) -> None:
    """Accepts every device: none is used."""


def open_session(package: Package, graph: str, **_: object) -> Engine:
    """Opens a graph of any package; other arguments are ignored."""
    spec = package.graph(graph)
    if graph.startswith(contract.DECODER):
        return ReferenceDecoder(spec)
    if spec.outputs[0].name in (contract.HIDDEN, contract.IMAGE_FEATURES):
        return ReferenceEmbedding(spec)
    return ReferenceEngine(spec)


def _row(row: Array, spec: TensorSpec) -> Array:
    digest = hashlib.sha256(spec.name.encode() + np.ascontiguousarray(row).tobytes()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "little"))
    shape = [size for size in spec.shape[1:] if isinstance(size, int)]
    return rng.uniform(-1, 1, shape).astype(np.float32)


def _tile_values(tile: Array, tokens: int) -> Array:
    """One number for each image token of a tile, (t,)."""
    stream = hashlib.shake_128(np.ascontiguousarray(tile).tobytes()).digest(2 * tokens)
    return np.frombuffer(stream, "<u2") % _FEATURE_VALUES


def _append(hidden: Array, past: Array, caches: Sequence[Any]) -> Array:
    """Writes hidden (N, T, C) into each cache (N, K, S, E); returns hashes, uint64 (N, T).

    The hash of a token depends on the first channel of its row in each cache, up to the token.
    """
    rows = np.arange(len(hidden))[:, None]
    places = past[:, None] + np.arange(hidden.shape[1])  # (N, T)
    end = int(places.max()) + 1
    heads = caches[0].shape[1]
    factors = _factors(len(caches) * heads).reshape(-1, heads, 1)
    total = np.zeros((len(hidden), end), np.uint64)
    for cache, factor in zip(caches, factors, strict=True):
        cache[rows, :, places, 0] = hidden[:, :, :1]
        bits = np.ascontiguousarray(cache[:, :, :end, 0]).view(_BITS[cache.itemsize])
        total += (bits * factor).sum(axis=1, dtype=np.uint64)
    prefixes = np.cumsum(_mixed(total + _factors(end)), axis=1, dtype=np.uint64)
    before = hidden[:, :, 1].astype(np.uint64) * _GOLDEN
    return _mixed(np.take_along_axis(prefixes, places, axis=1) + before)


@lru_cache(maxsize=1024)
def _factors(count: int) -> Array:
    """Odd pseudo-random numbers, uint64 (count,)."""
    return _mixed(np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN) | np.uint64(1)


def _mixed(values: Array) -> Array:
    """Mixes the bits of each number: the finaliser of splitmix64."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    mixed: Array = values ^ (values >> np.uint64(31))
    return mixed
