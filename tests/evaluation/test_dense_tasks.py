"""Segmentation and tracking with a package, and the label propagation below them."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import perception_rt
from perception_rt.errors import InputError
from perception_rt.evaluation import TaskOptions, evaluate, write_report
from perception_rt.evaluation.encoder.logistic import fit_logistic

HALVES = ((220, 30, 30), (30, 30, 220))


@pytest.fixture(scope="module")
def engine(tiny_package: Path) -> Iterator[perception_rt.Embedder]:
    with perception_rt.load(tiny_package) as loaded:
        yield loaded


def write_halves(root: Path, count: int, *, seed: int, size: int = 32) -> Path:
    """Images with a red and a blue side, and masks of 0 and 1; a corner pixel is ignored."""
    rng = np.random.default_rng(seed)
    for kind in ("images", "masks"):
        (root / kind).mkdir(parents=True)
    for number in range(count):
        mask = np.zeros((size, size), np.uint8)
        mask[:, size // 2 :] = 1
        if rng.random() < 0.5:
            mask = 1 - mask
        image = np.array(HALVES, np.uint8)[mask] + rng.integers(0, 20, (size, size, 3), np.uint8)
        mask[0, 0] = 255
        Image.fromarray(image).save(root / "images" / f"{number}.png")
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def test_segmentation_learns_what_patches_show(
    engine: perception_rt.Embedder, tmp_path: Path
) -> None:
    train = str(write_halves(tmp_path / "train", 10, seed=1))
    test = write_halves(tmp_path / "test", 4, seed=2)
    for raw in (None, True):
        report = evaluate(
            engine, "segmentation", test, TaskOptions(train_data=train, raw_patches=raw)
        )
        assert report.value("mIoU") > 0.9
        assert report.value("IoU of 0") > 0.9
    out = tmp_path / "report.json"
    assert [file.name for file in write_report(report, out)] == ["report.json", "report-sheet.png"]
    (part,) = report.parts
    assert part.outcomes.expected[0] == ["0: 49.95 %", "1: 50.05 %"] or part.outcomes.expected[
        0
    ] == ["0: 50.05 %", "1: 49.95 %"]


def test_segmentation_names_unusable_data(engine: perception_rt.Embedder, tmp_path: Path) -> None:
    train = write_halves(tmp_path / "train", 2, seed=1)

    def fails(words: str, data: Path = train, **options: object) -> None:
        with pytest.raises(InputError, match=words):
            evaluate(
                engine, "segmentation", data,
                TaskOptions(**{"train_data": str(train), **options}),  # type: ignore[arg-type]
            )  # fmt: skip

    fails("give --train-data", train_data=None)
    fails("must be a folder with the folders images and masks", tmp_path)
    fails("--raw-patches and --layer exclude each other", raw_patches=True, layer=0)
    fails("--ignore-label must be an integer from 0 to 255", ignore_label=256)
    names = tmp_path / "names.txt"
    names.write_text("only\n")
    fails("has the class 1, and there are 1 names", classes=str(names))
    (train / "masks" / "0.png").rename(train / "masks" / "9.png")
    fails("has no image '9' beside it")
    (train / "masks" / "9.png").unlink()
    fails("0.png' has no mask")


def test_shares_of_classes_weigh_like_repeated_items() -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(30, 4)).astype(np.float32)
    counts = rng.integers(0, 3, (30, 3))
    repeated = np.repeat(features, counts.sum(axis=1), axis=0)
    labels = np.concatenate([np.repeat(range(3), row) for row in counts])
    whole = fit_logistic(repeated, labels, 3, 0.1)
    # The mean is over items, so that a penalty weighs as many times more as there are more items.
    shares = fit_logistic(features, counts.astype(np.float64), 3, 0.1 * len(repeated) / 30)
    assert np.abs(whole.weight - shares.weight).max() < 1e-5


def write_video(root: Path, *, masked: int) -> None:
    """A red square that moves right on blue, 8 pixels per frame, with a mask per masked frame."""
    for kind in ("images", "masks"):
        (root / kind / "square").mkdir(parents=True)
    for number in range(4):
        mask = np.zeros((32, 32), np.uint8)
        mask[8:24, 8 * number : 8 * number + 8] = 7
        image = np.where((mask > 0)[:, :, None], HALVES[0], HALVES[1]).astype(np.uint8)
        Image.fromarray(image).save(root / "images" / "square" / f"{number}.png")
        if number < masked:
            Image.fromarray(mask).save(root / "masks" / "square" / f"{number}.png")


def test_tracking_follows_a_square(engine: perception_rt.Embedder, tmp_path: Path) -> None:
    write_video(tmp_path, masked=4)
    report = evaluate(engine, "tracking", tmp_path, TaskOptions(raw_patches=True, top_k=1))
    assert report.value("J&F of the first mask") < 0.3
    assert report.value("J&F") > 0.8
    assert report.value("J&F") == pytest.approx((report.value("J") + report.value("F")) / 2)
    (part,) = report.parts
    assert part.outcomes.ids == ["square/7"]
    assert len(write_report(report, tmp_path / "report.json")) == 2


def test_tracking_names_unusable_data(engine: perception_rt.Embedder, tmp_path: Path) -> None:
    write_video(tmp_path, masked=1)
    with pytest.raises(InputError, match="'square' has no mask between its first and its last"):
        evaluate(engine, "tracking", tmp_path)
    with pytest.raises(InputError, match="temperature must be at least"):
        evaluate(engine, "tracking", tmp_path, TaskOptions(temperature=0.0))
