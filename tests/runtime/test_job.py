"""GEN-04: which states of a request may follow which; any other order raises, changing nothing."""

from itertools import pairwise

import pytest
from plm_jobs import make_job

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.detokenizer import TextStream
from perception_rt.runtime.generation.request_state import TRANSITIONS, Job, State

LEGAL = [(old, new) for old, allowed in TRANSITIONS.items() for new in allowed]
ILLEGAL = [(old, new) for old in State for new in State if (old, new) not in LEGAL]
WAY = [State.QUEUED, State.ENCODING, State.PREFILL, State.DECODE, State.DONE]


def job_in(state: State) -> Job:
    job = make_job(tiles=1)
    for step in WAY[1 : WAY.index(state) + 1] if state in WAY else [state]:
        job.enter(step)
    return job


def snapshot(job: Job) -> dict:
    return {name: repr(getattr(job, name)) for name in Job.__slots__}


def test_the_table_is_what_it_is_meant_to_be() -> None:
    assert len(LEGAL) == 4 * 2 + 4 + 1 and len(ILLEGAL) == 49 - 13
    assert set(pairwise(WAY)) <= set(LEGAL)
    assert (State.PREFILL, State.DONE) in LEGAL
    assert not any(job_in(old).ended for old, _ in LEGAL)


@pytest.mark.parametrize(("old", "new"), LEGAL)
def test_legal_transitions(old: State, new: State) -> None:
    job = job_in(old)
    job.enter(new)
    assert job.state is new and job.ended == (not TRANSITIONS[new])


@pytest.mark.parametrize(("old", "new"), ILLEGAL)
def test_illegal_transitions_raise_and_change_nothing(old: State, new: State) -> None:
    job = job_in(old)
    job.pieces.append("a")
    before = snapshot(job)
    calls = [lambda: job.enter(new)]
    if new is State.FAILED:
        calls.append(lambda: job.fail(BackendError("late"), 1.0))
    if new is State.DONE:
        calls.append(lambda: job.finish("stop", 1.0))
    if new is State.CANCELLED:
        calls += [lambda: job.finish("cancelled", 1.0), lambda: job.finish("deadline", 1.0)]
    for call in calls:
        with pytest.raises(AssertionError, match=f"a job that is {old} cannot be {new}"):
            call()
        assert snapshot(job) == before


@pytest.mark.parametrize(
    ("data", "stop", "reason", "text"),
    [
        (b"\xf0\x9f", [], "length", "\ufffd"),
        (b"a", ["ab"], "cancelled", "a"),
        (b"a", ["a"], "stop", ""),
    ],
)
def test_what_was_held_back_is_text_at_the_end(data, stop, reason, text: str) -> None:
    job = make_job(spell=lambda ids: data, stream=TextStream(stop))
    for state in WAY[1:4]:
        job.enter(state)
    job.accept(100, 1.0)
    assert job.pieces == []
    job.finish(reason, 2.0)
    assert job.result().text == text and job.result().finish_reason == reason
