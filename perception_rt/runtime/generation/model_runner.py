"""Executes what the scheduler decides: encodes tiles, prefills prompts, decodes, verifies drafts.

Puts features and restored prefixes into place, calls the engine, and chooses tokens from logits.
It gives out no memory: every request it gets has a cache row (`RequestState.lease`).

Legend: T tokens, N sequences, C decoder width, L logit positions, V vocabulary, n tiles,
t image tokens per tile.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import numpy as np

from perception_rt.runtime.cache.feature_cache import FeatureCache
from perception_rt.runtime.cache.prefix_cache import PrefixCache, sequence_keys
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.prompt_lookup import MAX_DRAFTS, agreed
from perception_rt.runtime.generation.request_state import RequestState, lease_of

Array = np.ndarray[Any, Any]


class ModelRunner:
    """Runs the engine for requests. One thread at a time calls it.

    Attributes:
        max_positions: most positions that one call predicts from.
    """

    def __init__(
        self,
        engine: PlmEngine,
        *,
        features: FeatureCache | None = None,
        prefixes: PrefixCache | None = None,
    ) -> None:
        """Creates a runner.

        Args:
            engine: the model.
            features: cache of image features.
            prefixes: cache of keys and values of prompts.
        """
        self.max_positions = engine.max_positions
        self._engine = engine
        self._features = features
        self._prefixes = prefixes

    def restore(self, request: RequestState) -> tuple[int, deque[int]]:
        """Copies the longest cached prefix into the request's row and allocates its features.

        Returns:
            Number of restored tokens, and indices of the tiles that the rest of the prompt needs.
        """
        length = 0
        if self._prefixes is not None:
            length, entry = self._prefixes.longest(_token_keys(request, request.ids))
            # The first token to predict from runs in any case, for its logits.
            length = min(length, request.predict_from)
            if entry is not None and length > 0:
                lease = lease_of(request)
                lease.advance(0, written=length)
                self._prefixes.restore(entry, length, lease.block, lease.row)
        config = self._engine.config
        covered = int(np.searchsorted(request.image_positions, length))
        if covered < len(request.image_positions):
            shape = len(request.image_positions), config.decoder.dim
            request.features = np.empty(shape, np.float32)
        return length, deque(range(covered // config.tokens_per_tile, request.tile_count))

    def encode_tiles(self, request: RequestState) -> bool:
        """Fills in features of the next pending tiles, up to one batch that is not cached.

        Returns:
            Whether the engine encoded any.
        """
        pending = request.pending_tiles
        assert pending is not None and request.tiles is not None and request.features is not None
        # (n t, C) -> (n, t, C)
        features = request.features.reshape(request.tile_count, -1, request.features.shape[-1])
        new: list[int] = []
        while pending and len(new) < self._engine.tile_batch:
            index = pending.popleft()
            cached = None
            if self._features is not None:
                cached = self._features.get(request.tile_keys[index])
            if cached is None:
                new.append(index)
            else:
                features[index] = cached[0]
        if not new:
            return False
        tiles = request.tiles[new]
        is_float = tiles.dtype == np.float32
        encode = self._engine.encode_pixels if is_float else self._engine.encode_tiles
        features[new] = encode(tiles)
        if self._features is not None:
            for index in new:
                self._features.put(request.tile_keys[index], features[index : index + 1])
        return True

    def prefill(self, request: RequestState, stop: int) -> Array:
        """Runs prompt tokens up to index `stop`, and scores targets among them.

        Returns:
            Predictions after the last token, for `choose`.
        """
        lease = lease_of(request)
        start = lease.length
        first = stop - 1
        if request.targets is not None:
            first = min(first, max(start, request.predict_from))
        hidden = self._prompt_hidden(request, start, stop)
        lease.advance(start, written=stop)  # before the call, which may fail half-way
        positions = np.arange(first - start, stop - start)
        (predicted,) = self._forward([request], hidden[None], positions[None])
        if request.targets is not None and first >= request.predict_from:
            done = first - request.predict_from
            targets = request.targets[done : done + len(predicted)]
            rows = zip(predicted, targets, strict=True)
            request.logprobs += [_logprob(logits, int(token)) for logits, token in rows]
        if stop == len(request.ids) and request.max_new_tokens == 0:
            request.logits = predicted[-1]
        last: Array = predicted[-1:]
        return last

    def draft(self, request: RequestState) -> list[int]:
        """Returns tokens that may come next; none without lookup or a match."""
        if request.lookup is None:
            return []
        room = request.max_new_tokens - len(request.tokens) - 1
        return request.lookup.draft(min(MAX_DRAFTS, room)) if room > 0 else []

    def decode(self, requests: Sequence[RequestState]) -> Array:
        """Appends the last token of each request, whose rows are adjacent, to the caches.

        Returns:
            Predictions after it, one row per request, for `choose`.
        """
        for request in requests:
            lease = lease_of(request)
            lease.advance(lease.length, written=lease.length + 1)
        tokens = np.array([request.tokens[-1] for request in requests])
        hidden = self._engine.embed(tokens)[:, None]  # (N, C) -> (N, 1, C)
        return self._forward(requests, hidden, np.zeros((len(requests), 1), np.int64))

    def verify(self, request: RequestState, drafts: Sequence[int]) -> list[int]:
        """Appends the last token and the drafts to the cache in one call.

        Returns:
            The tokens that greedy decoding would have given: the drafts that agree, and one more.
        """
        tokens = np.array([request.tokens[-1], *drafts])
        lease, count = lease_of(request), len(tokens)
        lease.advance(lease.length, written=lease.length + count)
        hidden = self._engine.embed(tokens)[None]  # (T, C) -> (1, T, C)
        (predicted,) = self._forward([request], hidden, np.arange(count)[None])
        # One by one: a penalty depends on the tokens before, and ends with the first wrong draft.
        return agreed(drafts, self.choose(request, predicted))

    def choose(self, request: RequestState, predicted: Array) -> Iterator[int]:
        """Yields a token for each of L positions of one request's predictions.

        A token is chosen when it is asked for, as the one that follows all chosen before.
        """
        if predicted.ndim == 1:  # token ids, which the engine picked
            yield from map(int, predicted)
        else:
            yield from map(request.sampler.choose, predicted)

    def remember(self, request: RequestState, length: int) -> None:
        """Caches the first `length` tokens of a request's row for prompts that begin alike."""
        if self._prefixes is None or length <= request.cached_tokens:
            return
        lease = lease_of(request)
        ids = np.concatenate([request.ids, np.array(request.tokens, np.int64)])[:length]
        with suppress(MemoryError):  # the answer is there, and a cache may miss
            self._prefixes.put(_token_keys(request, ids), lease.block, lease.row, length)

    def _prompt_hidden(self, request: RequestState, start: int, stop: int) -> Array:
        """Embeddings of prompt tokens, float32 (T, C), with features at image tokens."""
        hidden = self._engine.embed(request.ids[start:stop])
        first, last = np.searchsorted(request.image_positions, (start, stop))
        if first < last:
            assert request.features is not None
            hidden[request.image_positions[first:last] - start] = request.features[first:last]
        return hidden

    def _forward(self, requests: Sequence[RequestState], hidden: Array, positions: Array) -> Array:
        """Appends hidden states (N, T, C) to adjacent rows.

        Returns:
            Logits, float32 (N, L, V); or token ids, int64 (N, L), where the engine picks tokens
            and every request is greedy.
        """
        call = self._engine.forward
        if self._engine.picks_tokens and all(map(_is_greedy, requests)):
            call = self._engine.pick
        leases = [lease_of(request) for request in requests]
        past = np.array([lease.length for lease in leases], np.int32)
        rows = slice(leases[0].row, leases[0].row + len(requests))
        return call(hidden, past, leases[0].block, rows, positions)


def _is_greedy(request: RequestState) -> bool:
    return request.sampler.greedy and request.max_new_tokens > 0


def _logprob(logits: Array, token: int) -> float:
    """Natural logarithm of a token's probability under logits (V,)."""
    shifted = logits.astype(np.float64) - float(logits.max())
    return float(shifted[token] - np.log(np.exp(shifted).sum()))


def _token_keys(request: RequestState, ids: Array) -> Array:
    """Cache key of each token, uint64 (T, 2); the tokens of one tile need not be adjacent."""
    keys = sequence_keys(ids, [], [])
    if request.tile_count:
        count = len(request.image_positions) // request.tile_count
        spans = [(index * count, (index + 1) * count) for index in range(request.tile_count)]
        images = np.zeros(len(request.image_positions), np.int64)
        keys[request.image_positions] = sequence_keys(images, spans, request.tile_keys)
    return keys
