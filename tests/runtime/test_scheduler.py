"""Requests that run together: the same tokens as alone, in order, and nothing left behind."""

import numpy as np
import pytest
from plm_requests import (
    PER_TILE,
    FakeClock,
    PoisonedBlock,
    alone,
    make_pool,
    make_request,
    make_scheduler,
    open_engine,
    run,
)

from perception_rt.errors import BackendError, CapacityError
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.prefix_cache import PrefixCache
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.request_state import RequestState, Status
from perception_rt.runtime.generation.scheduler import Scheduler


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    with open_engine(tmp_path_factory.mktemp("plm")) as engine:
        yield engine


class Watched:
    """An engine that counts its calls and fails on demand."""

    def __init__(self, engine: PlmEngine) -> None:
        self._engine = engine
        self.encoded = 0
        self.forwards: list[tuple[int, int]] = []  # N, T
        self.bad_call: int | None = None
        self.bad_token: int | None = None

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def encode_tiles(self, tiles: np.ndarray) -> np.ndarray:
        self.encoded += len(tiles)
        return self._engine.encode_tiles(tiles)

    def forward(self, hidden: np.ndarray, past, cache: CacheBlock, rows: slice, positions):
        self.forwards.append(hidden.shape[:2])
        # The reference's embedding has the id in the first channel.
        if len(self.forwards) == self.bad_call or (hidden[:, -1, 0] == self.bad_token).any():
            raise BackendError("made to fail")
        return self._engine.forward(hidden, past, cache, rows, positions)


def random_case(rng: np.random.Generator) -> dict:
    return {
        "seed": int(rng.integers(1000)),
        "prompt": int(rng.integers(1, 80)),
        "tiles": int(rng.integers(3)),
        "new": int(rng.integers(1, 40)),
        "lookup": bool(rng.integers(2)),
        **({} if rng.integers(2) else {"temperature": 1.0, "top_k": 50, "lookup": False}),
    }


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("block", [CacheBlock, PoisonedBlock])
def test_a_request_gets_the_tokens_that_it_gets_alone(
    engine: PlmEngine, block: type[CacheBlock], cached: bool
) -> None:
    """GEN-01, -02, -03 and -06 in small: any company, arrival and memory, poisoned or cached."""
    rng = np.random.default_rng(7)
    for _ in range(15):
        scheduler = make_scheduler(
            engine, slots=int(rng.integers(600, 2500)), block=block, cached=cached
        )
        cases = [random_case(rng) for _ in range(rng.integers(2, 9))]
        requests = [make_request(**case) for case in cases]
        for request in requests:
            scheduler.submit(request)
            for _ in range(rng.integers(6)):
                scheduler.step()
                scheduler.invariants()
        run(scheduler)
        for case, request in zip(cases, requests, strict=True):
            assert request.result().tokens == alone(engine, **case)


def test_a_prompt_in_parts_is_the_prompt_at_once(engine: PlmEngine) -> None:
    """PAR-05."""
    tokens = set()
    for chunk in (1, 3, 16, 64, 1000):
        request = make_request(3, prompt=90, tiles=2)
        run(make_scheduler(engine, chunk_tokens=chunk), [request])
        tokens.add(request.result().tokens)
    assert len(tokens) == 1


def test_a_growing_request_moves_and_keeps_its_tokens(engine: PlmEngine) -> None:
    watched = Watched(engine)
    requests = [
        make_request(seed, prompt=20 + seed, new=60, end_ids=frozenset()) for seed in range(4)
    ]
    run(make_scheduler(watched, block=PoisonedBlock), requests)
    for seed, request in enumerate(requests):
        expected = alone(engine, seed, prompt=20 + seed, new=60, end_ids=frozenset())
        assert request.result().tokens == expected and len(expected) == 60
    assert (4, 1) in watched.forwards  # decoded together after the moves


def test_decoding_goes_on_while_a_long_prompt_is_prepared(engine: PlmEngine) -> None:
    scheduler = make_scheduler(engine)
    short = make_request(0, new=100, end_ids=frozenset())
    scheduler.submit(short)
    scheduler.step()
    long = make_request(1, prompt=200, tiles=3)
    scheduler.submit(long)
    while long.status in (Status.QUEUED, Status.ENCODING, Status.PREFILL):
        count = len(short.tokens)
        scheduler.step()
        assert len(short.tokens) == count + 1
    assert len(short.tokens) >= 3 + 200 // 16


