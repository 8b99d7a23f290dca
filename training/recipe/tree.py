"""Builds dataclasses from YAML and `key.path=value` overrides; errors name the key's full path.

Knows nothing of training. Architectures are checked by their own `from_dict`.
"""

import copy
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from perception_rt.archs import get_config
from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.plm_config import PlmConfig
from perception_rt.records import check_value, require

_ARCHITECTURES: tuple[Any, ...] = (PeConfig, PlmConfig)

T = TypeVar("T")


def read_recipe(recipe: Path) -> dict[str, Any]:
    """Reads the mapping in a YAML file; InputError if the file has none."""
    try:
        tree = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"recipe {recipe}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"recipe {recipe} is not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = "" if mark is None else f" at line {mark.line + 1}"
        raise InputError(f"recipe {recipe} is not valid YAML{where}") from None
    if not isinstance(tree, dict):
        raise InputError(f"recipe {recipe} must be a mapping, not {type(tree).__name__}")
    return tree


def build(cls: type[T], tree: Mapping[str, Any], overrides: Sequence[str] = ()) -> T:
    """Builds a dataclass from plain values, after applying overrides in order.

    Args:
        cls: dataclass to build.
        tree: plain values by key.
        overrides: `key.path=value` strings.

    Raises:
        InputError: a key, a type or a value is wrong.
    """
    values = copy.deepcopy(dict(tree))
    for override in overrides:
        _override(cls, values, override)
    record: T = _build(cls, values, "")
    return record


def leaves(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields all (`a.b.c`, value) of a nested mapping, in order."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _override(cls: type, tree: dict[str, Any], override: str) -> None:
    """Applies one `key.path=value`; the field's annotation decides the value's type."""
    path, equals, text = override.partition("=")
    if not equals:
        raise InputError(f"--set {override!r:.80} must be key.path=value")
    *parents, last = path.split(".")
    declared: Any = cls
    node = tree
    for depth, name in enumerate([*parents, last]):
        where = ".".join([*parents, last][: depth + 1])
        declared = _declared(declared, name)
        if declared is None:
            raise InputError(f"--set {path}: unknown key {where!r:.80}")
        if depth < len(parents):
            child = node.get(name)
            node[name] = child if isinstance(child, dict) else {}
            node = node[name]
    if declared is not Any and (_record_of(declared) or get_origin(declared) is dict):
        raise InputError(f"--set {path}: {path} is a section, not a value")
    node[last] = _parse(text, declared, path)


def _declared(declared: Any, name: str) -> Any:
    """Annotation of a key in a section; None if the section has no such key."""
    if declared is Any or declared in _ARCHITECTURES:
        return Any  # the architecture's own `from_dict` checks its keys
    if get_origin(declared) is dict:
        return get_args(declared)[1]
    record = _record_of(declared)
    return None if record is None else get_type_hints(record).get(name)


def _record_of(declared: Any) -> type | None:
    """Dataclass named by an annotation, also within `X | None`; None for scalars."""
    options = [o for o in _options(declared) if isinstance(o, type) and is_dataclass(o)]
    return options[0] if options else None


def _options(declared: Any) -> tuple[Any, ...]:
    """Members of a union, or the annotation alone."""
    if get_origin(declared) in (Union, types.UnionType):
        return get_args(declared)
    return (declared,)


def _parse(text: str, declared: Any, where: str) -> Any:
    """Converts command line text to the declared type; commas separate list entries."""
    if declared is Any:
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError:
            raise InputError(f"--set {where} is not a value: {text!r:.60}") from None
        require(not isinstance(value, dict), f"--set {where} must be a value, not a mapping")
        return value
    if get_origin(declared) is tuple:
        item = get_args(declared)[0]
        return [_parse(part, item, where) for part in text.split(",") if part]
    options = _options(declared)
    if type(None) in options and text == "null":
        return None
    for option in options:
        if option is str or get_origin(option) is Literal:
            return text
        if option is bool and text in ("true", "false"):
            return text == "true"
        if option in (int, float):
            try:
                return option(text)
            except ValueError:
                continue
    raise InputError(f"--set {where} must be {_type_names(options)}, not {text!r:.60}")


def _type_names(options: Sequence[Any]) -> str:
    special = {bool: "true or false", type(None): "null"}
    return " or ".join(special.get(option, str(option.__name__)) for option in options)


def _build(cls: type, data: Any, where: str) -> Any:
    if cls in _ARCHITECTURES:
        return _architecture(cls, data, where)
    if not isinstance(data, Mapping):
        raise InputError(f"{where or 'recipe'} must be a mapping, not {type(data).__name__}")
    prefix = f"{where}." if where else ""
    known = {f.name: f for f in fields(cls)}
    for key in data:
        if key not in known:
            raise InputError(f"unknown key '{prefix}{key}'; known are {', '.join(known)}")
    for name, field in known.items():
        if field.default is MISSING and field.default_factory is MISSING and name not in data:
            raise InputError(f"missing key '{prefix}{name}'")
    hints = get_type_hints(cls)
    values = {n: _value(data[n], hints[n], f"{prefix}{n}") for n in known if n in data}
    return cls(**values)


def _architecture(cls: Any, data: Any, where: str) -> Any:
    """Builds an architecture from all its values, or from a released one's `name` and changes."""
    if isinstance(data, Mapping) and "name" in data:
        require(isinstance(data["name"], str), f"{where}.name must be a string")
        named = get_config(data["name"])
        if not isinstance(named, cls):
            raise InputError(f"{where}.name {data['name']} is of another family than this task")
        changes = {key: value for key, value in data.items() if key != "name"}
        data = _merged(named.to_dict(), changes)
    try:
        return cls.from_dict(data)
    except InputError as error:
        raise InputError(f"{where}: {error}") from None


def _merged(values: dict[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tree with some leaves changed."""
    merged = dict(values)
    for key, change in changes.items():
        both = isinstance(change, Mapping) and isinstance(values.get(key), dict)
        merged[key] = _merged(values[key], change) if both else change
    return merged


def _value(value: Any, declared: Any, where: str) -> Any:
    """Checks a value against its annotation; an int is accepted where a float is declared."""
    record = _record_of(declared)
    if record is not None:
        absent = value is None and type(None) in _options(declared)
        return None if absent else _build(record, value, where)
    if get_origin(declared) is tuple:
        require(isinstance(value, list | tuple), f"{where} must be a list")
        item = get_args(declared)[0]
        return tuple(_value(entry, item, f"{where}[{i}]") for i, entry in enumerate(value))
    if get_origin(declared) is dict:
        require(isinstance(value, Mapping), f"{where} must be a mapping")
        item = get_args(declared)[1]
        return {str(key): _value(entry, item, f"{where}.{key}") for key, entry in value.items()}
    if type(value) is float:
        require(math.isfinite(value), f"{where} must be finite, not {value}")
    return check_value(where, value, declared)
