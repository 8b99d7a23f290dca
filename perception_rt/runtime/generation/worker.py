"""The thread that steps a scheduler, and the callers that wait for it.

An interrupt may come between any two instructions of the main thread. So callers never step the
scheduler; under the lock they only read, assign or append. Knows nothing of models.
"""

import os
import threading
import weakref
from _thread import start_new_thread
from collections.abc import Callable
from contextlib import suppress

from perception_rt.errors import BackendError
from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.generation.scheduler import Scheduler
from perception_rt.runtime.native_calls import before_exit, check_process, hold_at_exit

_LOOK_S = 0.2  # how often a waiting thread looks for signals

_open: "weakref.WeakSet[SchedulerThread]" = weakref.WeakSet()


def _close_all() -> None:
    for thread in list(_open):
        with suppress(BackendError):  # in a forked process
            thread.close(wake=False)


before_exit(_close_all)


class SchedulerThread:
    """A scheduler, the one thread that steps it, and the threads that wait. Thread-safe.

    The thread starts with the first request and ends with the last, so an idle generator can be
    dropped, forked, or left open at exit.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        # Used only by `with`, which an interrupt cannot enter without releasing it. A `Condition`,
        # and so an `Event` and `Thread.start`, could stay locked.
        self._lock = threading.Lock()
        self._worker: int | None = None  # id of the thread that steps
        self._waiting: list[tuple[Callable[[], bool], threading.Lock]] = []
        self._closed = False
        self._process = os.getpid()
        _open.add(self)

    def submit(self, request: RequestState, *, wait: bool = False) -> None:
        """Queues a request, which then advances by itself.

        Args:
            request: a new request.
            wait: whether to wait for a place in the queue.

        Raises:
            CapacityError: the queue is full, or the request can never fit.
            BackendError: as `check_open`.
        """
        while True:
            self.check_open()
            with self._lock:
                if not (self._closed or (wait and self._scheduler.full)):
                    self._scheduler.submit(request)
                    break
            self._start()  # an earlier submit may have been interrupted before it started one
            self.wait(lambda: self._closed or not self._scheduler.full)
        self._start()

    def wait(self, ready: Callable[[], bool]) -> None:
        """Waits until `ready()`, which must hold for every request after `close`.

        Args:
            ready: called after each step in the stepping thread; must be quick. If this call is
                interrupted, it is still called until it returns True.
        """
        self._check_thread()
        while not ready():
            bell = threading.Lock()
            bell.acquire()
            with self._lock:
                if ready():
                    return
                self._waiting.append((ready, bell))
            # With a timeout: the main thread handles a signal that came just before the wait only
            # after it.
            while not bell.acquire(timeout=_LOOK_S):
                pass

    def close(self, *, wake: bool = True) -> None:
        """Fails every request after the current step; a second call does nothing.

        Args:
            wake: False at interpreter exit: waiting daemon threads then end without an error.
        """
        self._check_thread()
        with self._lock:
            self._closed = True
            if not wake:
                self._waiting = []
        try:
            self._start()
        except BackendError:
            self._goes_on()  # in this thread, since no other will step
        self.wait(lambda: self._worker is None and not self._scheduler.requests)

    def check_open(self) -> None:
        """BackendError in a forked process and after `close`."""
        check_process(self._process)
        if self._closed:
            hold_at_exit()  # a daemon thread then ends without an error
            raise BackendError("this generator is closed")

    def check_queue(self) -> None:
        """BackendError as `check_open`; CapacityError if the queue is full."""
        self.check_open()
        self._scheduler.check_queue()

    def _start(self) -> None:
        """Starts a thread if there are requests and none runs; a second one ends at once."""
        if self._worker is None and self._scheduler.requests:
            try:
                start_new_thread(self._work, ())
            except RuntimeError:  # too many threads, or interpreter exit
                raise BackendError("no thread can be started to work on requests") from None

    def _work(self) -> None:
        with self._lock:
            if self._worker is not None:
                return
            self._worker = threading.get_ident()
        while self._goes_on():
            try:
                self._scheduler.step()
            except BaseException as error:  # a mistake of ours: no caller may wait for ever
                self._scheduler.close(error)

    def _goes_on(self) -> bool:
        """Wakes callers whose condition holds; returns whether there is another step to do."""
        with self._lock:
            if self._closed:
                self._scheduler.close(BackendError("the generator was closed"))
            working = bool(self._scheduler.requests)
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
        check_process(self._process)
        if self._worker == threading.get_ident():
            raise BackendError("on_progress cannot wait for the generator that calls it")
