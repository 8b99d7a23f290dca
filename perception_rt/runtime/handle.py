"""Callers and their requests: whoever waits for one does the work for all.

There is no thread of its own. The first who waits steps the scheduler until its own request has
what it waits for; others who wait meanwhile look on, and one of them takes over. Knows nothing of
models.
"""

import atexit
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import suppress

from perception_rt.errors import BackendError
from perception_rt.runtime.job import Job
from perception_rt.runtime.request import Result
from perception_rt.runtime.scheduler import Scheduler

# A daemon thread must not be inside of an engine when the interpreter goes.
_open: "weakref.WeakSet[Turns]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for turns in list(_open):
        with suppress(BackendError):  # of a process that was forked
            turns.close()


class Turns:
    """Lets one thread at a time step a scheduler, on behalf of all who wait. Any may call it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # Not an RLock: a finalizer may run anywhere, also inside of a section that is locked.
        self._changed = threading.Condition(threading.Lock())
        self._stepping: int | None = None  # the thread that does
        self._closed = False
        self._process = os.getpid()
        _open.add(self)

    def submit(self, job: Job, *, wait: bool = False) -> None:
        """Adds a job; it moves on while anybody waits for this or for another one.

        Args:
            job: a new one.
            wait: works until there is a place for it.

        Raises:
            CapacityError: too many wait already, or it is too large in any case.
            BackendError: as `check_open`.
        """
        if wait:
            self._check_thread()
        with self._changed:
            if wait:
                self._work(lambda: not self._scheduler.full)
            self.check_open()
            self._make_place()
            self._scheduler.submit(job)

    def wait(self, ready: Callable[[], bool]) -> None:
        """Works, or lets another thread work, until `ready`, which all jobs are after `close`."""
        self._check_thread()
        with self._changed:
            self._work(ready)

    def cancel(self, job: Job, *, blocking: bool = True) -> None:
        """Ends a job: now, or once the step that is under way is over.

        Args:
            job: that its caller has lost interest in.
            blocking: False in a finalizer, which must not wait; the job may then last until the
                next step.
        """
        job.cancelled = True
        if os.getpid() != self._process or not self._changed.acquire(blocking=blocking):
            return
        try:
            if self._stepping is None:
                self._changed.notify_all()
                self._scheduler.drop_ended()
        finally:
            self._changed.release()

    def close(self) -> bool:
        """Fails every job, after the step that is under way; whether this was the first call."""
        self._check_thread()
        with self._changed:
            first, self._closed = not self._closed, True
            while self._stepping is not None:
                self._changed.wait()
            self._scheduler.close(BackendError("the generator was closed"))
            self._changed.notify_all()
            return first

    def check_open(self) -> None:
        """BackendError in a process that was forked, and after `close`."""
        self._check_process()
        if self._closed:
            raise BackendError("this generator is closed")

    def check_place(self) -> None:
        """What `submit` would raise for any job."""
        with self._changed:
            self.check_open()
            self._make_place()
            self._scheduler.check_place()

    def _make_place(self) -> None:
        """Drops those in a full queue whose time is over, if nobody is at it anyway."""
        if self._scheduler.full and self._stepping is None:
            self._scheduler.drop_ended()

    def _work(self, ready: Callable[[], bool]) -> None:
        """Steps until `ready`, which is looked at between steps; the lock is held at the end."""
        while not ready():
            if self._stepping is None and not self._closed:
                self._step()
            else:
                self._changed.wait()

    def _step(self) -> None:
        """A step without the lock, which is held before and after."""
        try:
            self._stepping = threading.get_ident()
            self._changed.release()
            try:
                self._scheduler.step()
            finally:
                self._changed.acquire()
        finally:
            self._stepping = None
            # In this order: an interrupt while rows are cleared must not leave others waiting.
            self._changed.notify_all()
            self._scheduler.drop_ended()

    def _check_thread(self) -> None:
        self._check_process()
        if self._stepping == threading.get_ident():
            raise BackendError("on_progress cannot wait for the generator that calls it")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise BackendError("this generator belongs to another process: load it after a fork")


class Handle:
    """A request that was submitted. Iterating gives its text as it grows, in whole characters.

    It moves on while some thread waits for it or for another request of the same generator. A
    handle that is dropped before the end cancels its request.
    """

    def __init__(self, turns: Turns, job: Job) -> None:
        self._turns = turns
        self._job = job
        self._finalizer = weakref.finalize(self, turns.cancel, job, blocking=False)
        self._finalizer.atexit = False

    @property
    def done(self) -> bool:
        """Whether the request has ended: `result` will not wait."""
        return self._job.ended

    def __iter__(self) -> Iterator[str]:
        """Pieces of text from the beginning; an error of the request comes after them."""
        job, given = self._job, 0

        def more() -> bool:
            return job.ended or len(job.pieces) > given

        self._turns.wait(more)
        while given < len(job.pieces):
            given += 1
            yield job.pieces[given - 1]
            self._turns.wait(more)
        self._outcome()

    def result(self) -> Result:
        """Waits for the end.

        Raises:
            BackendError: the engine failed, or the generator was closed.
            Exception: whatever the request's own `on_progress` raised.
        """
        self._turns.wait(lambda: self._job.ended)
        return self._outcome()

    def _outcome(self) -> Result:
        # An error refers to the frames that it passes, and those to this handle: the finalizer,
        # which refers to the job and so to its error, would keep them all for ever.
        self._finalizer.detach()
        return self._job.result()

    def cancel(self) -> None:
        """Ends the request where it is; what it has is its result. A second call does nothing."""
        self._turns.cancel(self._job)
