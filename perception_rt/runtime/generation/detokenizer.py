"""Text of a growing number of bytes: whole characters at once, and never a part of a stop string.

Knows nothing of tokens: bytes come in, in pieces of any size, and text that is final goes out.
"""

import codecs
from collections.abc import Sequence


class TextStream:
    """UTF-8 bytes to text that will not change any more.

    Bytes that are not UTF-8 become U+FFFD, as `bytes.decode(errors="replace")` does it.

    Attributes:
        stopped: whether a stop string was met. What comes before it has been given out, and
            nothing else will be.
    """

    def __init__(self, stop: Sequence[str] = (), *, prefix: bytes = b"") -> None:
        """An empty text.

        Args:
            stop: strings that end the text and do not belong to it.
            prefix: bytes that are left out where the text begins with them.
        """
        self.stopped = False
        self._prefix = prefix
        self._first = b""
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, data: bytes) -> str:
        """Takes the next bytes; gives the text that they complete, often none."""
        if self._prefix:
            self._first += data
            if len(self._first) < len(self._prefix) and self._prefix.startswith(self._first):
                return ""
            data, self._prefix = self._first.removeprefix(self._prefix), b""
        return self._release(self._decoder.decode(data))

    def finish(self) -> str:
        """The rest, with U+FFFD for a character that was cut off."""
        rest = self._first if self._prefix else b""
        text = self._release(self._decoder.decode(rest, final=True))
        held, self._held = self._held, ""
        return text + held

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        text = self._held + text
        # Where each ends and begins: the first to be whole counts, however the bytes were cut.
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
    """Length of the longest end of `text` that `stop` begins with, less than all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
