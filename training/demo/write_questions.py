"""Writes questions as jsonl: `python training/demo/write_questions.py SET COUNT FOLDER`.

Writes `FOLDER/SET.jsonl` with PNG images beside it, in the format of `training/data/records.py`.
With `--held-out`, they are the questions that PLM-Demo is evaluated on, with the set as their kind.
"""

import argparse
import json
import sys
from pathlib import Path

from PIL import Image

from perception_rt.errors import PerceptionError
from training.demo.questions import SETS, held_out_record, record

_SEED = 11


def write(name: str, count: int, folder: Path, *, held_out: bool = False) -> Path:
    """Writes a dataset and returns the path of its jsonl file.

    Args:
        name: name of the set.
        count: number of records.
        folder: folder to write to.
        held_out: write questions about held-out digits, which also have `id` and `kind`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        found = held_out_record(name, number) if held_out else record(name, _SEED, number)
        if held_out:
            found = {"id": f"{name} {number}", "kind": name, **found}
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
    parser.add_argument(
        "--held-out", action="store_true", help="questions to evaluate on; SET may also be read3"
    )
    options = parser.parse_args(arguments)
    try:
        held_out = options.held_out
        print(write(options.set, options.count, options.folder, held_out=held_out))
    except (PerceptionError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
