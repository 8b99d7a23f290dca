"""Signals that ask a run to end: SIGTERM, and SIGUSR1 as batch systems send it before a limit.

The first one is noted, and the loop ends after its step; from then on signals do what they do by
default, so a second one ends the process at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass(slots=True)
class StopRequest:
    """Whether this process was asked to end, and the name of the signal that did."""

    name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Notes signals in the block; the handlers from before are back after it.

    Outside the main thread, where Python allows no handlers, nothing is ever requested.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    before = {each: signal.signal(each, note) for each in _SIGNALS}
    try:
        yield request
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
