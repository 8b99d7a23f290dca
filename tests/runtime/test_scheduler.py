"""Requests among others: the same tokens as alone, in order, and nothing left behind."""

import numpy as np
import pytest
from plm_jobs import (
    PER_TILE,
    FakeClock,
    PoisonedBlock,
    alone,
    make_job,
    make_scheduler,
    open_decoder,
    run,
)

from perception_rt.errors import BackendError, CapacityError
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.prefix_cache import PrefixCache
from perception_rt.runtime.generation.plm_engine import Decoder
from perception_rt.runtime.generation.request_state import Job, State
from perception_rt.runtime.generation.scheduler import Scheduler


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory):
    with open_decoder(tmp_path_factory.mktemp("plm")) as decoder:
        yield decoder


class Watched:
    """A decoder that counts its calls and fails where it is told to."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self.encoded = 0
        self.forwards: list[tuple[int, int]] = []  # N, T
        self.bad_call: int | None = None
        self.bad_token: int | None = None

    def __getattr__(self, name: str):
        return getattr(self._decoder, name)

    def encode_tiles(self, tiles: np.ndarray) -> np.ndarray:
        self.encoded += len(tiles)
        return self._decoder.encode_tiles(tiles)

    def forward(self, hidden: np.ndarray, past, cache: CacheBlock, rows: slice, positions):
        self.forwards.append(hidden.shape[:2])
        # The reference's embedding has the id in the first channel.
        if len(self.forwards) == self.bad_call or (hidden[:, -1, 0] == self.bad_token).any():
            raise BackendError("made to fail")
        return self._decoder.forward(hidden, past, cache, rows, positions)


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
    decoder: Decoder, block: type[CacheBlock], cached: bool
) -> None:
    """GEN-01, -02, -03 and -06 in small: any company, arrival and memory, poisoned or cached."""
    rng = np.random.default_rng(7)
    for _ in range(15):
        scheduler = make_scheduler(
            decoder, slots=int(rng.integers(600, 2500)), block=block, cached=cached
        )
        cases = [random_case(rng) for _ in range(rng.integers(2, 9))]
        jobs = [make_job(**case) for case in cases]
        for job in jobs:
            scheduler.submit(job)
            for _ in range(rng.integers(6)):
                scheduler.step()
                scheduler.invariants()
        run(scheduler)
        for case, job in zip(cases, jobs, strict=True):
            assert job.result().tokens == alone(decoder, **case)


def test_a_prompt_in_parts_is_the_prompt_at_once(decoder: Decoder) -> None:
    """PAR-05."""
    tokens = set()
    for chunk in (1, 3, 16, 64, 1000):
        job = make_job(3, prompt=90, tiles=2)
        run(make_scheduler(decoder, chunk_tokens=chunk), [job])
        tokens.add(job.result().tokens)
    assert len(tokens) == 1


def test_a_growing_request_moves_and_keeps_its_tokens(decoder: Decoder) -> None:
    watched = Watched(decoder)
    jobs = [make_job(seed, prompt=20 + seed, new=60, end_ids=frozenset()) for seed in range(4)]
    run(make_scheduler(watched, block=PoisonedBlock), jobs)
    for seed, job in enumerate(jobs):
        expected = alone(decoder, seed, prompt=20 + seed, new=60, end_ids=frozenset())
        assert job.result().tokens == expected and len(expected) == 60
    assert (4, 1) in watched.forwards  # decoded together, wherever they were


def test_decoding_goes_on_while_a_long_prompt_is_prepared(decoder: Decoder) -> None:
    scheduler = make_scheduler(decoder)
    short = make_job(0, new=100, end_ids=frozenset())
    scheduler.submit(short)
    scheduler.step()
    long = make_job(1, prompt=200, tiles=3)
    scheduler.submit(long)
    while long.state in (State.QUEUED, State.ENCODING, State.PREFILL):
        count = len(short.tokens)
        scheduler.step()
        assert len(short.tokens) == count + 1
    assert len(short.tokens) >= 3 + 200 // 16


def test_rows_beside_each_other_are_one_call(decoder: Decoder) -> None:
    watched = Watched(decoder)
    scheduler = make_scheduler(watched)
    jobs = [make_job(seed, new=20, end_ids=frozenset()) for seed in range(4)]
    for job in jobs:
        scheduler.submit(job)
    for _ in range(4):
        scheduler.step()
    watched.forwards.clear()
    scheduler.step()
    assert watched.forwards == [(4, 1)]
    jobs[1].cancelled = True
    scheduler.step()
    assert sorted(watched.forwards[1:]) == [(1, 1), (2, 1)]


def test_the_first_token_may_end_an_answer(decoder: Decoder) -> None:
    """GEN-05, U4."""
    (first,) = alone(decoder, new=1, end_ids=frozenset())
    job = make_job(end_ids=frozenset({first}))
    run(make_scheduler(decoder), [job])
    result = job.result()
    assert (result.tokens, result.finish_reason, result.timings.steps) == ((), "stop", 0)
    assert len(result.timings.token_times_s) == 1


def test_a_context_can_be_filled(decoder: Decoder) -> None:
    """GEN-05: prompt and answer have exactly the tokens of the longest row."""
    job = make_job(prompt=decoder.max_length - 5, new=5, end_ids=frozenset())
    run(make_scheduler(decoder, slots=decoder.max_length, block=PoisonedBlock), [job])
    assert len(job.result().tokens) == 5 and job.result().finish_reason == "length"


def test_logits_alone(decoder: Decoder) -> None:
    job = make_job(new=0)
    run(make_scheduler(decoder), [job])
    assert job.logits.shape == (decoder.vocab_size,) and job.result().tokens == ()
    # 319 is the image token, which no sampler takes.
    assert int(np.argmax(job.logits[:319])) == alone(decoder, new=1, end_ids=frozenset())[0]


class Repeating(Watched):
    """A decoder whose next token is a function of the last one, and now and then of its place."""

    def forward(self, hidden: np.ndarray, past, cache: CacheBlock, rows: slice, positions):
        logits = super().forward(hidden, past, cache, rows, positions).copy()
        token = hidden[0, :, 0].astype(int)[positions[0]]
        place = past[0] + positions[0]
        following = 100 + (token * 3 + (place % 11 == 0)) % 17
        logits[0, np.arange(len(token)), following] = 2
        return logits


@pytest.mark.parametrize("new", [1, 2, 9, 10, 70])
def test_guessing_changes_no_token_and_saves_steps(decoder: Decoder, new: int) -> None:
    results = []
    for lookup in (False, True):
        watched = Repeating(decoder)
        job = make_job(prompt=[105, 106, 107], new=new, lookup=lookup, end_ids=frozenset())
        run(make_scheduler(watched, block=PoisonedBlock), [job])
        results.append(job.result())
        assert all(n == 1 for n, _ in watched.forwards)
    plain, guessed = results
    assert guessed.tokens == plain.tokens and len(plain.tokens) == new
    assert plain.timings.steps == new - 1
    if new == 70:
        assert guessed.timings.steps < 40
        assert max(length for _, length in watched.forwards[1:]) == 9


def test_wrong_guesses_will_be_wiped_out_too(decoder: Decoder) -> None:
    """What a row is cleared of is all that was written."""
    scheduler = make_scheduler(Repeating(decoder))
    job = make_job(prompt=[105, 106, 107] * 12, new=90, lookup=True, end_ids=frozenset())
    scheduler.submit(job)
    wrong = 0
    while not job.ended:
        scheduler.step()
        if job.lease is not None:
            row = job.lease.block.read(job.lease.row, job.lease.block.slots)
            wrong += bool(row[:, :, :, job.lease.length :].any())
            assert not row[:, :, :, job.lease.written :].any()
    assert wrong > 3


def test_guessing_stops_at_an_end_token(decoder: Decoder) -> None:
    def ended(lookup: bool) -> Job:
        job = make_job(prompt=prompt, new=60, lookup=lookup, end_ids=frozenset({104}))
        run(make_scheduler(Repeating(decoder), block=PoisonedBlock), [job])
        return job

    prompt = [104]  # what `Repeating` says, nearly twice around
    while len(prompt) < 29:
        prompt.append(100 + prompt[-1] * 3 % 17)
    assert ended(True).tokens == ended(False).tokens == [115, 105, 109]
    assert ended(True).finish_reason == "stop" and ended(True).steps == 1


def test_a_second_question_decodes_only_what_is_new(decoder: Decoder) -> None:
    """Neither the image nor what the prompts have in common, also of the answer before."""
    watched = Watched(decoder)
    scheduler = make_scheduler(watched, cached=True)
    start = [*range(30, 70), *[319] * PER_TILE, *range(70, 90)]
    side = decoder.config.vision.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (1, side, side, 3), np.uint8)

    def ask(ids: list[int], key: str = "ab") -> Job:
        job = make_job(prompt=ids, tiles=0, end_ids=frozenset())
        job.tiles, job.tile_count, job.tile_keys = pixels, 1, [key]
        watched.encoded = 0
        run(scheduler, [job])
        return job

    first = ask([*start, 5, 6])
    assert (watched.encoded, first.cached_tokens) == (1, 0)
    second = ask([*start, 7, 8, 9])
    assert (watched.encoded, second.cached_tokens) == (0, len(start))
    chat = ask([*start, 5, 6, *first.tokens, 12, 13])
    assert chat.cached_tokens == len(start) + 2 + len(first.tokens) - 1
    again = ask([*start, 5, 6])
    assert again.cached_tokens == len(start) + 1 and again.tokens == first.tokens
    # The image's features are known, but not at this place.
    moved = ask([99, *start])
    assert (watched.encoded, moved.cached_tokens) == (0, 0)
    # Equal ids with another image have the text before it in common, and no more.
    other = ask([*start, 5, 6], key="cd")
    assert (watched.encoded, other.cached_tokens) == (1, 40)


def test_parts_of_a_prompt_end_where_they_would_without_a_cache(decoder: Decoder) -> None:
    watched = Watched(decoder)
    scheduler = make_scheduler(watched, cached=True)
    common = list(range(30, 70))
    for end in ([1], [2] * 20):
        watched.forwards.clear()
        run(scheduler, [make_job(prompt=[*common, *end], new=0)])
    assert watched.forwards == [(1, 8), (1, 12)]  # 40 to 48, to 60


def test_the_last_token_of_an_image_needs_its_features(decoder: Decoder) -> None:
    watched = Watched(decoder)
    scheduler = make_scheduler(watched, prefixes=PrefixCache(1 << 20, package_id="sha256:0"))
    jobs = [make_job(0, prompt=1, tiles=2) for _ in range(2)]
    for job in jobs:  # its only token comes last, so without it the prompt ends with a tile
        job.ids, job.image_positions = job.ids[:-1], job.image_positions
        run(scheduler, [job])
    assert jobs[0].ids[-1] == 319 and watched.encoded == 2 + 1
    assert jobs[1].cached_tokens == len(jobs[1].ids) - 1
    assert jobs[1].tokens == jobs[0].tokens


def test_requests_that_wait_together_share_what_they_have_in_common(decoder: Decoder) -> None:
    watched = Watched(decoder)
    jobs = [make_job(0, prompt=60, tiles=2) for _ in range(3)]
    run(make_scheduler(watched, cached=True), jobs)
    assert watched.encoded == 2
    assert [job.cached_tokens for job in jobs] == [0, 67, 67]
    assert len({job.result().tokens for job in jobs}) == 1


# Ends before the end.


def step_until(scheduler: Scheduler, job: Job, state: State) -> None:
    for _ in range(200):
        if job.state is state:
            return
        scheduler.step()
    raise AssertionError(f"the job never was {state}")


@pytest.mark.parametrize("state", [State.QUEUED, State.ENCODING, State.PREFILL, State.DECODE])
def test_cancelled_in_any_phase_it_leaves_nothing(decoder: Decoder, state: State) -> None:
    """The neighbour's tokens are the same; the row is free at the next step."""
    # The first takes 96 slots and the second 128.
    scheduler = make_scheduler(decoder, slots=200 if state is State.QUEUED else 300)
    other = make_job(1, prompt=20, new=30)
    job = make_job(2, prompt=70, tiles=4, new=30, end_ids=frozenset())
    scheduler.submit(other)
    scheduler.submit(job)
    scheduler.step()
    step_until(scheduler, job, state)
    job.cancelled = True
    count = len(job.tokens)
    scheduler.drop_ended()
    scheduler.invariants()
    assert job.state is State.CANCELLED and job.lease is None and job not in scheduler.jobs
    result = job.result()
    assert result.finish_reason == "cancelled" and len(result.tokens) == count
    job.cancelled = True
    scheduler.drop_ended()
    run(scheduler)
    assert other.result().tokens == alone(decoder, 1, prompt=20, new=30)


