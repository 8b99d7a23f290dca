"""`perception-rt features` for many images, and the colours that it draws."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from perception_rt.cli import main
from perception_rt.demo import pictures_path
from perception_rt.processing.pca import heat_colors, principal_colors

DIGITS = [str(pictures_path() / f"digit_{i}.png") for i in (1, 2)]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def draw(*arguments: str) -> None:
    assert main(["features", "demo:pe", "--image", *DIGITS, *arguments]) == 0


def test_one_sheet_or_a_picture_each(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sheet = tmp_path / "sheet.png"
    draw("--height", "100", "--smooth", "--json", "--out", str(sheet))
    results = json.loads(capsys.readouterr().out)
    assert [result["image"] for result in results] == DIGITS
    assert [result["shape"] for result in results] == [[4, 4, 128]] * 2
    with Image.open(sheet) as picture:
        assert picture.height == 2 * 100 + 8
        left = picture.width // 2 + 4
        smooth = np.asarray(picture)[:100, left:]
    draw("--height", "100", "--attention", "--out", str(tmp_path))
    with Image.open(tmp_path / "digit_2.png") as picture:
        blocks = np.asarray(picture)[:, left:]
    assert (tmp_path / "digit_1.png").exists()
    colors = [len(np.unique(x.reshape(-1, 3), axis=0)) for x in (smooth, blocks)]
    assert colors[0] > 100 and colors[1] <= 16  # interpolated, and one colour per patch


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--height", "0", "--out", "x.png"], "--height must be from 1 to 4096, not 0"),
        (["--attention", "--shared", "--out", "x.png"], "--shared is for features"),
        (["--out", "missing"], "--out must end in .png or be a folder, not 'missing'"),
        (["--image", DIGITS[0], "--out", "."], "two images would become 'digit_1.png'"),
    ],
)
def test_unusable_options_are_refused_before_work(
    arguments: list[str], words: str, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert main(["features", "demo:pe", "--image", *DIGITS, *arguments]) == 2
    assert words in capsys.readouterr().err
    assert not list(tmp_path.glob("*.png"))


def test_a_shared_basis_gives_equal_patches_equal_colours() -> None:
    rng = np.random.default_rng(0)
    dense = rng.normal(size=(2, 3, 4, 8)).astype(np.float32)
    dense[1, :2] = dense[0, :2]
    shared = principal_colors(dense)
    assert np.array_equal(shared[1, :2], shared[0, :2])
    apart = np.concatenate([principal_colors(dense[:1]), principal_colors(dense[1:])])
    assert not np.array_equal(apart[1, :2], apart[0, :2])


def test_heat_runs_from_black_to_white() -> None:
    colors = heat_colors(np.asarray([[0.0, 1 / 3], [2 / 3, 1.0]]) * 0.2)
    assert colors.reshape(4, 3).tolist() == [[0, 0, 0], [255, 0, 0], [255, 255, 0], [255] * 3]
