"""Describes the commands and the public names of perception_rt as plain data.

`python tests/compatibility/public_interface.py` writes the two lists that
`test_public_interface.py` compares with. They are those of commit 41f3a48: rewriting them allows
programs of users to break, so it belongs to a major version.
"""

import argparse
import inspect
import json
from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import perception_rt
from perception_rt.cli.commands import export_parser, main_parser

FOLDER = Path(__file__).parent


def commands() -> dict[str, dict[str, Any]]:
    """Command line -> option or position of an argument -> how it parses."""
    found = {"perception-export": _arguments(export_parser()), "perception-rt": {}}
    for name, parser in _subcommands(main_parser()):
        found[f"perception-rt {name}"] = _arguments(parser)
    found["perception-rt"] = _arguments(main_parser())
    return found


def _subcommands(parser: argparse.ArgumentParser) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    for action in parser._actions:  # argparse has no public list
        if isinstance(action, argparse._SubParsersAction):
            yield from action.choices.items()


def _arguments(parser: argparse.ArgumentParser) -> dict[str, Any]:
    exclusive = [
        {option for action in group._group_actions for option in action.option_strings}
        for group in parser._mutually_exclusive_groups
    ]
    required = {
        option
        for group, options in zip(parser._mutually_exclusive_groups, exclusive, strict=True)
        for option in options
        if group.required
    }
    found: dict[str, Any] = {}
    positions = 0
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            continue
        names = list(action.option_strings)
        if not names:
            names = [f"position {positions}"]
            positions += 1
        for name in names:
            found[name] = {
                "action": type(action).__name__.strip("_"),
                "choices": None if action.choices is None else [str(c) for c in action.choices],
                "default": _plain(action.default),
                "dest": action.dest,
                "excludes": sorted(
                    {o for options in exclusive if name in options for o in options} - {name}
                ),
                "nargs": action.nargs,
                "required": action.required,
                "required_group": name in required,
                "type": None if action.type is None else getattr(action.type, "__name__", "?"),
            }
    return found


def names() -> dict[str, Any]:
    """Public name -> fields, signatures, methods and base classes that programs rely on."""
    return {name: _described(getattr(perception_rt, name)) for name in perception_rt.__all__}


def _described(value: Any) -> dict[str, Any]:
    if not inspect.isclass(value):
        parameters = {"parameters": _parameters(value)} if callable(value) else {}
        return {"kind": "function" if callable(value) else type(value).__name__, **parameters}
    found: dict[str, Any] = {
        "kind": "class",
        "bases": [base.__name__ for base in value.__mro__[1:-1]],
        "members": {name: _member(value, name) for name in dir(value) if name[0] != "_"},
    }
    if is_dataclass(value):
        # Users call only constructors of dataclasses; the library makes the other objects.
        found["fields"] = [field.name for field in fields(value)]
        found["parameters"] = _parameters(value)
    special = ("__enter__", "__exit__", "__iter__")
    found["special"] = [name for name in special if hasattr(value, name)]
    return found


def _member(owner: type, name: str) -> dict[str, Any]:
    value = inspect.getattr_static(owner, name)
    if isinstance(value, classmethod | staticmethod):
        return {"kind": type(value).__name__, "parameters": _parameters(getattr(owner, name))}
    if inspect.isfunction(value):
        return {"kind": "method", "parameters": _parameters(value)}
    return {"kind": "attribute"}  # properties and slots read alike


def _parameters(function: Any) -> list[dict[str, Any]]:
    return [
        {
            "name": parameter.name,
            "kind": parameter.kind.name,
            "optional": parameter.default is not parameter.empty,
            "default": None if parameter.default is parameter.empty else _plain(parameter.default),
        }
        for parameter in inspect.signature(function).parameters.values()
    ]


def _plain(value: Any) -> Any:
    """Returns a JSON value; other objects are described by their type."""
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__name__


def write(folder: Path) -> None:
    """Writes both lists, one argument or member a line."""
    for name, content in (("commands", commands()), ("names", names())):
        entries = [f"{json.dumps(key)}: {_lines(value)}" for key, value in sorted(content.items())]
        text = "{{\n{}\n}}\n".format(",\n".join(entries))
        (folder / f"{name}.json").write_text(text, "utf-8")


def _lines(value: dict[str, Any]) -> str:
    parts = [f"  {json.dumps(key)}: {json.dumps(item)}" for key, item in value.items()]
    return "{{\n{}\n}}".format(",\n".join(parts))


if __name__ == "__main__":
    write(FOLDER)