def test_deadlines_are_kept_to_a_step(decoder: Decoder) -> None:
    """GEN-09: whether they wait, are prepared or decode, and all is free afterwards."""
    clock = FakeClock()
    scheduler = make_scheduler(decoder, clock=clock)
    rng = np.random.default_rng(0)
    jobs = [
        make_job(i, tiles=1, new=60, end_ids=frozenset(), deadline=rng.uniform(1, 50) / 1e3)
        for i in range(200)
    ]
    for job in jobs:
        scheduler.submit(job)
    while scheduler.jobs:
        scheduler.step()
        scheduler.invariants()
        clock.now += 1e-3
    assert {job.finish_reason for job in jobs} == {"deadline"}
    assert all(job.deadline <= job.ended_at <= job.deadline + 1.01e-3 for job in jobs)
    assert any(job.tokens for job in jobs) and scheduler._pool.accounted_bytes == 0


# GEN-07


@pytest.mark.parametrize("call", range(1, 12))
def test_a_call_that_fails_once_costs_one_request_at_most(decoder: Decoder, call: int) -> None:
    watched = Watched(decoder)
    watched.bad_call = call
    cases = [{"seed": seed, "prompt": 20, "new": 10, "end_ids": frozenset()} for seed in range(3)]
    jobs = [make_job(**case) for case in cases]
    scheduler = make_scheduler(watched, block=PoisonedBlock)
    run(scheduler, jobs)
    failed = [job for job in jobs if job.state is State.FAILED]
    # Prompts have two parts, and the others decode in between; these are of several together.
    assert len(failed) == (0 if call in (7, 9, 11) else 1)
    for case, job in zip(cases, jobs, strict=True):
        if job in failed:
            with pytest.raises(BackendError, match="made to fail"):
                job.result()
        else:
            assert job.result().tokens == alone(decoder, **case)
    again = make_job(**cases[0])
    run(scheduler, [again])
    assert again.result().tokens == alone(decoder, **cases[0])


