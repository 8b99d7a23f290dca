"""A dictionary with a bound in bytes that drops its least recently used entries."""

from typing import Generic, Protocol, TypeVar


class HasBytes(Protocol):
    """A value that knows its size."""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""


_V = TypeVar("_V", bound=HasBytes)


class ByteLru(Generic[_V]):
    """Entries by name, at most `max_bytes` together. Not thread-safe.

    Attributes:
        max_bytes: bound on the bytes of all values.
        nbytes: bytes of all values.
    """

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.nbytes = 0
        self._entries: dict[str, _V] = {}  # least recently used first

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def items(self) -> list[tuple[str, _V]]:
        """Returns a copy of all entries, least recently used first."""
        return list(self._entries.items())

    def get(self, name: str) -> _V | None:
        """Returns an entry and marks it as used; None if there is none."""
        value = self._entries.pop(name, None)
        if value is not None:
            self._entries[name] = value
        return value

    def put(self, name: str, value: _V) -> None:
        """Adds or replaces an entry, which alone must fit, and drops others to make room."""
        self.remove(name)
        self.make_room(value.nbytes)
        self._entries[name] = value
        self.nbytes += value.nbytes

    def remove(self, name: str) -> None:
        """Removes an entry if it is there."""
        value = self._entries.pop(name, None)
        if value is not None:
            self.nbytes -= value.nbytes

    def make_room(self, size: int) -> None:
        """Drops least recently used entries until `size` more bytes fit."""
        while self.nbytes + size > self.max_bytes:
            self.remove(next(iter(self._entries)))