def test_rows_beside_each_other_are_one_call(engine: PlmEngine) -> None:
    watched = Watched(engine)
    scheduler = make_scheduler(watched)
    requests = [make_request(seed, new=20, end_ids=frozenset()) for seed in range(4)]
    for request in requests:
        scheduler.submit(request)
    for _ in range(4):
        scheduler.step()
    watched.forwards.clear()
    scheduler.step()
    assert watched.forwards == [(4, 1)]
    requests[1].cancelled = True
    scheduler.step()
    assert sorted(watched.forwards[1:]) == [(1, 1), (2, 1)]


def test_the_first_token_may_end_an_answer(engine: PlmEngine) -> None:
    """GEN-05, U4."""
    (first,) = alone(engine, new=1, end_ids=frozenset())
    request = make_request(end_ids=frozenset({first}))
    run(make_scheduler(engine), [request])
    result = request.result()
    assert (result.tokens, result.finish_reason, result.timings.steps) == ((), "stop", 0)
    assert len(result.timings.token_times_s) == 1


def test_a_context_can_be_filled(engine: PlmEngine) -> None:
    """GEN-05: prompt and answer have exactly the tokens of the longest row."""
    request = make_request(prompt=engine.max_length - 5, new=5, end_ids=frozenset())
    run(make_scheduler(engine, slots=engine.max_length, block=PoisonedBlock), [request])
    assert len(request.result().tokens) == 5 and request.result().finish_reason == "length"


def test_logits_alone(engine: PlmEngine) -> None:
    request = make_request(new=0)
    run(make_scheduler(engine), [request])
    assert request.logits.shape == (engine.vocab_size,) and request.result().tokens == ()
    # 319 is the image token, which no sampler takes.
    assert int(np.argmax(request.logits[:319])) == alone(engine, new=1, end_ids=frozenset())[0]


class Repeating(Watched):
    """An engine whose next token depends on the last one, and sometimes on its position."""

    def forward(self, hidden: np.ndarray, past, cache: CacheBlock, rows: slice, positions):
        logits = super().forward(hidden, past, cache, rows, positions).copy()
        token = hidden[0, :, 0].astype(int)[positions[0]]
        place = past[0] + positions[0]
        following = 100 + (token * 3 + (place % 11 == 0)) % 17
        logits[0, np.arange(len(token)), following] = 2
        return logits


@pytest.mark.parametrize("new", [1, 2, 9, 10, 70])
def test_drafting_changes_no_token_and_saves_steps(engine: PlmEngine, new: int) -> None:
    results = []
    for lookup in (False, True):
        watched = Repeating(engine)
        request = make_request(prompt=[105, 106, 107], new=new, lookup=lookup, end_ids=frozenset())
        run(make_scheduler(watched, block=PoisonedBlock), [request])
        results.append(request.result())
        assert all(n == 1 for n, _ in watched.forwards)
    plain, drafted = results
    assert drafted.tokens == plain.tokens and len(plain.tokens) == new
    assert plain.timings.steps == new - 1
    if new == 70:
        assert drafted.timings.steps < 40
        assert max(length for _, length in watched.forwards[1:]) == 9


def test_wrong_drafts_are_cleared_too(engine: PlmEngine) -> None:
    """The lease records all slots that were written."""
    scheduler = make_scheduler(Repeating(engine))
    request = make_request(prompt=[105, 106, 107] * 12, new=90, lookup=True, end_ids=frozenset())
    scheduler.submit(request)
    wrong = 0
    while not request.ended:
        scheduler.step()
        if request.lease is not None:
            row = request.lease.block.read(request.lease.row, request.lease.block.slots)
            wrong += bool(row[:, :, :, request.lease.length :].any())
            assert not row[:, :, :, request.lease.written :].any()
    assert wrong > 3