def test_a_request_that_always_fails_fails_alone(decoder: Decoder) -> None:
    cases = [{"seed": seed, "new": 30, "end_ids": frozenset()} for seed in range(4)]
    expected = [alone(decoder, **case) for case in cases]
    watched = Watched(decoder)
    watched.bad_token = next(t for t in expected[1][3:] if sum(t in e for e in expected) == 1)
    jobs = [make_job(**case) for case in cases]
    run(make_scheduler(watched, block=PoisonedBlock), jobs)
    assert [job.state is State.FAILED for job in jobs] == [False, True, False, False]
    assert [job.result().tokens for job in jobs if job.error is None] == [
        tokens for index, tokens in enumerate(expected) if index != 1
    ]
    assert jobs[1].tokens == list(expected[1][: expected[1].index(watched.bad_token) + 1])


@pytest.mark.parametrize("phase", ["vision", "prefill", "decode"])
def test_a_caller_that_raises_ends_its_own_request(decoder: Decoder, phase: str) -> None:
    class MineError(Exception):
        pass

    def on_progress(progress) -> None:
        if progress.phase == phase and progress.done == progress.total:
            raise MineError

    jobs = [make_job(0, tiles=2, on_progress=on_progress, end_ids=frozenset()), make_job(1)]
    run(make_scheduler(decoder), jobs)
    with pytest.raises(MineError):
        jobs[0].result()
    assert jobs[1].result().tokens == alone(decoder, 1)


