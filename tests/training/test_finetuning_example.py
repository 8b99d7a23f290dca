"""examples/finetune: the data that its script writes, and its recipes."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from examples.finetune.mnist_to_jsonl import main
from perception_rt.evaluation.data.class_names import read_templates
from perception_rt.evaluation.data.labelled import read_labelled
from training.recipe.schema import load_config

FOLDER = Path(__file__).parents[2] / "examples" / "finetune"


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """A raw file of 10 images of each class; the first pixel is the image's number."""
    lines = []
    for number in range(100):
        row = np.zeros(785, np.uint8)
        row[0], row[-1] = number, number // 10
        lines.append(",".join(map(str, row)))
    path = tmp_path / "raw.csv.gz"
    path.write_bytes(gzip.compress("\n".join(lines).encode()))
    return path


def read(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def test_raw_digits_become_images_pairs_and_questions(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "mnist"
    assert main([str(out), "--raw", str(raw)]) == 0
    pairs = read(out / "train_pairs.jsonl")
    assert len(pairs) == 80
    assert pairs[-1] == {
        "image": "train/nine/0097.png",
        "caption": "a photo of the handwritten digit nine",
    }
    train, test = (read(out / f"{part}_questions.jsonl") for part in ("train", "test"))
    assert (len(train), len(test)) == (160, 40)
    assert not {r["image"] for r in train} & {r["image"] for r in test}
    answers = {(r["image"], r["kind"]): r["answer"] for r in test}
    assert answers["test/seven/0079.png", "read"] == "7"
    assert answers["test/seven/0079.png", "parity"] == "odd"
    assert answers["test/four/0048.png", "parity"] == "even"
    for record in train + test:
        with Image.open(out / record["image"]) as image:
            assert image.size == (28, 28)
            assert f"{image.getpixel((0, 0)):04}" == Path(record["image"]).stem


def test_evaluation_reads_the_test_images(raw: Path, tmp_path: Path) -> None:
    out = tmp_path / "mnist"
    main([str(out), "--raw", str(raw)])
    assert len(read_labelled(str(out / "test")).items) == 20
    assert read_templates(str(out / "templates.txt")) == ["a photo of the handwritten digit {}"]


@pytest.mark.parametrize("name", ["pe_lora", "plm_lora"])
def test_the_recipes_read_what_the_script_writes(name: str) -> None:
    config = load_config(FOLDER / f"{name}.yaml")
    assert config.lora is not None
    named = {"pe_lora": "train_pairs.jsonl", "plm_lora": "train_questions.jsonl"}
    assert f"out/mnist/{named[name]}" in config.to_yaml()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "cannot read"),
        (b"\x1f\x8bdamaged", "cannot read"),
        (gzip.compress(b"1,2", mtime=0), "2 columns"),
    ],
    ids=["missing", "damaged", "two columns"],  # the bytes make no name that is always the same
)
def test_an_unusable_raw_file_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], data: bytes | None, message: str
) -> None:
    raw = tmp_path / "raw.csv.gz"
    if data is not None:
        raw.write_bytes(data)
    assert main([str(tmp_path / "out"), "--raw", str(raw)]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert str(raw) in error
    assert not (tmp_path / "out").exists()