def test_drafting_stops_at_an_end_token(engine: PlmEngine) -> None:
    def ended(lookup: bool) -> RequestState:
        request = make_request(prompt=prompt, new=60, lookup=lookup, end_ids=frozenset({104}))
        run(make_scheduler(Repeating(engine), block=PoisonedBlock), [request])
        return request

    prompt = [104]  # the cycle of `Repeating`, nearly twice
    while len(prompt) < 29:
        prompt.append(100 + prompt[-1] * 3 % 17)
    assert ended(True).tokens == ended(False).tokens == [115, 105, 109]
    assert ended(True).finish_reason == "stop" and ended(True).steps == 1


def test_a_second_question_decodes_only_what_is_new(engine: PlmEngine) -> None:
    """Neither the image nor a shared prefix runs again, an earlier answer included."""
    watched = Watched(engine)
    scheduler = make_scheduler(watched, cached=True)
    start = [*range(30, 70), *[319] * PER_TILE, *range(70, 90)]
    side = engine.config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)

    def ask(ids: list[int], key: str = "ab") -> RequestState:
        request = make_request(prompt=ids, tiles=0, end_ids=frozenset())
        request.tiles, request.tile_count, request.tile_keys = pixels, 1, [key]
        watched.encoded = 0
        run(scheduler, [request])
        return request

    first = ask([*start, 5, 6])
    assert (watched.encoded, first.cached_tokens) == (1, 0)
    second = ask([*start, 7, 8, 9])
    assert (watched.encoded, second.cached_tokens) == (0, len(start))
    chat = ask([*start, 5, 6, *first.tokens, 12, 13])
    assert chat.cached_tokens == len(start) + 2 + len(first.tokens) - 1
    again = ask([*start, 5, 6])
    assert again.cached_tokens == len(start) + 1 and again.tokens == first.tokens
    # The image features are cached; its keys and values are not, at this position.
    moved = ask([99, *start])
    assert (watched.encoded, moved.cached_tokens) == (0, 0)
    # With another image, only the text before it is shared.
    other = ask([*start, 5, 6], key="cd")
    assert (watched.encoded, other.cached_tokens) == (1, 40)


def test_parts_of_a_prompt_end_where_they_would_without_a_cache(engine: PlmEngine) -> None:
    watched = Watched(engine)
    scheduler = make_scheduler(watched, cached=True)
    common = list(range(30, 70))
    for end in ([1], [2] * 20):
        watched.forwards.clear()
        run(scheduler, [make_request(prompt=[*common, *end], new=0)])
    assert watched.forwards == [(1, 8), (1, 12)]  # 40 to 48, to 60


def test_the_last_token_of_an_image_needs_its_features(engine: PlmEngine) -> None:
    watched = Watched(engine)
    scheduler = make_scheduler(watched, prefixes=PrefixCache(1 << 20, package_id="sha256:0"))
    requests = [make_request(0, prompt=1, tiles=2) for _ in range(2)]
    for request in requests:  # dropping the last token leaves a prompt that ends with a tile
        request.ids, request.image_positions = request.ids[:-1], request.image_positions
        run(scheduler, [request])
    assert requests[0].ids[-1] == 319 and watched.encoded == 2 + 1
    assert requests[1].cached_tokens == len(requests[1].ids) - 1
    assert requests[1].tokens == requests[0].tokens


def test_requests_that_wait_together_share_what_they_have_in_common(engine: PlmEngine) -> None:
    watched = Watched(engine)
    requests = [make_request(0, prompt=60, tiles=2) for _ in range(3)]
    run(make_scheduler(watched, cached=True), requests)
    assert watched.encoded == 2
    assert [request.cached_tokens for request in requests] == [0, 67, 67]
    assert len({request.result().tokens for request in requests}) == 1


# Requests that end early.


def step_until(scheduler: Scheduler, request: RequestState, status: Status) -> None:
    for _ in range(200):
        if request.status is status:
            return
        scheduler.step()
    raise AssertionError(f"the request never was {status}")


