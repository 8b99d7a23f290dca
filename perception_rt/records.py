"""Strict checks of values from users and files, and records that are read from plain values."""

from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from numbers import Integral, Real
from types import NoneType, UnionType
from typing import Any, ClassVar, Literal, Self, Union, get_args, get_origin

from perception_rt.errors import InputError, describe

INTEGER_BOUND = 2**63
_MAX_NUMBER = 2**24  # in a record; the released models stay below 2**17


def require(condition: bool, message: str) -> None:
    """Raises InputError with this message unless a condition holds."""
    if not condition:
        raise InputError(message)


def plain_number(value: Any) -> Any:
    """Returns a number as an int or a float, such as one of NumPy's; another value as it is."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Integral):
        return int(value)
    try:
        return float(value) if isinstance(value, Real) else value
    except OverflowError:  # a fraction that no float can hold
        return value


def check_integer(name: str, value: object, least: int, most: int = INTEGER_BOUND - 1) -> int:
    """Returns a value as an int.

    Raises:
        InputError: it is not an integer, such as a bool, or is not from `least` to `most`.
    """
    number = plain_number(value)
    if type(number) is not int or not least <= number <= most:
        bounds = f"of at least {least}" if most == INTEGER_BOUND - 1 else f"from {least} to {most}"
        raise InputError(f"{name} must be an integer {bounds}, not {describe(number)}")
    return number


def check_choice(name: str, value: object, choices: Iterable[object]) -> None:
    """Raises InputError unless a value is one of `choices`, of the same type."""
    known = list(choices)
    if not any(type(value) is type(choice) and value == choice for choice in known):
        shown = f"{value!r:.60}" if isinstance(value, str) else describe(value)
        raise InputError(f"{name} must be one of {known}, not {shown}")


def check_text(name: str, text: object, most_bytes: int) -> None:
    """Raises InputError unless a value is a string of at most `most_bytes` bytes in UTF-8."""
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string, not {describe(text)}")
    size = len(text.encode("utf-8", errors="surrogatepass"))
    if size > most_bytes:
        raise InputError(f"{name} has {size} bytes in UTF-8; the limit is {most_bytes}")


def check_value(name: str, value: Any, declared: Any, most: float = INTEGER_BOUND) -> Any:
    """Checks a plain value against the annotation of a record's field.

    Args:
        name: the field's name, for errors.
        value: an int is accepted for a float, and a list for a tuple.
        declared: bool, int, float, str, None, a union of these, a Literal or a tuple.
        most: bound on the magnitude of a number.

    Returns:
        The value, of the declared type.

    Raises:
        InputError: names the field, and the value or its type.
    """
    origin, arguments = get_origin(declared), get_args(declared)
    if origin is Literal:
        check_choice(name, value, arguments)
        return value
    if origin in (Union, UnionType) and isinstance(value, list | tuple):
        # A list is meant for the tuple among the options.
        tuples = [option for option in arguments if get_origin(option) is tuple]
        if tuples:
            return check_value(name, value, tuples[0], most)
    if origin is tuple and arguments[1:] == (Ellipsis,):
        if not isinstance(value, list | tuple):
            raise InputError(f"{name} must be a list, not {describe(value)}")
        return tuple(
            check_value(f"{name}[{index}]", item, arguments[0], most)
            for index, item in enumerate(value)
        )
    if origin is tuple:
        if not isinstance(value, list | tuple) or len(value) != len(arguments):
            raise InputError(
                f"{name} must be a list of {len(arguments)} numbers, not {describe(value)}"
            )
        return tuple(
            check_value(f"{name}[{index}]", item, kind, most)
            for index, (item, kind) in enumerate(zip(value, arguments, strict=True))
        )
    options = arguments if origin in (Union, UnionType) else (declared,)
    accepted = (*options, int) if float in options else options
    if type(value) not in accepted:
        names = " or ".join("null" if o is NoneType else o.__name__ for o in options)
        raise InputError(f"{name} must be {names}, not {type(value).__name__}")
    if type(value) in (int, float) and not abs(value) <= most:  # neither is NaN
        raise InputError(f"{name} must be a number of at most {most:g}")
    return float(value) if type(value) is int and int not in options else value


class Record:
    """A frozen dataclass that converts strictly from and to a dictionary of plain JSON values."""

    __slots__ = ()
    record_name: ClassVar[str] = "config"
    # Fields that `to_dict` leaves out at their default: records without them keep their old form.
    later_fields: ClassVar[frozenset[str]] = frozenset()

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], where: str | None = None) -> Self:
        """Builds the record from plain values.

        Args:
            data: a value for each field that has no default; lists for tuples.
            where: name of the record in errors; None for `record_name`.

        Raises:
            InputError: names unknown, missing and mistyped keys.
        """
        where = where or cls.record_name
        if not isinstance(data, Mapping):
            raise InputError(f"{where} must be an object, not {type(data).__name__}")
        known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
        unknown = sorted(str(key) for key in data if key not in known)
        if unknown:
            raise InputError(f"{where}: unknown keys {unknown}; known are {sorted(known)}")
        missing = sorted(n for n, f in known.items() if f.default is MISSING and n not in data)
        if missing:
            raise InputError(f"{where}: missing keys {missing}")
        return cls(
            **{
                name: check_value(f"{where}.{name}", data[name], field.type, _MAX_NUMBER)
                for name, field in known.items()
                if name in data
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; tuples become lists, `later_fields` at their default are left out."""
        values = {
            f.name: getattr(self, f.name)
            for f in fields(self)  # type: ignore[arg-type]
            if f.name not in self.later_fields or getattr(self, f.name) != f.default
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
