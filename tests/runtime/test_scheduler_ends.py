"""How requests end: nothing that has ended still has memory."""

import pytest
from plm_jobs import make_job, make_scheduler, open_decoder, run

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.plm_engine import Decoder
from perception_rt.runtime.generation.request_state import Job, State


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory):
    with open_decoder(tmp_path_factory.mktemp("plm")) as decoder:
        yield decoder


@pytest.mark.parametrize("end", ["length", "cancelled", "deadline", "error", "close"])
def test_what_has_ended_has_given_back_its_row(decoder: Decoder, end: str) -> None:
    """Another thread may look at any time: at no time is there one that has ended with a row."""
    scheduler, seen = make_scheduler(decoder), []
    job = make_job(
        new=3, end_ids=frozenset(), on_progress=(lambda _: 1 / 0) if end == "error" else None
    )
    enter = Job.enter

    def watched(job: Job, state: State) -> None:
        if state in (State.DONE, State.FAILED, State.CANCELLED):
            seen.append((job.lease, scheduler._pool.used_rows, scheduler.jobs))
        enter(job, state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Job, "enter", watched)
        scheduler.submit(job)
        scheduler.step()
        job.cancelled = end == "cancelled"
        job.deadline = 0.0 if end == "deadline" else None
        if end == "close":
            scheduler.close(BackendError("over"))
        run(scheduler)
    assert seen == [(None, 0, [])]
