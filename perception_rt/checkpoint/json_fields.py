"""Checks of fields of other libraries' configuration files; errors name the field and its value."""

from collections.abc import Collection, Mapping
from typing import Any

from perception_rt.errors import InputError, describe


def as_object(value: object, name: str) -> Mapping[str, Any]:
    """Returns the value; InputError unless it is a JSON object."""
    if not isinstance(value, Mapping):
        raise InputError(f"{name} must be an object, not {shown(value)}")
    return value


def refuse_unknown(data: Mapping[str, Any], known: Collection[str], where: str = "") -> None:
    """InputError that names the fields of an object that are not known."""
    unknown = sorted(f"{where}{key:.60}" for key in data if key not in known)
    if unknown:
        raise InputError(f"unknown fields {', '.join(unknown)}; known are {', '.join(known)}")


def check_fixed(data: Mapping[str, Any], fixed: Mapping[str, Any], where: str = "") -> None:
    """InputError if a field is there with another value than the one that is supported."""
    for key, only in fixed.items():
        value = data.get(key, only)
        if value != only or isinstance(value, bool) != isinstance(only, bool):
            raise InputError(f"{where}{key} must be {shown(only)}, not {shown(value)}")


def square_side(size: object, name: str) -> int:
    """Returns the side of a square that is given as a side or as [height, width]."""
    sides: list[Any] = list(size) if isinstance(size, list | tuple) else [size]
    if not 1 <= len(sides) <= 2 or any(type(side) is not int for side in sides):
        raise InputError(f"{name} must be a side or [height, width], not {shown(size)}")
    if sides[0] != sides[-1]:
        raise InputError(f"{name} must be a square, not {sides[0]}x{sides[-1]}")
    return int(sides[0])


def shown(value: object) -> str:
    """A value of a JSON file, for a message."""
    if value is None or isinstance(value, str | list | tuple):
        return f"{value!a:.60}"
    return describe(value)
