"""One request from preprocessing to its end: its inputs, its progress and its status.

Knows nothing of engines and memory. One thread at a time advances a request; any thread may read
`pieces` and `ended`, which only grow, and may cancel.

Legend: T prompt tokens, A tokens to score, n tiles, t image tokens per tile, S tile side in pixels,
C decoder width, V vocabulary.
"""

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

import numpy as np

from perception_rt.runtime.cache.kv_pool import Lease
from perception_rt.runtime.generation.detokenizer import TextStream
from perception_rt.runtime.generation.prompt_lookup import PromptLookup
from perception_rt.runtime.generation.sampling import Sampler
from perception_rt.runtime.request import (
    FinishReason,
    GenerationProgress,
    OnProgress,
    Phase,
    Result,
    Timings,
)

Array = np.ndarray[Any, Any]


class Status(StrEnum):
    """Stage of a request."""

    QUEUED = "queued"  # waits for a cache row
    ENCODING = "encoding"  # has a row; tiles become features
    PREFILL = "prefill"  # the prompt runs through the decoder
    DECODE = "decode"  # has its first token
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"  # by its caller or its deadline


_ENDS = frozenset({Status.DONE, Status.FAILED, Status.CANCELLED})
_BREAKS = frozenset({Status.FAILED, Status.CANCELLED})
TRANSITIONS: Mapping[Status, frozenset[Status]] = {
    Status.QUEUED: frozenset({Status.ENCODING}) | _BREAKS,
    Status.ENCODING: frozenset({Status.PREFILL}) | _BREAKS,
    Status.PREFILL: frozenset({Status.DECODE, Status.DONE}) | _BREAKS,
    Status.DECODE: frozenset({Status.DONE}) | _BREAKS,
    **{status: frozenset() for status in _ENDS},
}


