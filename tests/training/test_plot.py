"""Metrics of runs are drawn as curves, and sent to TensorBoard."""

import io
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from perception_rt.errors import InputError
from training.atomic_files import METRICS_FILE
from training.metrics import MetricsLog
from training.plot import main, read_curves

BLUE, ORANGE = (31, 119, 180), (255, 127, 14)  # matplotlib's first two lines


def record(folder: Path, losses: list[float], *, evaluated: bool = True) -> Path:
    folder.mkdir()
    log = MetricsLog(folder / METRICS_FILE, step=0, screen=io.StringIO())
    log.write("start", 0, {"ranks": 1, "parameters": 10})
    for step, loss in enumerate(losses, 1):
        figures = {"loss": loss, "lr": 0.1 / step, "grad_norm": 2.0, "tokens_per_s": 5.0}
        log.write("train", step, figures)
    if evaluated:
        log.write("eval", len(losses), {"accuracy": 0.5})
    return folder


def colours(picture: Path) -> set[tuple[int, int, int]]:
    with Image.open(picture) as image:
        assert image.format == "PNG"
        return {colour for _, colour in image.convert("RGB").getcolors(1 << 20)}


def test_curves_are_those_of_the_record(tmp_path: Path) -> None:
    curves = read_curves(record(tmp_path / "run", [3.0, 2.0]))
    assert curves == {
        "loss": ([1, 2], [3.0, 2.0]),
        "learning rate": ([1, 2], [0.1, 0.05]),
        "gradient norm": ([1, 2], [2.0, 2.0]),
        "evaluation: accuracy": ([2], [0.5]),
    }


def test_a_picture_has_a_line_per_run_and_a_panel_per_figure(tmp_path: Path) -> None:
    first = record(tmp_path / "first", [3.0, 2.0, 1.0])
    second = record(tmp_path / "second", [3.0, 2.5, 2.0], evaluated=False)
    both, one = tmp_path / "both.png", tmp_path / "one.png"
    assert main([str(first), str(second), "--out", str(both)]) == 0
    assert main([str(second), "--out", str(one)]) == 0
    assert {BLUE, ORANGE} <= colours(both)
    assert BLUE in colours(one)
    assert ORANGE not in colours(one)
    with Image.open(both) as four, Image.open(one) as three:
        assert four.size == (three.size[0], 2 * three.size[1])  # a fourth panel, a second row


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no readable metrics.jsonl"),
        ("", "the runs have recorded nothing yet"),
        ('{"kind": "train", "step": 1, "loss": 1}\n{"kind"', "line 2 is not an event"),
        ("[1]", "line 1 is not an event"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    tmp_path: Path, content: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / METRICS_FILE).write_text(content)
    assert main([str(tmp_path), "--out", str(tmp_path / "x.png")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_without_matplotlib_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main([str(record(tmp_path / "run", [1.0]))]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


def test_without_tensorboard_the_error_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(InputError, match="pip install tensorboard"):
        MetricsLog(tmp_path / METRICS_FILE, step=0, screen=io.StringIO(), tensorboard=True)


def test_tensorboard_gets_what_the_record_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[object, ...]] = []

    class Writer:
        def __init__(self, folder: str, purge_step: int) -> None:
            written.append((Path(folder).name, purge_step))

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def flush(self) -> None:
            pass

    class Module:
        SummaryWriter = Writer

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", Module)
    screen = io.StringIO()
    log = MetricsLog(tmp_path / METRICS_FILE, step=4, screen=screen, tensorboard=True)
    log.write("train", 5, {"loss": 1.5, "elapsed_s": 3661.4})
    assert written == [("tensorboard", 5), ("train/loss", 1.5, 5), ("train/elapsed_s", 3661.4, 5)]
    assert screen.getvalue() == "train step 5  loss 1.5  elapsed_s 1:01:01\n"
    assert json.loads((tmp_path / METRICS_FILE).read_text())["elapsed_s"] == 3661.4
