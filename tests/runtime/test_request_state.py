"""GEN-04: transitions between stages; an illegal one raises and changes nothing."""

from itertools import pairwise

import pytest
from plm_requests import make_request

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.detokenizer import TextStream
from perception_rt.runtime.generation.request_state import TRANSITIONS, RequestState, Status

LEGAL = [(old, new) for old in Status for new in Status if new in TRANSITIONS[old]]
ILLEGAL = [(old, new) for old in Status for new in Status if (old, new) not in LEGAL]
WAY = [Status.QUEUED, Status.ENCODING, Status.PREFILL, Status.DECODE, Status.DONE]


def request_in(status: Status) -> RequestState:
    request = make_request(tiles=1)
    for step in WAY[1 : WAY.index(status) + 1] if status in WAY else [status]:
        request.enter(step)
    return request


def snapshot(request: RequestState) -> dict:
    return {name: repr(getattr(request, name)) for name in RequestState.__slots__}


def test_the_table_is_what_it_is_meant_to_be() -> None:
    assert len(LEGAL) == 4 * 2 + 4 + 1 and len(ILLEGAL) == 49 - 13
    assert set(pairwise(WAY)) <= set(LEGAL)
    assert (Status.PREFILL, Status.DONE) in LEGAL
    assert not any(request_in(old).ended for old, _ in LEGAL)


@pytest.mark.parametrize(("old", "new"), LEGAL)
def test_legal_transitions(old: Status, new: Status) -> None:
    request = request_in(old)
    request.enter(new)
    assert request.status is new and request.ended == (not TRANSITIONS[new])


@pytest.mark.parametrize(("old", "new"), ILLEGAL)
def test_illegal_transitions_raise_and_change_nothing(old: Status, new: Status) -> None:
    request = request_in(old)
    request.pieces.append("a")
    before = snapshot(request)
    calls = [lambda: request.enter(new)]
    if new is Status.FAILED:
        calls.append(lambda: request.fail(BackendError("late"), 1.0))
    if new is Status.DONE:
        calls.append(lambda: request.finish("stop", 1.0))
    if new is Status.CANCELLED:
        calls += [lambda: request.finish("cancelled", 1.0), lambda: request.finish("deadline", 1.0)]
    for call in calls:
        with pytest.raises(AssertionError, match=f"a request that is {old} cannot be {new}"):
            call()
        assert snapshot(request) == before


@pytest.mark.parametrize(
    ("data", "stop", "reason", "text"),
    [
        (b"\xf0\x9f", [], "length", "\ufffd"),
        (b"a", ["ab"], "cancelled", "a"),
        (b"a", ["a"], "stop", ""),
    ],
)
def test_held_back_text_is_emitted_at_the_end(data, stop, reason, text: str) -> None:
    request = make_request(spell=lambda ids: data, stream=TextStream(stop))
    for status in WAY[1:4]:
        request.enter(status)
    request.accept(100, 1.0)
    assert request.pieces == []
    request.finish(reason, 2.0)
    assert request.result().text == text and request.result().finish_reason == reason
