"""LoRA teaches PLM-Demo a new question from 200 samples; slow, so run with `-m slow`."""

from pathlib import Path

import pytest

import perception_rt as prt
from perception_rt.cli import export_main
from training.demo.questions import held_out_record, is_right
from training.demo.write_questions import write
from training.train import main

ROOT = Path(__file__).parents[2]
ASKED = 450


def accuracy(package: Path) -> float:
    """Returns the share of held-out rows whose rightmost digit is answered correctly."""
    records = [held_out_record("last", number) for number in range(ASKED)]
    with prt.load(package) as plm:
        requests = [
            prt.Request(
                found["conversations"][0]["value"], images=[found["image"]], max_new_tokens=32
            )
            for found in records
        ]
        results = plm.generate_batch(requests)
    answers = zip(results, records, strict=True)
    return sum(is_right("last", result.text, found) for result, found in answers) / ASKED


@pytest.mark.slow
def test_a_new_question_is_learned_from_200_samples(tmp_path: Path) -> None:
    before, after = tmp_path / "before", tmp_path / "after"
    assert export_main(["--model", "PLM-Demo", "--out", str(before)]) == 0
    untrained = accuracy(before)
    questions = write("last", 200, tmp_path / "questions")
    settings = {
        "data.datasets.last.annotation": questions,
        "data.datasets.last.root": questions.parent,
        "data.tokenizer": ROOT / "perception_rt/demo/plm_demo/tokenizer.model",
        "init.checkpoint": ROOT / "perception_rt/demo/plm_demo",
        "run.out_dir": tmp_path / "run",
    }
    arguments = [f"{name}={value}" for name, value in settings.items()]
    recipe = str(ROOT / "training/configs/plm_demo_lora.yaml")
    assert main([recipe, *(part for text in arguments for part in ("--set", text))]) == 0
    assert export_main(["--checkpoint", str(tmp_path / "run"), "--out", str(after)]) == 0
    trained = accuracy(after)
    print(f"right before {untrained:.1%}, after {trained:.1%}")
    assert untrained < 0.5 and trained >= 0.8
