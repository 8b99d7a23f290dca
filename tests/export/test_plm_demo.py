"""The shipped language model is small, and as accurate in few bits as in floats."""

import json
from pathlib import Path

import pytest
from safetensors import safe_open

import perception_rt as prt
from benchmarks.demo_accuracy import PRECISIONS, backend_of, request
from perception_rt.demo import language_model_path
from perception_rt.export import ExportOptions, export
from perception_rt.plm_config import PlmConfig
from training.demo.questions import LEARNED, held_out_record, is_right

COUNT = 40
ROUNDED = ("int8", "int4", "fp8")
ASKED = [(name, held_out_record(name, n)) for name in ("read3", *LEARNED) for n in range(COUNT)]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Answers to every question, by precision."""
    found = {}
    for precision in ("fp32", *ROUNDED):
        package = tmp_path_factory.mktemp("demo") / precision
        how = {"precision": precision, "out": package, **PRECISIONS[precision]}
        export(ExportOptions(model="PLM-Demo", **how))
        with prt.load(package, backend=backend_of(precision)) as plm:
            assert isinstance(plm, prt.Generator)
            results = plm.generate_batch([request(record) for _, record in ASKED])
            found[precision] = [result.text for result in results]
    return found


def share(texts: list[str], names: tuple[str, ...]) -> float:
    marks = [
        is_right(name, text, record)
        for (name, record), text in zip(ASKED, texts, strict=True)
        if name in names
    ]
    return sum(marks) / len(marks)


def test_the_folder_is_small_and_half_precision() -> None:
    folder = language_model_path()
    assert sum(file.stat().st_size for file in folder.iterdir()) <= 16_000_000
    with safe_open(folder / "model.safetensors", "pt") as stored:
        assert {stored.get_slice(name).get_dtype() for name in stored.keys()} == {"F16"}  # noqa: SIM118
    params = json.loads((folder / "params.json").read_text())
    assert PlmConfig.from_dict(params).tokens_per_tile == 16
    assert params["data"]["vision_input_type"] == "vanilla"


@pytest.mark.parametrize("precision", ROUNDED)
def test_8_and_4_bits_are_as_good_as_floats(answers: dict[str, list[str]], precision: str) -> None:
    """Within the noise of 280 questions; CARD.md has the figures for 500 of each kind."""
    names = ("read3", *LEARNED)
    assert share(answers[precision], names) >= share(answers["fp32"], names) - 0.02


def test_held_out_answers_are_right(answers: dict[str, list[str]]) -> None:
    assert share(answers["fp32"], ("read3",)) >= 0.85
    assert share(answers["fp32"], ("count",)) >= 0.95
    assert share(answers["fp32"], LEARNED) >= 0.85


def test_lookup_changes_no_answer_of_a_trained_model(
    answers: dict[str, list[str]], tmp_path: Path
) -> None:
    """Trained answers have no near ties, so rounding does not matter; see docs/parity.md."""
    package = tmp_path / "int8"
    export(ExportOptions(model="PLM-Demo", precision="int8", out=package))
    chosen = [(index, record) for index, (_, record) in enumerate(ASKED) if index % 4 == 0]
    with prt.load(package) as plm:
        assert isinstance(plm, prt.Generator)
        for index, record in chosen:
            image = record["image"]
            result = plm.generate(
                record["conversations"][0]["value"],
                images=image if isinstance(image, list) else [image],
                max_new_tokens=160,
                lookup=True,
            )
            assert result.text == answers["int8"][index]
