"""Progress of a command on standard error, once it has taken a second."""

import sys
import threading
import time
from collections.abc import Callable
from types import TracebackType

_QUIET_S = 1.0
_TERMINAL_S = 0.2
_LOG_S = 5.0


class Progress:
    """Says what a command is doing: one line, rewritten on a terminal; else a line now and then.

    A thread of its own shows it, so that a single long step is seen too.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._terminal = sys.stderr.isatty()
        self._line = ""
        self._shown = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show, daemon=True)

    def step(self, line: str) -> None:
        """Says what is being done now."""
        self._line = line

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A callback for the numbers done and in all."""
        return lambda done, total: self.step(f"{done} of {total} {what}")

    def stop(self) -> None:
        """Shows nothing from now on; what follows has the line to itself. May be called again."""
        self._done.set()
        self._thread.join()
        if self._terminal and self._shown:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
            self._shown = ""

    def __enter__(self) -> "Progress":
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.stop()

    def _show(self) -> None:
        wait = _QUIET_S
        while not self._done.wait(wait):
            wait = _TERMINAL_S if self._terminal else _LOG_S
            line = self._line
            elapsed = time.monotonic() - self._start
            if self._terminal:
                text = f"\r\x1b[K{elapsed:6.1f} s  {line}"
                print(text, end="", file=sys.stderr, flush=True)
            elif line != self._shown:
                print(f"{elapsed:6.1f} s  {line}", file=sys.stderr, flush=True)
            self._shown = line