@pytest.mark.parametrize("status", [Status.QUEUED, Status.ENCODING, Status.PREFILL, Status.DECODE])
def test_cancelled_in_any_phase_it_leaves_nothing(engine: PlmEngine, status: Status) -> None:
    """The other request keeps its tokens, and the row is free at the next step."""
    # The first takes 96 slots and the second 128.
    scheduler = make_scheduler(engine, slots=200 if status is Status.QUEUED else 300)
    other = make_request(1, prompt=20, new=30)
    request = make_request(2, prompt=70, tiles=4, new=30, end_ids=frozenset())
    scheduler.submit(other)
    scheduler.submit(request)
    scheduler.step()
    step_until(scheduler, request, status)
    request.cancelled = True
    count = len(request.tokens)
    scheduler.drop_ended()
    scheduler.invariants()
    assert (
        request.status is Status.CANCELLED
        and request.lease is None
        and request not in scheduler.requests
    )
    result = request.result()
    assert result.finish_reason == "cancelled" and len(result.tokens) == count
    request.cancelled = True
    scheduler.drop_ended()
    run(scheduler)
    assert other.result().tokens == alone(engine, 1, prompt=20, new=30)


def test_deadlines_are_kept_to_a_step(engine: PlmEngine) -> None:
    """GEN-09: in any stage, and all memory is free afterwards."""
    clock, pool = FakeClock(), make_pool(engine)
    scheduler = make_scheduler(engine, pool=pool, clock=clock)
    rng = np.random.default_rng(0)
    requests = [
        make_request(i, tiles=1, new=60, end_ids=frozenset(), deadline=rng.uniform(1, 50) / 1e3)
        for i in range(200)
    ]
    for request in requests:
        scheduler.submit(request)
    while scheduler.requests:
        scheduler.step()
        scheduler.invariants()
        clock.now += 1e-3
    assert {request.finish_reason for request in requests} == {"deadline"}
    assert all(
        request.deadline <= request.ended_at <= request.deadline + 1.01e-3 for request in requests
    )
    assert any(request.tokens for request in requests) and pool.accounted_bytes == 0


# GEN-07


@pytest.mark.parametrize("call", range(1, 12))
def test_a_call_that_fails_once_costs_one_request_at_most(engine: PlmEngine, call: int) -> None:
    watched = Watched(engine)
    watched.bad_call = call
    cases = [{"seed": seed, "prompt": 20, "new": 10, "end_ids": frozenset()} for seed in range(3)]
    requests = [make_request(**case) for case in cases]
    scheduler = make_scheduler(watched, block=PoisonedBlock)
    run(scheduler, requests)
    failed = [request for request in requests if request.status is Status.FAILED]
    # Calls 7, 9 and 11 decode several requests together, and are repeated one by one.
    assert len(failed) == (0 if call in (7, 9, 11) else 1)
    for case, request in zip(cases, requests, strict=True):
        if request in failed:
            with pytest.raises(BackendError, match="made to fail"):
                request.result()
        else:
            assert request.result().tokens == alone(engine, **case)
    again = make_request(**cases[0])
    run(scheduler, [again])
    assert again.result().tokens == alone(engine, **cases[0])


def test_a_request_that_always_fails_fails_alone(engine: PlmEngine) -> None:
    cases = [{"seed": seed, "new": 30, "end_ids": frozenset()} for seed in range(4)]
    expected = [alone(engine, **case) for case in cases]
    watched = Watched(engine)
    watched.bad_token = next(t for t in expected[1][3:] if sum(t in e for e in expected) == 1)
    requests = [make_request(**case) for case in cases]
    run(make_scheduler(watched, block=PoisonedBlock), requests)
    assert [request.status is Status.FAILED for request in requests] == [False, True, False, False]
    assert [request.result().tokens for request in requests if request.error is None] == [
        tokens for index, tokens in enumerate(expected) if index != 1
    ]
    assert requests[1].tokens == list(expected[1][: expected[1].index(watched.bad_token) + 1])


@pytest.mark.parametrize("phase", ["vision", "prefill", "decode"])
def test_a_caller_that_raises_ends_its_own_request(engine: PlmEngine, phase: str) -> None:
    class MineError(Exception):
        pass

    def on_progress(progress) -> None:
        if progress.phase == phase and progress.done == progress.total:
            raise MineError

    requests = [
        make_request(0, tiles=2, on_progress=on_progress, end_ids=frozenset()),
        make_request(1),
    ]
    run(make_scheduler(engine), requests)
    with pytest.raises(MineError):
        requests[0].result()
    assert requests[1].result().tokens == alone(engine, 1)


