"""Which work is next: requests are admitted in order, prepared one by one, decoded together.

A step does one piece of the oldest request that has no token yet, a tile or a part of its prompt,
and one token of all others, so that none of them waits for a long prompt. It knows memory by
`KvPool`, the model by `Decoder`, and nothing of texts and threads: one thread at a time calls it.

Legend: T tokens, N sequences, C channels of the decoder, L logit positions, V vocabulary.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from perception_rt.errors import CapacityError
from perception_rt.package.contract import CHUNK_TOKENS
from perception_rt.runtime.cache.feature_cache import FeatureCache
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.kv_pool import KvPool
from perception_rt.runtime.cache.prefix_cache import PrefixCache, sequence_keys
from perception_rt.runtime.generation.plm_engine import Decoder
from perception_rt.runtime.generation.prompt_lookup import MAX_DRAFTS, agreed
from perception_rt.runtime.generation.request_state import Job, State
from perception_rt.runtime.request import FinishReason

Array = np.ndarray[Any, Any]
Clock = Callable[[], float]


class Scheduler:
    """Jobs from `submit` to their ends. `submit` may be called while another thread is in `step`.

    A job that fails, or whose caller's function does, ends with that error; the others go on.
    """

    def __init__(
        self,
        decoder: Decoder,
        pool: KvPool,
        *,
        max_queued: int,
        features: FeatureCache | None = None,
        prefixes: PrefixCache | None = None,
        chunk_tokens: int = CHUNK_TOKENS,
        clock: Clock = time.monotonic,
    ) -> None:
        """A scheduler without jobs.

        Args:
            decoder: the model.
            pool: rows for its keys and values.
            max_queued: jobs that may wait for a row.
            features: of tiles that were encoded before.
            prefixes: of prompts that were decoded before.
            chunk_tokens: tokens of a prompt that are decoded at once.
            clock: seconds, for deadlines and timings.
        """
        self.clock = clock
        self._decoder = decoder
        self._pool = pool
        self._max_queued = max_queued
        self._features = features
        self._prefixes = prefixes
        self._chunk_tokens = chunk_tokens
        self._queue: deque[Job] = deque()
        self._active: list[Job] = []

    @property
    def jobs(self) -> list[Job]:
        """All that have not ended, the oldest first."""
        return [*self._active, *self._queue]

    def submit(self, job: Job) -> None:
        """Takes a job.

        Raises:
            CapacityError: too many are waiting, or it is larger than the memory for all of them.
        """
        cost = self._pool.cost(*_extent(job))
        if cost > self._pool.max_bytes:
            raise CapacityError(
                f"a request of {job.total_tokens} tokens takes {cost} bytes of keys and values; "
                f"kv_bytes is {self._pool.max_bytes}"
            )
        self.check_place()
        self._queue.append(job)

    @property
    def full(self) -> bool:
        """Whether as many jobs wait as may."""
        return len(self._queue) >= self._max_queued

    def check_place(self) -> None:
        """CapacityError if no other job may wait."""
        if self.full:
            raise CapacityError(f"{self._max_queued} requests wait already, which is the limit")

    def step(self) -> None:
        """One piece of work for every job that has memory."""
        self.drop_ended()
        self._admit()
        self._prepare()
        self._decode()

    def drop_ended(self) -> None:
        """Ends the jobs that were cancelled or are out of time, and frees what they had."""
        now = self.clock()
        for job in self.jobs:
            late = job.deadline is not None and now >= job.deadline
            if job.cancelled or late:
                with self._guard(job):
                    self._finish(job, "cancelled" if job.cancelled else "deadline")

    def close(self, error: BaseException) -> None:
        """Ends every job with an error, but those that `drop_ended` would."""
        self.drop_ended()
        for job in self.jobs:
            with self._guard(job):
                self._fail(job, error)

    def invariants(self) -> None:
        """AssertionError if a job and its row do not belong together."""
        self._pool.invariants()
        assert self._pool.used_rows == len(self._active)
        for job in self._active:
            assert not job.ended and job.lease is not None and not job.lease.closed
            assert job.state is not State.QUEUED
            assert job.lease.length <= job.total_tokens
            if job.state is State.DECODE:
                assert job.lease.length == len(job.ids) + len(job.tokens) - 1
        assert all(job.lease is None and job.state is State.QUEUED for job in [*self._queue])

    def _admit(self) -> None:
        """Gives rows to those who wait, in order: nobody is overtaken by a smaller request."""
        while self._queue:
            job = self._queue[0]
            with self._guard(job):
                job.lease = self._pool.admit(*_extent(job))
                if job.lease is None:
                    return
                job.enter(State.ENCODING)
                self._active.append(job)
                self._queue.popleft()

    def _prepare(self) -> None:
        """One tile, or one part of the prompt, of the oldest job that has no token yet."""
        job = next((job for job in self._active if job.state is not State.DECODE), None)
        if job is None:
            return
        with self._guard(job):
            if job.state is State.ENCODING and self._encode(job):
                return
            self._prefill(job)

    def _encode(self, job: Job) -> bool:
        """Encodes a tile, if one is missing; whether there was one."""
        start = self.clock()
        if job.pending_tiles is None:
            job.started_at = start
            job.pending_tiles = self._restore(job)
            start = self.clock()
            job.prefill_s += start - job.started_at
        pending, encoded = job.pending_tiles, False
        while pending and not encoded:
            encoded = self._encode_tiles(job, pending)
            job.report("vision", job.tile_count - len(pending), job.tile_count)
        job.vision_s += self.clock() - start
        if not pending:
            job.enter(State.PREFILL)
        return encoded

    def _restore(self, job: Job) -> deque[int]:
        """Copies what the cache knows of the prompt; the tiles that the rest of it needs."""
        assert job.lease is not None
        if self._prefixes is not None:
            length, entry = self._prefixes.longest(_token_keys(job, job.ids))
            # The last token is decoded in any case: the answer's first comes from it.
            length = min(length, len(job.ids) - 1)
            if entry is not None and length > 0:
                job.lease.advance(0, written=length)
                self._prefixes.restore(entry, length, job.lease.block, job.lease.row)
                job.lease.advance(length)
                job.cached_tokens = length
        config = self._decoder.config
        covered = int(np.searchsorted(job.image_positions, job.lease.length))
        if covered < len(job.image_positions):
            job.features = np.empty((len(job.image_positions), config.decoder.dim), np.float32)
        return deque(range(covered // config.tokens_per_tile, job.tile_count))

    def _encode_tiles(self, job: Job, pending: deque[int]) -> bool:
        """Fills in the features of the next tiles, at most a batch that the cache does not have.

        Returns:
            Whether the engine encoded any.
        """
        assert job.tiles is not None and job.features is not None
        features = job.features.reshape(job.tile_count, -1, job.features.shape[-1])
        new: list[int] = []
        while pending and len(new) < self._decoder.tile_batch:
            index = pending.popleft()
            cached = None if self._features is None else self._features.get(job.tile_keys[index])
            if cached is None:
                new.append(index)
            else:
                features[index] = cached[0]
        if not new:
            return False
        tiles = job.tiles[new]
        is_float = tiles.dtype == np.float32
        encode = self._decoder.encode_pixels if is_float else self._decoder.encode_tiles
        features[new] = encode(tiles)
        if self._features is not None:
            for index in new:
                self._features.put(job.tile_keys[index], features[index : index + 1])
        return True

    def _prefill(self, job: Job) -> None:
        """Decodes the next part of the prompt, and after the last one chooses a token."""
        assert job.lease is not None
        clock_start, start = self.clock(), job.lease.length
        # Parts end at the same places whatever was cached, so that most are the same parts.
        stop = min(len(job.ids), (start // self._chunk_tokens + 1) * self._chunk_tokens)
        hidden = self._hidden(job, start, stop)
        job.lease.advance(start, written=stop)  # also if it fails half-way
        (predicted,) = self._forward([job], hidden[None], np.array([[stop - start - 1]]))
        job.lease.advance(stop)
        job.prefill_s += self.clock() - clock_start
        job.report("prefill", stop, len(job.ids))
        if stop < len(job.ids):
            return
        if job.max_new_tokens == 0:
            job.logits = predicted[0]
            self._remember(job, stop)
            self._finish(job, "length")
            return
        job.enter(State.DECODE)
        self._accept(job, *_choose(job, predicted))
        if not job.ended:
            self._remember(job, stop)  # after the first token, which is waited for

    def _hidden(self, job: Job, start: int, stop: int) -> Array:
        """Embeddings of a part of the prompt, float32 (T, C), with features where tiles are."""
        hidden = self._decoder.embed(job.ids[start:stop])
        first, last = np.searchsorted(job.image_positions, (start, stop))
        if first < last:
            assert job.features is not None
            hidden[job.image_positions[first:last] - start] = job.features[first:last]
        return hidden

    def _decode(self) -> None:
        """One token for each job that has one already, or several that were guessed."""
        blocks: dict[CacheBlock, list[Job]] = {}
        for job in [job for job in self._active if job.state is State.DECODE]:
            with self._guard(job):
                assert job.lease is not None
                drafts = self._drafts(job)
                self._pool.make_room(job.lease, job.lease.length + 1 + len(drafts))
                if drafts:
                    self._decode_drafts(job, drafts)
                else:
                    blocks.setdefault(job.lease.block, []).append(job)
        for jobs in blocks.values():
            for run in _adjacent(jobs):
                self._decode_run(run)

    def _decode_run(self, jobs: Sequence[Job]) -> None:
        """One token for each job of adjacent rows; if that fails, for each on its own."""
        tokens = np.array([job.tokens[-1] for job in jobs])
        for job in jobs:
            assert job.lease is not None
            job.lease.advance(job.lease.length, written=job.lease.length + 1)
        try:
            hidden = self._decoder.embed(tokens)[:, None]
            predicted = self._forward(jobs, hidden, np.zeros((len(jobs), 1), np.int64))
        except Exception as error:
            if len(jobs) == 1:
                self._fail(jobs[0], error)
            else:
                for job in jobs:
                    self._decode_run([job])
            return
        for job, row in zip(jobs, predicted, strict=True):
            with self._guard(job):
                assert job.lease is not None
                job.steps += 1
                job.lease.advance(job.lease.length + 1)
                self._accept(job, *_choose(job, row))

    def _drafts(self, job: Job) -> list[int]:
        if job.lookup is None:
            return []
        room = job.max_new_tokens - len(job.tokens) - 1
        return job.lookup.draft(min(MAX_DRAFTS, room)) if room > 0 else []

    def _decode_drafts(self, job: Job, drafts: Sequence[int]) -> None:
        """As many tokens as were guessed right, and one more."""
        assert job.lease is not None
        tokens = np.array([job.tokens[-1], *drafts])
        start, count = job.lease.length, len(tokens)
        hidden = self._decoder.embed(tokens)
        job.lease.advance(start, written=start + count)
        (predicted,) = self._forward([job], hidden[None], np.arange(count)[None])
        job.steps += 1
        for token in agreed(drafts, _choose(job, predicted)):
            job.lease.advance(job.lease.length + 1)
            self._accept(job, token)
            if job.ended:
                return

    def _forward(self, jobs: Sequence[Job], hidden: Array, positions: Array) -> Array:
        """What follows tokens (N, T, C) that are appended to adjacent rows, for `_choose`.

        Returns:
            Logits, float32 (N, L, V), or the likeliest tokens, int64 (N, L), where the engine finds
            them and nobody needs more.
        """
        greedy = all(job.sampler.greedy and job.max_new_tokens > 0 for job in jobs)
        call = self._decoder.forward
        if greedy and self._decoder.picks_tokens:
            call = self._decoder.pick
        leases = [job.lease for job in jobs if job.lease is not None]
        past = np.array([lease.length for lease in leases], np.int32)
        rows = slice(leases[0].row, leases[0].row + len(jobs))
        return call(hidden, past, leases[0].block, rows, positions)

    def _accept(self, job: Job, token: int) -> None:
        reason = job.accept(token, self.clock())
        if reason is not None:
            assert job.lease is not None
            self._remember(job, job.lease.length)
            self._finish(job, reason)

    def _remember(self, job: Job, length: int) -> None:
        """Keeps a job's row for later prompts that begin like it."""
        if self._prefixes is None or job.lease is None or length == job.cached_tokens:
            return
        ids = np.concatenate([job.ids, np.array(job.tokens, np.int64)])[:length]
        with suppress(MemoryError):  # it is only a cache, and the answer is there
            self._prefixes.put(_token_keys(job, ids), job.lease.block, job.lease.row, length)

    def _finish(self, job: Job, reason: FinishReason) -> None:
        self._release(job)
        job.finish(reason, self.clock())

    def _fail(self, job: Job, error: BaseException) -> None:
        self._release(job)
        job.fail(error, self.clock())

    def _release(self, job: Job) -> None:
        """Frees what a job had. First: who sees in another thread that it ended may count rows."""
        lease, job.lease = job.lease, None
        if lease is not None:
            self._pool.release(lease)
        for jobs in (self._active, self._queue):
            if job in jobs:
                jobs.remove(job)

    @contextmanager
    def _guard(self, job: Job) -> Iterator[None]:
        """What goes wrong in here is the job's own."""
        try:
            yield
        except BaseException as error:
            if job.ended:  # a mistake of ours, and of no request
                raise
            self._fail(job, error)


