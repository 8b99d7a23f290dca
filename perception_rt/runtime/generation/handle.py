"""The caller's side of a submitted request: its text as it grows, its result, cancellation."""

import weakref
from collections.abc import Iterator
from typing import NoReturn, SupportsIndex

from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.generation.worker import SchedulerThread
from perception_rt.runtime.request import Result
from perception_rt.runtime.session import NotCopiedError


class Handle:
    """A submitted request; iterating yields its text as it grows, in whole characters.

    The request advances by itself, and its text is kept until it is read. Dropping the handle
    before the end cancels the request.
    """

    def __init__(self, thread: SchedulerThread, state: RequestState) -> None:
        self._thread = thread
        self._state = state
        self._finalizer = weakref.finalize(self, state.cancel)
        self._finalizer.atexit = False

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        """Refuses to be pickled or copied, with a BackendError that is a TypeError too."""
        raise NotCopiedError(
            "a Handle cannot be pickled or copied, since its request runs in this process. Pass "
            "what result() returns instead"
        )

    @property
    def done(self) -> bool:
        """Whether the request has ended, so that `result` returns at once."""
        return self._state.ended

    def __iter__(self) -> Iterator[str]:
        """Yields pieces of text from the beginning, then raises the request's error if any."""
        state, given = self._state, 0

        def more() -> bool:
            return state.ended or len(state.pieces) > given

        self._thread.wait(more)
        while given < len(state.pieces):
            given += 1
            yield state.pieces[given - 1]
            self._thread.wait(more)
        self._outcome()

    def result(self) -> Result:
        """Waits for the end and returns the result.

        Raises:
            BackendError: the engine failed, or the generator was closed.
            Exception: whatever the request's own `on_progress` raised.
        """
        state = self._state  # a waiting thread must not keep the handle alive
        self._thread.wait(lambda: state.ended)
        return self._outcome()

    def cancel(self) -> None:
        """Ends the request before its next step; the tokens so far become its result.

        A second call, or one after the end, does nothing.
        """
        self._state.cancel()

    def _outcome(self) -> Result:
        # An error refers to the frames that it passes, and through them to this handle. The
        # finalizer refers to the request and its error, and would keep them all alive.
        self._finalizer.detach()
        return self._state.result()
