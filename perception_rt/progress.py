"""Progress of a command on standard error, once it has taken a second."""

import sys
import time
from collections.abc import Callable
from types import TracebackType

_QUIET_S = 1.0
_EVERY_S = 0.2


class Progress:
    """One line that is rewritten on a terminal; whole lines, one per step, elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._shown = 0.0
        self._open = False

    def step(self, line: str) -> None:
        """Says what is being done now."""
        elapsed = time.monotonic() - self._start
        if sys.stderr.isatty():
            print(f"\r\x1b[K{elapsed:6.1f} s  {line}", end="", file=sys.stderr, flush=True)
            self._open = True
        elif elapsed >= _QUIET_S:
            print(f"{elapsed:6.1f} s  {line}", file=sys.stderr, flush=True)

    def counter(self, what: str) -> Callable[[int, int], None]:
        """A callback for the numbers done and in all."""

        def count(done: int, total: int) -> None:
            now = time.monotonic()
            if now - self._start >= _QUIET_S and (now - self._shown >= _EVERY_S or done == total):
                self._shown = now
                self.step(f"{done} of {total} {what}")

        return count

    def __enter__(self) -> "Progress":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._open:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)
