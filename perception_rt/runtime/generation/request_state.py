"""A request on its way: what was asked, how far it is, and which steps may follow which.

Knows nothing of engines and memory. One thread at a time moves a job on; any thread may look at
`pieces` and `ended`, which only grow, and may set `cancelled`.

Legend: T tokens of the prompt, n tiles, t image tokens per tile, S tile side in pixels,
C channels of the decoder, V vocabulary.
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


class State(StrEnum):
    """Where a job is."""

    QUEUED = "queued"  # waits for a row of the cache
    ENCODING = "encoding"  # has a row; tiles become features
    PREFILL = "prefill"  # the prompt goes through the decoder
    DECODE = "decode"  # has its first token
    DONE = "done"
    FAILED = "failed"
    CANCELLED = "cancelled"  # by its caller or by its deadline


_ENDS = frozenset({State.DONE, State.FAILED, State.CANCELLED})
_BREAKS = frozenset({State.FAILED, State.CANCELLED})
TRANSITIONS: Mapping[State, frozenset[State]] = {
    State.QUEUED: frozenset({State.ENCODING}) | _BREAKS,
    State.ENCODING: frozenset({State.PREFILL}) | _BREAKS,
    State.PREFILL: frozenset({State.DECODE, State.DONE}) | _BREAKS,
    State.DECODE: frozenset({State.DONE}) | _BREAKS,
    **{state: frozenset() for state in _ENDS},
}


@dataclass(slots=True, kw_only=True, eq=False)
class Job:
    """One request.

    Attributes:
        ids: int64 (T,), the prompt, with the image token's id where features go.
        image_positions: int64 (n t,), where those are.
        tiles: uint8 (n, S, S, 3), or float32 (n, 3, S, S) if they are normalised already; None
            once they are no longer needed.
        tile_keys: what the caches know each tile by; for a scheduler without caches, none.
        max_new_tokens: 0 for the logits alone.
        sampler: chooses the tokens.
        end_ids: tokens that end the answer.
        spell: what tokens spell; None if nobody reads the text.
        stream: bytes to text.
        lookup: guesses tokens; None for a job that takes them one by one.
        deadline: time at which the answer ends where it is.
        on_progress: called as the job moves on.
        called_at: when the request was made.
        preprocess_s: how long it took to make this job of it.
        state: where it is; `enter` changes it.
        tile_count: n.
        lease: its row of the cache.
        features: float32 (n t, C), as far as tiles are encoded.
        pending_tiles: which are not; None before it is known which ones will be needed.
        cached_tokens: of the prompt, those that the cache had.
        logits: float32 (V,), after the prompt, if `max_new_tokens` is 0.
        tokens: of the answer.
        pieces: its text so far.
        finish_reason: why it ended, unless it failed.
        error: why it failed.
        cancelled: whether its caller has lost interest.
    """

    ids: Array
    image_positions: Array
    tiles: Array | None
    tile_keys: Sequence[str] = ()
    max_new_tokens: int
    sampler: Sampler
    end_ids: frozenset[int] = frozenset()
    spell: Callable[[Sequence[int]], bytes] | None = None
    stream: TextStream = field(default_factory=TextStream)
    lookup: PromptLookup | None = None
    deadline: float | None = None
    on_progress: OnProgress | None = None
    called_at: float
    preprocess_s: float = 0.0

    state: State = State.QUEUED
    tile_count: int = field(init=False)
    lease: Lease | None = None
    features: Array | None = None
    pending_tiles: deque[int] | None = None
    cached_tokens: int = 0
    logits: Array | None = None
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
        """The most tokens that its row will ever have to hold."""
        return len(self.ids) + self.max_new_tokens

    @property
    def ended(self) -> bool:
        """Whether nothing more will come."""
        return self.state in _ENDS

    def enter(self, state: State) -> None:
        """Moves on; AssertionError, and nothing changed, where that cannot follow."""
        self._check(state)
        self.state = state
        if state not in (State.QUEUED, State.ENCODING):
            self.tiles = None
        if state not in (State.ENCODING, State.PREFILL):
            self.features = None
        if self.ended:
            self.on_progress = None  # it may refer to the handle, and through it to this

    def accept(self, token: int, now: float) -> FinishReason | None:
        """Takes the next token; why the answer ends with it, None if it goes on."""
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

    def finish(self, reason: FinishReason, now: float) -> None:
        """Ends the answer; what a stop string or a character was awaited for is text now."""
        state = State.CANCELLED if reason in ("cancelled", "deadline") else State.DONE
        self._check(state)
        self._emit(self.stream.finish())
        self.finish_reason = reason
        self.ended_at = now
        self.enter(state)  # last: who sees it in another thread may read the rest

    def fail(self, error: BaseException, now: float) -> None:
        """Ends the job with an error for its caller."""
        self._check(State.FAILED)
        self.error = error
        self.ended_at = now
        self.enter(State.FAILED)

    def report(self, phase: Phase, done: int, total: int) -> None:
        """Tells the caller's function how far the job is."""
        if self.on_progress is not None:
            self.on_progress(GenerationProgress(phase, done, total))

    def result(self) -> Result:
        """What has come of a job that ended; raises its error if it failed."""
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

    def _check(self, state: State) -> None:
        assert state in TRANSITIONS[self.state], f"a job that is {self.state} cannot be {state}"
