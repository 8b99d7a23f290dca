"""Shows a command's progress on standard error, after one second.

A terminal gets one line, cut to its width and updated in place; a dumb terminal, a file or a pipe
gets a line at times. No colour is used. With NO_COLOR, the line is erased by spaces instead of an
escape sequence.
"""

import os
import shutil
import sys
import threading
import time
import unicodedata
from collections.abc import Callable
from typing import Self, TextIO

from perception_rt.errors import escaped

QUIET_S = 1.0  # before the first line
TERMINAL_S = 0.2  # between updates on a terminal
LOG_S = 5.0  # between lines elsewhere
RATE_S = 0.3  # before the first rate of a count
THREAD_NAME = "perception-rt-progress"

_ERASE = "\r\x1b[K"
_CUT = "..."
_LEAST_COLUMNS = 11  # of a step, before its rate is cut


class Progress:
    """Shows the current step of a command: one line that a terminal updates, else a line at times.

    A thread shows it, so that a single long step is visible too.
    """

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._stream = sys.stderr  # None if the caller closed it
        self._terminal = is_terminal(self._stream)
        self._colors = not os.environ.get("NO_COLOR")
        self._line = ""
        self._rate: _Rate | None = None
        self._shown = ""
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._show, name=THREAD_NAME, daemon=True)

    def step(self, line: str) -> None:
        """Sets the current step."""
        self._line, self._rate = line, None

    def count(self, line: str, done: int, total: int | None = None) -> None:
        """Sets the current step, one of several like it; the display adds the rate.

        Args:
            line: describes the step.
            done: number of items that are finished.
            total: number of items, for the time that remains; None if it is unknown.
        """
        rate = self._rate
        if rate is None or done < rate.done or total != rate.total:
            rate = _Rate(done, total)
        rate.done, rate.now = done, time.monotonic()
        self._line, self._rate = line, rate

    def counter(self, noun: str) -> Callable[[int, int], None]:
        """Returns a callback that takes the number done and the total."""
        return lambda done, total: self.count(f"{done} of {total} {noun}", done, total)

    def stop(self) -> None:
        """Clears the line and shows nothing more; a second call does nothing."""
        self._done.set()
        self._thread.join()
        if self._terminal and self._shown:
            self._write(self._erased())
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
            rate, line = self._rate, escaped(self._line)
            elapsed = f"{time.monotonic() - self._start:6.1f} s  "
            speed = "" if rate is None else rate.text()
            text = f"{elapsed}{line}{speed}"
            if self._terminal:
                columns = _columns(self._stream) - 1  # a full line would wrap
                room = max(columns - len(elapsed) - len(speed), _LEAST_COLUMNS)
                text = cut(f"{elapsed}{cut(line, room)}{speed}", columns)
                self._write(self._erased() + text)
                self._shown = text
            elif line != self._shown:
                self._write(f"{text}\n")
                self._shown = line

    def _erased(self) -> str:
        """Moves to the start of an empty line."""
        return _ERASE if self._colors else f"\r{' ' * width(self._shown)}\r"

    def _write(self, text: str) -> None:
        if self._stream is None:
            return
        try:
            print(text, end="", file=self._stream, flush=True)
        except (OSError, ValueError):  # its reader left, or it was closed
            self._stream = None


class _Rate:
    """Items that are done, from the first that was counted."""

    def __init__(self, done: int, total: int | None) -> None:
        self.done = self._first = done
        self.total = total
        self.now = self._start = time.monotonic()

    def text(self) -> str:
        """Items per second, or seconds per item, and the remaining time; empty if unknown yet."""
        count, seconds = self.done - self._first, self.now - self._start
        if count <= 0 or seconds <= 0 or seconds < RATE_S:
            return ""
        rate = count / seconds
        shown = (
            f", {rate:,.{0 if rate >= 10 else 1}f}/s" if rate >= 1 else f", {1 / rate:.1f} s each"
        )
        if self.total is not None and self.done < self.total:
            shown += f", {duration((self.total - self.done) / rate)} left"
        return shown


def is_terminal(stream: TextIO | None) -> bool:
    """Whether a stream is a terminal that can go back to the start of a line."""
    return stream is not None and stream.isatty() and os.environ.get("TERM") != "dumb"


def duration(seconds: float) -> str:
    """Seconds as `42 s`, `3:05` or `1:02:03`."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    minutes, rest = divmod(whole, 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def width(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(map(_cells, text))


def cut(text: str, columns: int) -> str:
    """Shortens a text to a number of columns; dots show that something was left out."""
    if width(text) <= columns:
        return text
    room, kept = columns - len(_CUT), ""
    for character in text:
        room -= _cells(character)
        if room < 0:
            break
        kept += character
    return f"{kept}{_CUT}"[: max(columns, 0)]


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def _columns(stream: TextIO | None) -> int:
    """Width of a terminal, as it is now."""
    try:
        columns = 0 if stream is None else os.get_terminal_size(stream.fileno()).columns
    except (OSError, ValueError):  # not a file: a test, or a notebook
        columns = 0
    return columns or shutil.get_terminal_size().columns