def test_progress_is_told_in_order(decoder: Decoder) -> None:
    seen: list[tuple[str, int, int]] = []
    job = make_job(
        prompt=30, tiles=3, new=4, end_ids=frozenset(),
        on_progress=lambda p: seen.append((p.phase, p.done, p.total)),
    )  # fmt: skip
    run(make_scheduler(decoder), [job])
    assert seen == [
        *[("vision", n, 3) for n in (1, 2, 3)],
        *[("prefill", n, 42) for n in (16, 32, 42)],
        *[("decode", n, 4) for n in (1, 2, 3, 4)],
    ]


# GEN-08


def test_a_thousand_requests_onto_four_rows(decoder: Decoder) -> None:
    clock = FakeClock()
    scheduler = make_scheduler(decoder, slots=4 * 32, max_queued=64, clock=clock)
    rng = np.random.default_rng(1)
    waiting = [make_job(seed, prompt=int(rng.integers(2, 20)), new=8) for seed in range(1000)]
    jobs: list[Job] = []
    refused = 0
    while waiting or scheduler.jobs:
        try:
            waiting[0].called_at = clock.now
            scheduler.submit(waiting[0])
            jobs.append(waiting.pop(0))
        except (CapacityError, IndexError):
            refused += bool(waiting)
            scheduler.step()
            clock.now += 1
        assert len(scheduler._queue) <= 64
    scheduler.invariants()
    assert refused > 0 and len(jobs) == 1000
    starts = [job.started_at for job in jobs]
    assert starts == sorted(starts)
    waits = sorted(job.started_at - job.called_at for job in jobs[64:])
    assert waits[-1] <= 3 * np.median(waits)
    assert scheduler._pool.accounted_bytes == 0


