"""The demo encoder keeps its zero-shot accuracy in every precision."""

from pathlib import Path

import numpy as np
import pytest

import perception_rt as prt
from perception_rt.cli import export_main
from training.demo.digits import held_out, held_out_digits
from training.demo.scenes import WORDS, draw_all

TEMPLATES = ["a photo of the handwritten digit {}", "a handwritten {}"]
# TensorRT's graphs without engines, which run on the CPU.
GRAPHS = ("--backend", "tensorrt", "--target", "none")
PRECISIONS: dict[str, tuple[str, ...]] = {"fp32": (), "fp16": (), "int8": (), "fp8": GRAPHS}


@pytest.fixture(scope="module")
def accuracies(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, float]]:
    """Accuracy on the 450 held-out digits, plain and in coloured scenes, by precision."""
    directory = tmp_path_factory.mktemp("demo")
    digits = held_out()
    plain, labels = held_out_digits(32)
    scenes, _ = draw_all(digits, 32, seed=0)
    result: dict[str, dict[str, float]] = {}
    for precision, options in PRECISIONS.items():
        out = directory / precision
        arguments = ["--model", "PE-Demo", "--precision", precision, *options, "--out", str(out)]
        assert export_main(arguments) == 0
        with prt.load(out, backend="onnxruntime") as engine:
            classes = engine.embed_labels(WORDS, TEMPLATES)
            result[precision] = {
                name: float(np.mean((engine.embed_images(rows) @ classes.T).argmax(1) == labels))
                for name, rows in (("plain", list(plain)), ("scene", list(scenes)))
            }
    print({p: {k: round(v, 4) for k, v in r.items()} for p, r in result.items()})
    return result


def test_held_out_digits_are_recognised(accuracies: dict[str, dict[str, float]]) -> None:
    assert accuracies["fp32"]["plain"] >= 0.97
    assert accuracies["fp32"]["scene"] >= 0.85


@pytest.mark.parametrize("precision", ["fp16", "int8", "fp8"])
def test_precision_costs_at_most_half_a_point(
    precision: str, accuracies: dict[str, dict[str, float]]
) -> None:
    assert accuracies[precision]["plain"] >= accuracies["fp32"]["plain"] - 0.005


def test_classify_agrees_with_the_vectors(tmp_path: Path) -> None:
    assert export_main(["--model", "PE-Demo", "--out", str(tmp_path / "p"), "--taps", "none"]) == 0
    images, labels = held_out_digits(32)
    with prt.load(tmp_path / "p") as engine:
        odds = engine.classify(list(images[:40]), list(WORDS), TEMPLATES)
        assert np.mean(odds.argmax(axis=1) == labels[:40]) >= 0.9
