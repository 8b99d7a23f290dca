"""Decides which request runs next: admits in arrival order, prefills one, decodes all in a batch.

A step does one piece of work, a tile or a prompt chunk, for the oldest request without a token, and
decodes one token for every other request. So a long prompt delays the others by one chunk at most.
The scheduler gives out memory (`KvPool`) and tells a `ModelRunner` what to execute. It touches no
array and knows nothing of text and threads: one thread at a time calls it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from perception_rt.errors import CapacityError, QueueFullError
from perception_rt.package.contract import CHUNK_TOKENS
from perception_rt.runtime.cache.kv_pool import KvPool
from perception_rt.runtime.generation.model_runner import ModelRunner
from perception_rt.runtime.generation.request_state import RequestState, Status, lease_of
from perception_rt.runtime.request import FinishReason

Clock = Callable[[], float]


class Scheduler:
    """Runs requests from `submit` to their end.

    `submit` may be called while another thread is in `step`. A request that fails, or whose
    `on_progress` raises, ends with that error; the others go on.
    """

    def __init__(
        self,
        runner: ModelRunner,
        pool: KvPool,
        *,
        max_queued: int,
        chunk_tokens: int = CHUNK_TOKENS,
        clock: Clock = time.monotonic,
    ) -> None:
        """Creates a scheduler without requests.

        Args:
            runner: executes the model.
            pool: rows for keys and values.
            max_queued: most requests that wait for a row.
            chunk_tokens: prompt tokens per prefill call.
            clock: returns seconds, for deadlines and timings.
        """
        self.clock = clock
        self._runner = runner
        self._pool = pool
        self._max_queued = max_queued
        self._chunk_tokens = chunk_tokens
        self._queue: deque[RequestState] = deque()
        self._active: list[RequestState] = []

    @property
    def requests(self) -> list[RequestState]:
        """All requests that have not ended, oldest first."""
        return [*self._active, *self._queue]

    @property
    def queued(self) -> int:
        """Number of requests that wait for a row."""
        return len(self._queue)

    @property
    def full(self) -> bool:
        """Whether the queue is full."""
        return self.queued >= self._max_queued

    def submit(self, request: RequestState) -> None:
        """Queues a request.

        Raises:
            CapacityError: the queue is full, or the request is larger than the whole pool.
        """
        cost = self._pool.cost(*_extent(request))
        if cost > self._pool.max_bytes:
            raise CapacityError(
                f"a request of {request.total_tokens} tokens takes {cost} bytes of keys and "
                f"values; kv_bytes is {self._pool.max_bytes}"
            )
        self.check_queue()
        self._queue.append(request)

    def check_queue(self) -> None:
        """CapacityError if the queue is full."""
        if self.full:
            raise QueueFullError(f"{self._max_queued} requests wait already, which is the limit")

    def step(self) -> None:
        """Does one piece of work for every request that has memory."""
        self.drop_ended()
        self._admit()
        self._prepare()
        self._decode()

    def drop_ended(self) -> None:
        """Ends requests that were cancelled or are past their deadline, and frees their rows."""
        now = self.clock()
        for request in self.requests:
            late = request.deadline is not None and now >= request.deadline
            if request.cancelled or late:
                with self._guard(request):
                    self._finish(request, "cancelled" if request.cancelled else "deadline")

    def close(self, error: BaseException) -> None:
        """Ends every request with an error, except those that `drop_ended` ends."""
        self.drop_ended()
        for request in self.requests:
            with self._guard(request):
                self._fail(request, error)

    def invariants(self) -> None:
        """AssertionError if a request and its row do not match."""
        self._pool.invariants()
        assert self._pool.used_rows == len(self._active)
        for request in self._active:
            lease = lease_of(request)
            assert not request.ended and not lease.closed
            assert request.status is not Status.QUEUED
            assert lease.length <= request.total_tokens
            if request.status is Status.DECODE:
                assert lease.length == len(request.ids) + len(request.tokens) - 1
        for request in [*self._queue]:
            assert request.lease is None and request.status is Status.QUEUED

    def _admit(self) -> None:
        """Gives rows to queued requests, in order: a small request never overtakes a large one."""
        while self._queue:
            request = self._queue[0]
            with self._guard(request):
                request.lease = self._pool.admit(*_extent(request))
                if request.lease is None:
                    return
                request.enter(Status.ENCODING)
                self._active.append(request)
                self._queue.popleft()

    def _prepare(self) -> None:
        """Encodes a tile or prefills a chunk of the oldest request without a token."""
        waiting = (request for request in self._active if request.status is not Status.DECODE)
        request = next(waiting, None)
        if request is None:
            return
        with self._guard(request):
            if request.status is Status.ENCODING and self._encode(request):
                return
            self._prefill(request)

    def _encode(self, request: RequestState) -> bool:
        """Encodes the next tiles; returns whether any were left to encode."""
        start = self.clock()
        if request.pending_tiles is None:
            request.started_at = start
            length, request.pending_tiles = self._runner.restore(request)
            lease_of(request).advance(length)
            request.cached_tokens = length
            start = self.clock()
            request.prefill_s += start - request.started_at
        pending, encoded = request.pending_tiles, False
        while pending and not encoded:
            encoded = self._runner.encode_tiles(request)
            request.report("vision", request.tile_count - len(pending), request.tile_count)
        request.vision_s += self.clock() - start
        if not pending:
            request.enter(Status.PREFILL)
        return encoded

    def _prefill(self, request: RequestState) -> None:
        """Runs the next prompt chunk; after the last one, chooses the first token."""
        began = self.clock()
        lease, length = lease_of(request), len(request.ids)
        stop = self._chunk_end(request, lease.length)
        predicted = self._runner.prefill(request, stop)
        lease.advance(stop)
        request.prefill_s += self.clock() - began
        request.report("prefill", stop, length)
        if stop < length:
            return
        if request.max_new_tokens == 0:
            # Only the prompt: other answers to the same prompt share it.
            self._runner.remember(request, request.predict_from + 1)
            self._finish(request, "length")
            return
        request.enter(Status.DECODE)
        (token,) = self._runner.choose(request, predicted)
        self._accept(request, token)
        if not request.ended:
            self._runner.remember(request, stop)  # after the first token, which someone waits for

    def _chunk_end(self, request: RequestState, start: int) -> int:
        """Index after the last token of the chunk at `start`.

        Chunks end at multiples of their size whatever was cached, so that equal prompts run in
        equal chunks. A scored answer is split further, by how many positions an engine predicts.
        """
        stop = min(len(request.ids), (start // self._chunk_tokens + 1) * self._chunk_tokens)
        if request.targets is None:
            return stop
        return min(stop, max(start, request.predict_from) + self._runner.max_positions)

    def _decode(self) -> None:
        """Decodes one token for each request that has one, or verifies its drafts."""
        blocks: dict[object, list[RequestState]] = {}
        for request in [r for r in self._active if r.status is Status.DECODE]:
            with self._guard(request):
                lease = lease_of(request)
                drafts = self._runner.draft(request)
                self._pool.make_room(lease, lease.length + 1 + len(drafts))
                if drafts:
                    self._verify(request, drafts)
                else:
                    blocks.setdefault(lease.block, []).append(request)
        for requests in blocks.values():
            for run in _adjacent(requests):
                self._decode_run(run)

    def _decode_run(self, requests: Sequence[RequestState]) -> None:
        """Decodes requests of adjacent rows together; one by one if that fails."""
        try:
            predicted = self._runner.decode(requests)
        except Exception as error:
            if len(requests) == 1:
                self._fail(requests[0], error)
            else:
                for request in requests:
                    self._decode_run([request])
            return
        for request, row in zip(requests, predicted, strict=True):
            with self._guard(request):
                request.steps += 1
                (token,) = self._runner.choose(request, row)
                self._append(request, token)

    def _verify(self, request: RequestState, drafts: Sequence[int]) -> None:
        """Accepts the drafts that are right, and one more token."""
        tokens = self._runner.verify(request, drafts)
        request.steps += 1
        for token in tokens:
            self._append(request, token)
            if request.ended:
                return

    def _append(self, request: RequestState, token: int) -> None:
        """Accepts a token that was predicted from the one before, which is in the cache now."""
        lease = lease_of(request)
        lease.advance(lease.length + 1)
        self._accept(request, token)

    def _accept(self, request: RequestState, token: int) -> None:
        reason = request.accept(token, self.clock())
        if reason is not None:
            self._runner.remember(request, lease_of(request).length)
            self._finish(request, reason)

    def _finish(self, request: RequestState, reason: FinishReason) -> None:
        self._release(request)
        request.finish(reason, self.clock())

    def _fail(self, request: RequestState, error: BaseException) -> None:
        self._release(request)
        request.fail(error, self.clock())

    def _release(self, request: RequestState) -> None:
        """Frees the row, before the end: a thread that sees the end may count rows."""
        lease, request.lease = request.lease, None
        if lease is not None:
            self._pool.release(lease)
        for requests in (self._active, self._queue):
            if request in requests:
                requests.remove(request)

    @contextmanager
    def _guard(self, request: RequestState) -> Iterator[None]:
        """Turns an exception into the failure of one request."""
        try:
            yield
        except BaseException as error:
            if request.ended:  # a mistake of ours that no request caused
                raise
            self._fail(request, error)


def _extent(request: RequestState) -> tuple[int, int]:
    """Tokens of a request up to the first of its answer, and at most."""
    return min(len(request.ids) + 1, request.total_tokens), request.total_tokens


def _adjacent(requests: Sequence[RequestState]) -> Iterator[list[RequestState]]:
    """Splits requests of one block into runs of adjacent rows, which one engine call takes."""
    run: list[RequestState] = []
    for request in sorted(requests, key=_row):
        if run and _row(request) != _row(run[-1]) + 1:
            yield run
            run = []
        run.append(request)
    yield run


def _row(request: RequestState) -> int:
    return lease_of(request).row
