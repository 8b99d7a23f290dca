"""Bytes to text as they arrive: whole characters at once, and never part of a stop string.

Knows nothing of tokens: it takes bytes in pieces of any size and gives text that is final.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """Decodes growing UTF-8 into text that no later byte changes.

    Bytes that are not UTF-8 become U+FFFD, as in `bytes.decode(errors="replace")`.

    Attributes:
        stopped: whether a stop string was found. All text before it was given, and no more comes.
    """

    def __init__(self, stop: Sequence[str] = (), *, prefix: bytes = b"") -> None:
        """Creates an empty text.

        Args:
            stop: strings that end the text and are not part of it.
            prefix: bytes to leave out at the beginning, if they are there.
        """
        self.stopped = False
        self._prefix = prefix
        self._first = b""
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Takes the next bytes; returns the text that they complete, often none."""
        if self._prefix:
            self._first += data
            if len(self._first) < len(self._prefix) and self._prefix.startswith(self._first):
                return ""
            data, self._prefix = self._first.removeprefix(self._prefix), b""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """Returns the rest, with U+FFFD for an incomplete character."""
        rest = self._first if self._prefix else b""
        text = self._release(self._decoder.decode(rest, final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # By end, then start: the stop string that is complete first counts, whatever the pieces.
        found = [(text.find(stop) + len(stop), text.find(stop)) for stop in self._stop]
        found = [(end, start) for end, start in found if start >= 0]
        if found:
            self.stopped = True
            self._held = ""
            return text[: min(found)[1]]
        keep = max((_overlap(text, stop) for stop in self._stop), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest proper prefix of `stop` that `text` ends with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
