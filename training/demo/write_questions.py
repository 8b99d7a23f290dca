"""Writes questions as jsonl: `python training/demo/write_questions.py SET COUNT FOLDER`.

Writes `FOLDER/SET.jsonl` with PNG images beside it, in the format of `training/data/records.py`.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from perception_rt.errors import PerceptionError
from training.demo.questions import SETS, record

_SEED = 11


def write(name: str, count: int, folder: Path) -> Path:
    """Writes a dataset and returns the path of its jsonl file."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        found = record(name, _SEED, number)
        images = found["image"] if isinstance(found["image"], list) else [found["image"]]
        files = [f"{name}_{number:06}_{index}.png" for index in range(len(images))]
        for file, image in zip(files, images, strict=True):
            Image.fromarray(image).save(folder / file)
        lines.append(json.dumps({**found, "image": files if len(files) > 1 else files[0]}))
    path = folder / f"{name}.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def main(arguments: list[str]) -> int:
    """Writes one set and returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Writes questions about synthetic images as jsonl, with PNG files beside it."
    )
    parser.add_argument("set", help=f"set of questions: {', '.join(SETS)}")
    parser.add_argument("count", type=int, help="number of records")
    parser.add_argument("folder", type=Path, help="folder to write to")
    options = parser.parse_args(arguments)
    try:
        print(write(options.set, options.count, options.folder))
    except (PerceptionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
