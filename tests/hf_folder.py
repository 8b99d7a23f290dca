"""Folders of transformers' PerceptionLM for tests: the golden one, and others made from it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from golden_data import GOLDEN

HF = GOLDEN / "hf_plm"
FILES = ("config.json", "processor_config.json", "generation_config.json", "tokenizer.json")
Change = Callable[[dict[str, Any]], Any]


def copy_folder(out: Path, *, weights: bool = True) -> Path:
    """A copy of the golden folder, which may be changed."""
    out.mkdir(parents=True, exist_ok=True)
    for name in (*FILES, "model.safetensors") if weights else FILES:
        shutil.copyfile(HF / name, out / name)
    return out


def edit(folder: Path, name: str, change: Change) -> None:
    """Changes a JSON file of a folder in place."""
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def drop(folder: Path, name: str, field: str) -> None:
    """Removes a field, given by its dotted name, from a JSON file."""
    *outer, last = field.split(".")

    def change(content: dict[str, Any]) -> None:
        for key in outer:
            content = content[key]
        del content[last]

    edit(folder, name, change)


def put(folder: Path, name: str, field: str, value: Any) -> None:
    """Sets a field, given by its dotted name, in a JSON file."""
    *outer, last = field.split(".")

    def change(content: dict[str, Any]) -> None:
        for key in outer:
            content = content[key]
        content[last] = value

    edit(folder, name, change)


def make_old(folder: Path) -> Path:
    """Turns a folder into one of a release before 5: names and files that changed since."""

    def text(content: dict[str, Any]) -> None:
        rope = content["text_config"].pop("rope_parameters")
        content["text_config"]["rope_theta"] = rope.pop("rope_theta")
        content["text_config"]["rope_scaling"] = rope

    edit(folder, "config.json", text)
    processor = json.loads((folder / "processor_config.json").read_text())
    for key, name in (
        ("image_processor", "preprocessor"),
        ("video_processor", "video_preprocessor"),
    ):
        (folder / f"{name}_config.json").write_text(json.dumps(processor.pop(key)))
    (folder / "processor_config.json").write_text(json.dumps(processor))
    return folder