def test_what_can_never_fit_is_refused_at_once(decoder: Decoder) -> None:
    scheduler = make_scheduler(decoder, slots=100)
    with pytest.raises(CapacityError, match=r"160 tokens takes 32768 bytes .* kv_bytes is 12800"):
        scheduler.submit(make_job(prompt=100, new=60))
    assert scheduler.jobs == []
    run(scheduler, [make_job(prompt=30, new=30)])


def test_memory_that_cannot_be_had_costs_one_request(decoder: Decoder) -> None:
    """GEN-10 on a CPU: a clean error, and recovery."""
    made = []

    class Scarce(CacheBlock):
        def __init__(self, *arguments) -> None:
            made.append(arguments)
            if len(made) in (1, 3):
                raise CapacityError("there is no memory")
            super().__init__(*arguments)

    # The first gets no row, the second none to move to.
    jobs = [make_job(seed, prompt=30, new=20, end_ids=frozenset()) for seed in range(3)]
    run(make_scheduler(decoder, block=Scarce), jobs)
    assert [type(job.error) for job in jobs] == [CapacityError, CapacityError, type(None)]
    assert jobs[2].result().tokens == alone(decoder, 2, prompt=30, new=20, end_ids=frozenset())


def test_close_fails_everything(decoder: Decoder) -> None:
    scheduler = make_scheduler(decoder, rows=1)
    jobs = [make_job(seed, end_ids=frozenset()) for seed in range(4)]
    for job in jobs[:3]:
        scheduler.submit(job)
    scheduler.step()
    scheduler.submit(jobs[3])
    scheduler.close(BackendError("over"))
    scheduler.invariants()
    assert {job.state for job in jobs} == {State.FAILED} and scheduler.jobs == []


def test_an_interrupt_from_a_caller_is_its_own(decoder: Decoder) -> None:
    def interrupt(progress) -> None:
        if progress.phase == "decode":
            raise KeyboardInterrupt

    jobs = [make_job(0, on_progress=interrupt), make_job(1)]
    run(make_scheduler(decoder), jobs)
    with pytest.raises(KeyboardInterrupt):
        jobs[0].result()
    assert jobs[1].result().tokens == alone(decoder, 1)
