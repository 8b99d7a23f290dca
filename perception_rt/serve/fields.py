"""Takes the fields of a JSON object one by one, and refuses what nothing took."""

from collections.abc import Mapping
from typing import Any

from perception_rt.serve.failures import ApiError


class Fields:
    """The fields of an object that were not taken yet. A field that is null counts as missing."""

    def __init__(self, data: Mapping[str, Any]) -> None:
        self._data = {name: value for name, value in data.items() if value is not None}

    def take(self, name: str) -> Any:
        """Removes and returns a field; None if it is missing."""
        return self._data.pop(name, None)

    def flag(self, name: str) -> bool:
        """Takes true or false; False if it is missing."""
        value = self.take(name)
        if value is not None and type(value) is not bool:
            raise ApiError(400, f"{name} must be true or false", param=name)
        return bool(value)

    def one_of(self, *names: str) -> Any:
        """Takes the same value under several names; None if all are missing."""
        values = [value for name in names if (value := self.take(name)) is not None]
        if any(value != values[0] for value in values):
            raise ApiError(400, f"{' and '.join(names)} differ", param=names[0])
        return values[0] if values else None

    def texts(self, name: str, most: int) -> list[str]:
        """Takes a list of 1 to `most` strings, or one string as a list of one."""
        value = self.take(name)
        if isinstance(value, str):
            value = [value]
        if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
            raise ApiError(400, f"{name} must be a list of at least one string", param=name)
        if len(value) > most:
            raise ApiError(400, f"{name} has {len(value)} items; the limit is {most}", param=name)
        return value

    def ignore(self, *names: str) -> None:
        """Takes fields that have no effect here."""
        for name in names:
            self.take(name)

    def only(self, name: str, values: tuple[Any, ...]) -> None:
        """Takes a field that is supported with some values only, which change nothing."""
        value = self.take(name)
        if value is not None and value not in values:
            raise ApiError(400, f"this value of {name} is not supported", param=name)

    def finish(self, where: str = "") -> None:
        """ApiError if a field is left."""
        for name in self._data:
            raise ApiError(400, f"unknown field {where}{name[:80]}", param=name[:80])
