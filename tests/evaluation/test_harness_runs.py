"""Runs of lmms-eval, CLIP_benchmark and mteb on held-out data equal ours.

Slow, and each needs an environment with its harness; docs/evaluation.md says how to make them.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from perception_rt.runtime.generator import Generator

pytestmark = pytest.mark.slow
EXAMPLES = Path(__file__).parents[2] / "examples" / "harness"


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data, in the folder where the examples look for them."""
    pytest.importorskip("av")
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import write_data

    monkeypatch.setattr(write_data, "QUESTIONS", 6)
    monkeypatch.setattr(write_data, "VIDEOS", 3)
    write_data.main([])
    return tmp_path / write_data.FOLDER


def question(document: dict[str, Any], folder: Path) -> tuple[str, dict[str, Any]]:
    """Prompt, and images and videos as the generator takes them."""
    media = {"images": [folder / name for name in document.get("image", [])]}
    if "video" in document:
        media["videos"] = [folder / document["video"]]
    return document["conversations"][0]["value"], media


def test_lmms_eval_gets_the_generators_answers(data: Path) -> None:
    pytest.importorskip("lmms_eval")
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    from training.demo.questions import is_right

    names = [f"perception_rt_scenes{part}" for part in ("", "_video", "_choice")]
    found = simple_evaluate(
        model="perception_rt",
        model_args="package=demo:plm",
        tasks=names,
        task_manager=TaskManager(include_path=str(EXAMPLES), model_name="perception_rt"),
        batch_size=4,
        log_samples=True,
    )
    images, videos, choices = (found["samples"][name] for name in names)
    assert (len(images), len(videos), len(choices)) == (42, 3, 6)
    folder = data / "scenes"
    with Generator.load("demo:plm") as plm:
        right = []
        for sample in [*images, *videos]:
            document = sample["doc"]
            media: dict[str, Any] = {
                "images": [folder / name for name in document.get("image", [])]
            }
            if "video" in document:
                media["videos"] = [folder / document["video"]]
            prompt = document["conversations"][0]["value"]
            wanted = plm.generate(prompt, max_new_tokens=160, **media).text
            assert sample["filtered_resps"] == [wanted]
            right.append(is_right(document["kind"], wanted, document))
        hits = []
        for sample in choices:
            document = sample["doc"]
            prompt, media = question(document, folder)
            scores = [plm.score(prompt, text, **media).total for text in document["choices"]]
            costs = [value for value, _ in sample["filtered_resps"]]
            np.testing.assert_allclose(costs, np.negative(scores), atol=1e-4)
            likeliest = document["choices"][int(np.argmax(scores))]
            hits.append(likeliest == document["conversations"][1]["value"])
    scores = found["results"]
    assert scores[names[0]]["right,none"] == pytest.approx(np.mean(right[:42]))
    assert scores[names[2]]["acc,none"] == pytest.approx(np.mean(hits))


@pytest.mark.parametrize(
    ("name", "task", "ours"),
    [
        ("digits", "zeroshot_classification", "zero-shot"),
        ("captions", "zeroshot_retrieval", "retrieval"),
    ],
)
def test_clip_benchmark_gets_our_scores(
    data: Path, monkeypatch: pytest.MonkeyPatch, name: str, task: str, ours: str
) -> None:
    pytest.importorskip("clip_benchmark")
    from perception_rt.evaluation import evaluate
    from perception_rt.evaluation.harness import clip_benchmark

    arguments = (
        "eval --model_type perception_rt --model PE-Demo --pretrained demo:pe --no_amp "
        f"--dataset wds/{name} --dataset_root {data / name} --task {task} --num_workers 1 "
        "--recall_k 1 5 10 --output found.json"
    )
    monkeypatch.setattr(sys, "argv", ["clip_benchmark", *arguments.split()])
    assert clip_benchmark.main() == 0
    found = json.loads(Path("found.json").read_text())["metrics"]
    report = evaluate("demo:pe", ours, str(data / name))
    figures = {(part.name, f.name): f.value for part in report.parts for f in part.figures}
    if ours == "zero-shot":
        wanted = {
            "acc1": figures["", "top-1"],
            "acc5": figures["", "top-5"],
            "mean_per_class_recall": figures["", "mean per class"],
        }
    else:
        wanted = {
            f"{sort}_retrieval_recall@{k}": figures[part, f"R@{k}"]
            for sort, part in (("image", "text to image"), ("text", "image to text"))
            for k in (1, 5, 10)
        }
    assert found == pytest.approx(wanted)


def test_mteb_gets_our_scores(data: Path) -> None:
    mteb = pytest.importorskip("mteb")
    from digits_mteb import Digits

    from perception_rt.evaluation import TaskOptions, evaluate
    from perception_rt.evaluation.harness.mteb import PerceptionRtEncoder

    templates = data / "one.txt"
    templates.write_text("a photo of the handwritten digit {}\n")
    with PerceptionRtEncoder("demo:pe") as encoder:
        result = mteb.evaluate(encoder, Digits(), cache=None)
    scores = result.task_results[0].scores["test"][0]
    options = TaskOptions(templates=str(templates))
    report = evaluate("demo:pe", "zero-shot", str(data / "digits"), options=options)
    assert scores["accuracy"] == pytest.approx(report.value("top-1"))
    assert scores["recall"] == pytest.approx(report.value("mean per class"))
