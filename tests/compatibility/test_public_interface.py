"""Commands and public names stay as they were at 41f3a48, but for additions."""

import copy
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import public_interface
import pytest

FOLDER = Path(__file__).parent
POSITIONAL = ("POSITIONAL_ONLY", "POSITIONAL_OR_KEYWORD")


def frozen(name: str) -> Any:
    return json.loads((FOLDER / f"{name}.json").read_text("utf-8"))


def broken_commands(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields each change by which a former command line may fail or get another meaning."""
    for command, arguments in before.items():
        if command not in now:
            yield f"{command} is gone"
            continue
        present = now[command]
        for name, argument in arguments.items():
            if name not in present:
                yield f"{command} {name} is gone"
            elif argument != (found := _without_additions(argument, present[name], arguments)):
                yield f"{command} {name} was {argument}, is {found}"
        for name in present.keys() - arguments.keys():
            if present[name]["required"] or present[name]["required_group"]:
                yield f"{command} {name} is new and required"


def _without_additions(
    before: dict[str, Any], now: dict[str, Any], arguments: dict[str, Any]
) -> dict[str, Any]:
    found = dict(now, excludes=[name for name in now["excludes"] if name in arguments])
    if before["choices"] is not None and now["choices"] is not None:
        found["choices"] = [name for name in now["choices"] if name in before["choices"]]
    if before["required"] and before["nargs"] is None and now["nargs"] == "+":
        # A required option that took one value may take several.
        found |= {key: before[key] for key in ("action", "default", "nargs")}
    return found


def broken_names(before: dict[str, Any], now: dict[str, Any]) -> Iterator[str]:
    """Yields each change by which a former program may fail."""
    for name, old in before.items():
        if name not in now:
            yield f"{name} is gone"
            continue
        new = now[name]
        if new["kind"] != old["kind"]:
            yield f"{name} was a {old['kind']}, is a {new['kind']}"
            continue
        yield from broken_parameters(name, old, new)
        yield from (f"{name} is no {base}" for base in _lost("bases", old, new))
        yield from (f"{name} has no {special}" for special in _lost("special", old, new))
        if _lost("fields", old, new):
            yield f"{name} lost fields {_lost('fields', old, new)}"
        for member, described in old.get("members", {}).items():
            found = new["members"].get(member, {"kind": "nothing"})
            if found["kind"] != described["kind"]:
                yield f"{name}.{member} was a {described['kind']}, is {found['kind']}"
            else:
                yield from broken_parameters(f"{name}.{member}", described, found)


def _lost(key: str, old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    return [item for item in old.get(key, []) if item not in new.get(key, [])]


def broken_parameters(name: str, old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    """Yields parameters that changed, and new ones that are not both optional and last."""
    if "parameters" not in old:
        return
    before, now = ({p["name"]: p for p in d.get("parameters", [])} for d in (old, new))
    for parameter, described in before.items():
        if now.get(parameter) != described:
            yield f"{name}: {parameter} was {described}, is {now.get(parameter, 'gone')}"
    for parameter in now.keys() - before.keys():
        if not now[parameter]["optional"] and not now[parameter]["kind"].startswith("VAR_"):
            yield f"{name}: {parameter} is new and required"
    places, found = (
        [p["name"] for p in d.values() if p["kind"] in POSITIONAL] for d in (before, now)
    )
    if found[: len(places)] != places:
        yield f"{name}: positional parameters were {places}, are {found}"


def test_command_lines_of_before_still_work() -> None:
    assert list(broken_commands(frozen("commands"), public_interface.commands())) == []


def test_public_names_of_before_still_work() -> None:
    assert list(broken_names(frozen("names"), public_interface.names())) == []


def added_option(commands: dict[str, Any]) -> None:
    new = dict(commands["perception-export"]["--fp8"], dest="new")
    commands["perception-export"]["--new"] = new
    commands["perception-rt new"] = {"--new": new}


def added_names(names: dict[str, Any]) -> None:
    new = {"name": "new", "kind": "POSITIONAL_OR_KEYWORD", "optional": True, "default": None}
    names["new"] = {"kind": "function", "parameters": []}
    names["Request"]["parameters"].append(new)
    names["Request"]["fields"].append("new")
    names["Generator"]["members"]["score"] = {"kind": "method", "parameters": []}
    names["Generator"]["members"]["submit"]["parameters"].append(dict(new, kind="KEYWORD_ONLY"))


def test_additions_are_fine() -> None:
    commands, names = frozen("commands"), frozen("names")
    added_option(commands)
    added_names(names)
    assert list(broken_commands(frozen("commands"), commands)) == []
    assert list(broken_names(frozen("names"), names)) == []


@pytest.mark.parametrize(
    "change",
    [
        lambda c: c.pop("perception-rt chat"),
        lambda c: c["perception-export"].pop("--taps"),
        lambda c: c["perception-rt refit"].pop("position 0"),
        lambda c: c["perception-rt embed"]["--num-frames"].update(default=9),
        lambda c: c["perception-rt generate"]["--top-k"].update(type="float"),
        lambda c: c["perception-rt features"]["--out"].update(dest="file"),
        lambda c: c["perception-rt verify"]["--expect"].update(required=True),
        lambda c: c["perception-rt doctor"]["position 0"].update(nargs=None),
        lambda c: c["perception-export"]["--seed"].update(choices=["0", "1"]),
        lambda c: c["perception-export"]["--model"].update(excludes=["--checkpoint", "--out"]),
        lambda c: c["perception-export"].update(
            {"--new": dict(c["perception-export"]["--out"], dest="new")}
        ),
    ],
)
def test_a_broken_command_line_is_found(change: Callable[[Any], object]) -> None:
    commands = copy.deepcopy(frozen("commands"))
    change(commands)
    assert len(list(broken_commands(frozen("commands"), commands))) == 1


@pytest.mark.parametrize(
    "change",
    [
        lambda n: n.pop("draw_box"),
        lambda n: n["load"].update(kind="class"),
        lambda n: n["load"]["parameters"].pop(),
        lambda n: n["load"]["parameters"][1].update(name="engine"),
        lambda n: n["load"]["parameters"][1].update(kind="POSITIONAL_OR_KEYWORD"),
        lambda n: n["load"]["parameters"][1].update(default="onnxruntime"),
        lambda n: n["format_box"]["parameters"].reverse(),
        lambda n: n["format_box"]["parameters"].append(
            {"name": "new", "kind": "KEYWORD_ONLY", "optional": False, "default": None}
        ),
        lambda n: n["Request"]["parameters"].insert(
            1,
            {"name": "new", "kind": "POSITIONAL_OR_KEYWORD", "optional": True, "default": None},
        ),
        lambda n: n["Result"]["fields"].remove("tokens"),
        lambda n: n["Embedder"]["members"].pop("features"),
        lambda n: n["Embedder"]["members"]["dim"].update(kind="method"),
        lambda n: n["Box"]["members"]["to_pixels"]["parameters"].reverse(),
        lambda n: n["Handle"]["special"].remove("__iter__"),
        lambda n: n["InputError"]["bases"].remove("ValueError"),
    ],
)
def test_a_broken_name_is_found(change: Callable[[Any], object]) -> None:
    names = copy.deepcopy(frozen("names"))
    change(names)
    found = list(broken_names(frozen("names"), names))
    assert len({line.split()[0] for line in found}) == 1
