"""Writes scikit-learn's digits as pictures: a data set for the examples of docs/evaluation.md.

`DIR/test` has the 450 digits that PE-Demo was not trained on, `DIR/train` the other 1,347; each has
a folder per class. `DIR/captions.jsonl` describes one held-out digit of each class.
"""

import argparse
import json
from pathlib import Path

from PIL import Image

from training.demo.digits import Digits, held_out, plain_image, training_digits

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SIDE_PX = 64


def write(digits: Digits, folder: Path) -> list[tuple[Path, int]]:
    """Writes the digits of a split; returns each file and its class."""
    written = []
    for number, (ink, label) in enumerate(zip(digits.ink, digits.labels, strict=True)):
        file = folder / NAMES[label] / f"{number:04}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(plain_image(ink, SIDE_PX)).save(file)
        written.append((file, int(label)))
    return written


def main() -> None:
    """Writes both splits and the captions."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("folder", metavar="DIR", type=Path)
    folder = parser.parse_args().folder
    write(training_digits(), folder / "train")
    files = write(held_out(), folder / "test")
    lines = []
    for label, name in enumerate(NAMES):
        file = next(file for file, found in files if found == label)
        captions = [f"the digit {name}", f"a handwritten {name}"]
        image = file.relative_to(folder).as_posix()
        lines.append(json.dumps({"image": image, "captions": captions}))
    (folder / "captions.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    print(f"{folder}: {len(files)} held-out digits")


if __name__ == "__main__":
    main()
