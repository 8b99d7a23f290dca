"""Shows a command's progress on standard error, after one second."""

import sys
import threading
import time
from collections.abc import Callable
from typing import Self

QUIET_S = 1.0  # before the first line
TERMINAL_S = 0.2  # between updates on a terminal
LOG_S = 5.0  # between lines elsewhere
THREAD_NAME = "perception-rt-progress"


class Progress:
    """Shows the current step of a command: one line that a terminal updates, else a line at times.

    A thread shows it, so that a single long step is visible too.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._line = ""
        self._shown = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show, name=THREAD_NAME, daemon=True)

    def step(self, line: str) -> None:
        """Sets the current step."""
        self._line = line

    def counter(self, noun: str) -> Callable[[int, int], None]:
        """Returns a callback that takes the number done and the total."""
        return lambda done, total: self.step(f"{done} of {total} {noun}")

    def stop(self) -> None:
        """Clears the line and shows nothing more; a second call does nothing."""
        self._done.set()
        self._thread.join()
        if self._terminal and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = ""

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _show(self) -> None:
        wait = QUIET_S
        while not self._done.wait(wait):
            wait = TERMINAL_S if self._terminal else LOG_S
            line = self._line
            elapsed = time.monotonic() - self._start
            if self._terminal:
                text = f"\r\x1b[K{elapsed:6.1f} s  {line}"
                print(text, end="", file=sys.stderr, flush=True)
            elif line != self._shown:
                print(f"{elapsed:6.1f} s  {line}", file=sys.stderr, flush=True)
            self._shown = line
