"""Writes the pictures of `perception-rt demo`: `python training/demo/pictures.py FOLDER`.

All digits are held out. Each class has the first of its digits, in a coloured scene; each kind of
question has one record, as `examples/demo.py` asks them. `pictures.json` lists files, questions and
right answers.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.data.records import Pixels
from training.demo.digits import held_out
from training.demo.questions import LEARNED, held_out_record
from training.demo.scenes import WORDS, draw_scene

_SCENE_SEED = 20_000_005
_SCENE_SIZE = 32


def write(folder: Path) -> None:
    """Writes the pictures and their list into a folder, which is made if it is missing."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = {"digits": _digits(folder), "questions": _questions(folder)}
    text = json.dumps(listed, indent=2)
    (folder / "pictures.json").write_text(f"{text}\n", encoding="utf-8")


def _digits(folder: Path) -> list[dict[str, Any]]:
    digits, found = held_out(), []
    for label, word in enumerate(WORDS):
        first = int(np.flatnonzero(digits.labels == label)[0])
        rng = np.random.default_rng((_SCENE_SEED, label))
        image, _ = draw_scene(rng, digits.ink[first], label, _SCENE_SIZE)
        found.append({"image": _save(image, folder / f"digit_{label}.png"), "label": word})
    return found


def _questions(folder: Path) -> list[dict[str, Any]]:
    found = []
    for number, name in enumerate(LEARNED):
        record = held_out_record(name, number)
        question, answer = (turn["value"] for turn in record["conversations"])
        images = record["image"] if isinstance(record["image"], list) else [record["image"]]
        ends = [""] if len(images) == 1 else [f"_{index}" for index in range(1, len(images) + 1)]
        files = [
            _save(image, folder / f"{name}{end}.png")
            for image, end in zip(images, ends, strict=True)
        ]
        found.append({"images": files, "question": question, "answer": answer})
    return found


def _save(image: Pixels, path: Path) -> str:
    Image.fromarray(image).save(path, optimize=True)
    return path.name


if __name__ == "__main__":
    write(Path(sys.argv[1]))
