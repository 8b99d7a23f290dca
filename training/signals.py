"""Turns SIGTERM and SIGUSR1 into a request to stop after the current step.

Batch systems send SIGUSR1 shortly before a time limit. A second signal ends the process at once:
after the first one the default handlers are back. Python calls a handler only between two
instructions of the main thread, and one call of torch may take long, so until then a thread counts
the signals.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

_SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
_END = 0  # no signal has this number
_STATUS = 128  # plus the signal's number, as shells report it


@dataclass(slots=True)
class StopRequest:
    """True once this process was asked to stop; `name` is the signal's name."""

    name: str | None = None

    def __bool__(self) -> bool:
        return self.name is not None


@contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Records signals within the block and restores the previous handlers afterwards.

    Does nothing outside the main thread, where Python allows no handlers.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return

    def note(number: int, _: FrameType | None) -> None:
        request.name = signal.Signals(number).name
        for each in _SIGNALS:
            signal.signal(each, signal.SIG_DFL)

    with _second_signal_ends():
        before = {each: signal.signal(each, note) for each in _SIGNALS}
        try:
            yield request
        finally:
            for each, handler in before.items():
                signal.signal(each, handler)


@contextmanager
def _second_signal_ends() -> Iterator[None]:
    """Ends the process at the second signal that comes before the main thread notes the first."""
    source, sink = os.pipe()
    os.set_blocking(sink, False)  # as `set_wakeup_fd` requires

    def count() -> None:
        seen = 0
        while True:
            number = os.read(source, 1)[0]  # the C handler writes it at once
            if number == _END:
                return
            seen += number in _SIGNALS
            if seen == 2:
                os._exit(_STATUS + number)

    before = signal.set_wakeup_fd(sink, warn_on_full_buffer=False)
    watcher = threading.Thread(target=count, name="signals", daemon=True)
    watcher.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        os.write(sink, bytes([_END]))
        watcher.join()
        os.close(source)
        os.close(sink)