def _choose(job: Job, predicted: Array) -> list[int]:
    """The tokens at L positions, of what `_forward` says of one job."""
    if predicted.ndim == 1:
        return [int(token) for token in predicted]
    return [job.sampler.choose(logits) for logits in predicted]


def _extent(job: Job) -> tuple[int, int]:
    """Tokens of a job at first, with the first of the answer, and at most."""
    return min(len(job.ids) + 1, job.total_tokens), job.total_tokens


def _token_keys(job: Job, ids: Array) -> Array:
    """What each token is, uint64 (T, 2); the tokens of one tile need not be adjacent."""
    keys = sequence_keys(ids, [], [])
    if job.tile_count:
        count = len(job.image_positions) // job.tile_count
        spans = [(index * count, (index + 1) * count) for index in range(job.tile_count)]
        images = np.zeros(len(job.image_positions), np.int64)
        keys[job.image_positions] = sequence_keys(images, spans, job.tile_keys)
    return keys


def _adjacent(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs of one block in runs of rows that follow each other."""
    run: list[Job] = []
    for job in sorted(jobs, key=_row):
        if run and _row(job) != _row(run[-1]) + 1:
            yield run
            run = []
        run.append(job)
    yield run


def _row(job: Job) -> int:
    assert job.lease is not None
    return job.lease.row