def test_progress_is_told_in_order(engine: PlmEngine) -> None:
    seen: list[tuple[str, int, int]] = []
    request = make_request(
        prompt=30, tiles=3, new=4, end_ids=frozenset(),
        on_progress=lambda p: seen.append((p.phase, p.done, p.total)),
    )  # fmt: skip
    run(make_scheduler(engine), [request])
    assert seen == [
        *[("vision", n, 3) for n in (1, 2, 3)],
        *[("prefill", n, 42) for n in (16, 32, 42)],
        *[("decode", n, 4) for n in (1, 2, 3, 4)],
    ]


# GEN-08


def test_a_thousand_requests_onto_four_rows(engine: PlmEngine) -> None:
    clock, pool = FakeClock(), make_pool(engine, slots=4 * 32)
    scheduler = make_scheduler(engine, pool=pool, max_queued=64, clock=clock)
    rng = np.random.default_rng(1)
    waiting = [make_request(seed, prompt=int(rng.integers(2, 20)), new=8) for seed in range(1000)]
    requests: list[RequestState] = []
    refused = 0
    while waiting or scheduler.requests:
        try:
            waiting[0].called_at = clock.now
            scheduler.submit(waiting[0])
            requests.append(waiting.pop(0))
        except (CapacityError, IndexError):
            refused += bool(waiting)
            scheduler.step()
            clock.now += 1
        assert scheduler.queued <= 64
    scheduler.invariants()
    assert refused > 0 and len(requests) == 1000
    starts = [request.started_at for request in requests]
    assert starts == sorted(starts)
    waits = sorted(request.started_at - request.called_at for request in requests[64:])
    assert waits[-1] <= 3 * np.median(waits)
    assert pool.accounted_bytes == 0


def test_a_request_that_can_never_fit_is_refused(engine: PlmEngine) -> None:
    scheduler = make_scheduler(engine, slots=100)
    with pytest.raises(CapacityError, match=r"160 tokens takes 32768 bytes .* kv_bytes is 12800"):
        scheduler.submit(make_request(prompt=100, new=60))
    assert scheduler.requests == []
    run(scheduler, [make_request(prompt=30, new=30)])


def test_memory_that_cannot_be_had_costs_one_request(engine: PlmEngine) -> None:
    """GEN-10 on a CPU: a clear error and recovery."""
    made = []

    class Scarce(CacheBlock):
        def __init__(self, *arguments) -> None:
            made.append(arguments)
            if len(made) in (1, 3):
                raise CapacityError("there is no memory")
            super().__init__(*arguments)

    # The first gets no row, the second none to move to.
    requests = [make_request(seed, prompt=30, new=20, end_ids=frozenset()) for seed in range(3)]
    run(make_scheduler(engine, block=Scarce), requests)
    assert [type(request.error) for request in requests] == [
        CapacityError,
        CapacityError,
        type(None),
    ]
    assert requests[2].result().tokens == alone(engine, 2, prompt=30, new=20, end_ids=frozenset())


def test_close_fails_everything(engine: PlmEngine) -> None:
    scheduler = make_scheduler(engine, rows=1)
    requests = [make_request(seed, end_ids=frozenset()) for seed in range(4)]
    for request in requests[:3]:
        scheduler.submit(request)
    scheduler.step()
    scheduler.submit(requests[3])
    scheduler.close(BackendError("over"))
    scheduler.invariants()
    assert {request.status for request in requests} == {Status.FAILED} and scheduler.requests == []


def test_an_interrupt_from_a_caller_is_its_own(engine: PlmEngine) -> None:
    def interrupt(progress) -> None:
        if progress.phase == "decode":
            raise KeyboardInterrupt

    requests = [make_request(0, on_progress=interrupt), make_request(1)]
    run(make_scheduler(engine), requests)
    with pytest.raises(KeyboardInterrupt):
        requests[0].result()
    assert requests[1].result().tokens == alone(engine, 1)