@dataclass(slots=True, kw_only=True, eq=False)
class RequestState:
    """Inputs and progress of one request.

    Attributes:
        ids: int64 (T,), tokens to prefill, with the image token id at feature positions.
        image_positions: int64 (n t,), indices of image tokens in `ids`.
        tiles: uint8 (n, S, S, 3), or normalised float32 (n, 3, S, S); None once encoded.
        tile_keys: cache key of each tile; empty without caches.
        max_new_tokens: most tokens of the answer; 0 to prefill only.
        sampler: chooses tokens.
        end_ids: tokens that end the answer.
        targets: int64 (A,), tokens to score at the last A positions of `ids`; None otherwise.
        spell: bytes of token ids; None if the text is not wanted.
        stream: turns bytes into text.
        lookup: drafts tokens; None to decode one token per step.
        deadline: clock time at which the answer ends unfinished.
        on_progress: called after each piece of work.
        called_at: clock time of the call.
        preprocess_s: seconds of preprocessing.
        status: current stage; `enter` changes it.
        tile_count: n.
        lease: cache row.
        features: float32 (n t, C), filled in as tiles are encoded.
        pending_tiles: indices of tiles to encode; None until the prefix cache was searched.
        cached_tokens: prompt tokens restored from the prefix cache.
        logits: float32 (V,), logits after the prompt if `max_new_tokens` is 0.
        logprobs: log-probabilities of the targets so far.
        tokens: answer tokens.
        pieces: answer text so far.
        finish_reason: why it ended, unless it failed.
        error: why it failed.
        cancelled: whether the caller cancelled it.
    """

    ids: Array
    image_positions: Array
    tiles: Array | None
    tile_keys: Sequence[str] = ()
    max_new_tokens: int
    sampler: Sampler
    end_ids: frozenset[int] = frozenset()
    targets: Array | None = None
    spell: Callable[[Sequence[int]], bytes] | None = None
    stream: TextStream = field(default_factory=TextStream)
    lookup: PromptLookup | None = None
    deadline: float | None = None
    on_progress: OnProgress | None = None
    called_at: float
    preprocess_s: float = 0.0

    status: Status = Status.QUEUED
    tile_count: int = field(init=False)
    lease: Lease | None = None
    features: Array | None = None
    pending_tiles: deque[int] | None = None
    cached_tokens: int = 0
    logits: Array | None = None
    logprobs: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    pieces: list[str] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    error: BaseException | None = None
    cancelled: bool = False

    started_at: float | None = None
    ended_at: float = 0.0
    vision_s: float = 0.0
    prefill_s: float = 0.0
    token_times_s: list[float] = field(default_factory=list)
    steps: int = 0

    def __post_init__(self) -> None:
        self.tile_count = 0 if self.tiles is None else len(self.tiles)

    @property
    def total_tokens(self) -> int:
        """Most tokens that its cache row can come to hold."""
        return len(self.ids) + self.max_new_tokens

    @property
    def predict_from(self) -> int:
        """Index of the first token in `ids` whose logits are needed."""
        return len(self.ids) - (1 if self.targets is None else len(self.targets))

    @property
    def ended(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.status in _ENDS

    def enter(self, status: Status) -> None:
        """Moves to the next stage; AssertionError, without a change, if it may not follow."""
        self._check(status)
        self.status = status
        if status not in (Status.QUEUED, Status.ENCODING):
            self.tiles = None
        if status not in (Status.ENCODING, Status.PREFILL):
            self.features = None
        if self.ended:
            # It may refer to the handle, whose finalizer refers to this object.
            self.on_progress = None

    def accept(self, token: int, now: float) -> FinishReason | None:
        """Appends the next token; returns why the answer ends with it, None if it goes on."""
        self.token_times_s.append(now - self.called_at)
        if token in self.end_ids:
            return "stop"
        self.tokens.append(token)
        if self.lookup is not None:
            self.lookup.append(token)
        if self.spell is not None:
            self._emit(self.stream.push(self.spell([token])))
        self.report("decode", len(self.tokens), self.max_new_tokens)
        if self.stream.stopped:
            return "stop"
        return "length" if len(self.tokens) >= self.max_new_tokens else None

    def cancel(self) -> None:
        """Asks for an end before the next step.

        Takes no lock: a finalizer may call it at any point, even while this thread holds one.
        """
        self.cancelled = True

    def finish(self, reason: FinishReason, now: float) -> None:
        """Ends the answer and emits text that was held back."""
        status = Status.CANCELLED if reason in ("cancelled", "deadline") else Status.DONE
        self._check(status)
        self._emit(self.stream.finish())
        self.finish_reason = reason
        self.ended_at = now
        self.enter(status)  # last: another thread that sees the end reads the rest

    def fail(self, error: BaseException, now: float) -> None:
        """Ends with an error for the caller."""
        self._check(Status.FAILED)
        self.error = error
        self.ended_at = now
        self.enter(Status.FAILED)

    def report(self, phase: Phase, done: int, total: int) -> None:
        """Calls `on_progress`."""
        if self.on_progress is not None:
            self.on_progress(GenerationProgress(phase, done, total))

    def result(self) -> Result:
        """Returns the result of a request that ended; raises its error if it failed."""
        assert self.ended
        if self.error is not None:
            raise self.error.with_traceback(None)
        assert self.finish_reason is not None
        started = self.ended_at if self.started_at is None else self.started_at
        return Result(
            text="".join(self.pieces),
            tokens=tuple(self.tokens),
            finish_reason=self.finish_reason,
            timings=Timings(
                preprocess_s=self.preprocess_s,
                queue_s=max(0.0, started - self.called_at - self.preprocess_s),
                vision_s=self.vision_s,
                prefill_s=self.prefill_s,
                token_times_s=tuple(self.token_times_s),
                total_s=self.ended_at - self.called_at,
                prompt_tokens=len(self.ids),
                cached_tokens=self.cached_tokens,
                image_tiles=self.tile_count,
                new_tokens=len(self.tokens),
                steps=self.steps,
            ),
        )

    def _emit(self, text: str) -> None:
        if text:
            self.pieces.append(text)

    def _check(self, status: Status) -> None:
        assert status in TRANSITIONS[self.status], (
            f"a request that is {self.status} cannot be {status}"
        )


def lease_of(request: RequestState) -> Lease:
    """Returns the cache row of a request that has one."""
    assert request.lease is not None
    return request.lease
