"""Checks of keyword arguments that another function takes, before a cluster works on them."""

from collections.abc import Callable, Iterable
from inspect import Parameter, signature
from typing import Any

from perception_rt.errors import InputError


def keywords(function: Callable[..., Any]) -> set[str]:
    """Names of the optional arguments of a function, without private ones."""
    return {
        name
        for name, parameter in signature(function).parameters.items()
        if parameter.default is not Parameter.empty and not name.startswith("_")
    }


def check_names(what: str, names: Iterable[object], known: Iterable[str]) -> None:
    """Raises InputError, which lists the known names, unless all names are known."""
    known = sorted(known)
    unknown = [name for name in names if name not in known]
    if unknown:
        raise InputError(f"{what} has no {unknown[0]!r:.80}; known are {', '.join(known)}")
