"""Callers and their requests: callers wait, and a thread that lasts while there is work does it.

An interrupt may come between any two instructions of the main thread. So no caller ever steps the
scheduler, and what callers do under the lock is a look, an assignment or an append. Knows nothing
of models.
"""

import atexit
import os
import threading
import weakref
from _thread import start_new_thread
from collections.abc import Callable, Iterator
from contextlib import suppress

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.request_state import Job
from perception_rt.runtime.generation.scheduler import Scheduler
from perception_rt.runtime.request import Result

_LOOK_S = 0.2  # between two looks of a waiting thread at signals

# The thread must not be inside of an engine when the interpreter goes.
_open: "weakref.WeakSet[Turns]" = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for turns in list(_open):
        with suppress(BackendError):  # of a process that was forked
            turns.close(wake=False)


class Turns:
    """A scheduler, the one thread that steps it, and all who wait. Any thread may call it.

    The thread is started when there is a job and ends when there is none, so that a generator at
    rest can be dropped, forked, or left at exit.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # Only in a `with`: no interrupt comes between its taking a lock and its seeing to it that
        # it is given back. One can in a `Condition`, and so in an `Event` and in `Thread.start`.
        self._lock = threading.Lock()
        self._worker: int | None = None  # the thread that steps
        self._waiting: list[tuple[Callable[[], bool], threading.Lock]] = []
        self._closed = False
        self._process = os.getpid()
        _open.add(self)

    def submit(self, job: Job, *, wait: bool = False) -> None:
        """Adds a job, which moves on by itself from now on.

        Args:
            job: a new one.
            wait: waits until there is a place for it.

        Raises:
            CapacityError: too many wait already, or it is too large in any case.
            BackendError: as `check_open`.
        """
        while True:
            self._check_process()
            with self._lock:
                self.check_open()
                if not (wait and self._scheduler.full):
                    self._scheduler.submit(job)
                    break
            self._start()  # those before may lack it, if the interrupt was here
            self.wait(lambda: not self._scheduler.full)
        self._start()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready`, which all jobs are after `close`.

        Args:
            ready: looked at after each step, in the thread that steps; it must be quick. It may
                outlive this call if that is interrupted, until it is true.
        """
        self._check_thread()
        while not ready():
            bell = threading.Lock()
            bell.acquire()
            with self._lock:
                if ready():
                    return
                self._waiting.append((ready, bell))
            # Not for ever: of a signal that comes while Python is on its way into the wait, the
            # main thread learns when it is out again.
            while not bell.acquire(timeout=_LOOK_S):
                pass

    def close(self, *, wake: bool = True) -> None:
        """Fails every job, after the step that is under way; a second call does nothing.

        Args:
            wake: False if the interpreter is about to go. Those who wait are daemon threads then,
                and had better go with it than tell of an error.
        """
        self._check_thread()
        with self._lock:
            self._closed = True
            if not wake:
                self._waiting = []
        try:
            self._start()
        except BackendError:
            self._goes_on()  # here then: nobody will step any more
        self.wait(lambda: self._worker is None and not self._scheduler.jobs)

    def check_open(self) -> None:
        """BackendError in a process that was forked, and after `close`."""
        self._check_process()
        if self._closed:
            raise BackendError("this generator is closed")

    def check_place(self) -> None:
        """What `submit` would raise for any job."""
        self.check_open()
        self._scheduler.check_place()

    def _start(self) -> None:
        """Makes sure that there is a thread if there are jobs; a second one would end at once."""
        if self._worker is None and self._scheduler.jobs:
            try:
                start_new_thread(self._work, ())
            except RuntimeError:  # there are too many, or the interpreter is going
                raise BackendError("no thread can be started to work on requests") from None

    def _work(self) -> None:
        with self._lock:
            if self._worker is not None:
                return
            self._worker = threading.get_ident()
        while self._goes_on():
            try:
                self._scheduler.step()
            except BaseException as error:  # a mistake of ours: nobody may be left waiting
                self._scheduler.close(error)

    def _goes_on(self) -> bool:
        """Whether there is another step to do; lets go of those who have what they wait for."""
        with self._lock:
            if self._closed:
                self._scheduler.close(BackendError("the generator was closed"))
            working = bool(self._scheduler.jobs)
            if not working:
                self._worker = None
            waiting, self._waiting = self._waiting, []
            for ready, bell in waiting:
                if ready():
                    bell.release()
                else:
                    self._waiting.append((ready, bell))
            return working

    def _check_thread(self) -> None:
        self._check_process()
        if self._worker == threading.get_ident():
            raise BackendError("on_progress cannot wait for the generator that calls it")

    def _check_process(self) -> None:
        if os.getpid() != self._process:
            raise BackendError("this generator belongs to another process: load it after a fork")


class Handle:
    """A request that was submitted. Iterating gives its text as it grows, in whole characters.

    It moves on by itself, and its text is kept until it is read. A handle that is dropped before
    the end cancels its request.
    """

    def __init__(self, turns: Turns, job: Job) -> None:
        self._turns = turns
        self._job = job
        self._finalizer = weakref.finalize(self, _cancel, job)
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
        job = self._job  # who waits must not hold the handle
        self._turns.wait(lambda: job.ended)
        return self._outcome()

    def _outcome(self) -> Result:
        # An error refers to the frames that it passes, and those to this handle: the finalizer,
        # which refers to the job and so to its error, would keep them all for ever.
        self._finalizer.detach()
        return self._job.result()

    def cancel(self) -> None:
        """Ends the request before its next step; what it has by then is its result.

        A second call, or one after the end, does nothing.
        """
        _cancel(self._job)


def _cancel(job: Job) -> None:
    """Takes no lock: a finalizer may run anywhere, also where one is taken."""
    job.cancelled = True
