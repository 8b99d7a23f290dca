"""A request that has ended holds no memory."""

import pytest
from plm_requests import make_pool, make_request, make_scheduler, open_engine, run

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.request_state import RequestState, Status


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory):
    with open_engine(tmp_path_factory.mktemp("plm")) as engine:
        yield engine


@pytest.mark.parametrize("end", ["length", "cancelled", "deadline", "error", "close"])
def test_ended_requests_have_released_their_row(engine: PlmEngine, end: str) -> None:
    """Another thread may look at any time, so the row is released before the end shows."""
    pool, seen = make_pool(engine), []
    scheduler = make_scheduler(engine, pool=pool)
    request = make_request(
        new=3, end_ids=frozenset(), on_progress=(lambda _: 1 / 0) if end == "error" else None
    )
    enter = RequestState.enter

    def watched(request: RequestState, status: Status) -> None:
        if status in (Status.DONE, Status.FAILED, Status.CANCELLED):
            seen.append((request.lease, pool.used_rows, scheduler.requests))
        enter(request, status)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RequestState, "enter", watched)
        scheduler.submit(request)
        scheduler.step()
        request.cancelled = end == "cancelled"
        request.deadline = 0.0 if end == "deadline" else None
        if end == "close":
            scheduler.close(BackendError("over"))
        run(scheduler)
    assert seen == [(None, 0, [])]
