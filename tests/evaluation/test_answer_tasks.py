"""Tasks of language models: what is asked, how answers are scored, and what data are refused."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from evaluation_data import picture

from perception_rt.cli import main
from perception_rt.errors import InputError
from perception_rt.evaluation import TaskOptions, evaluate
from perception_rt.evaluation.answers.questions import read_questions
from perception_rt.evaluation.outcomes import Outcomes
from perception_rt.evaluation.tasks import get_task
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.request import Request
from training.demo.questions import held_out_record, is_right
from training.demo.write_questions import write

Json = dict[str, Any]


class Answering:
    """Stands in for a generator: gives one answer after another and keeps the requests."""

    tile_spec = TileSpec(tile_size=8, max_tiles=1)

    def __init__(self, *answers: str) -> None:
        self.requests: list[Request] = []
        self._answers = iter(answers)

    def generate_batch(self, requests: Sequence[Request], **_: Any) -> list[Any]:
        self.requests += requests
        return [SimpleNamespace(text=next(self._answers)) for _ in requests]

    def score(self, prompt: str, answer: str, **inputs: Any) -> Any:
        self.requests.append(Request(prompt, images=inputs["images"]))
        return SimpleNamespace(total=-2.0 * answer.count("a") - len(answer))


Score = Callable[..., tuple[dict[str, float], Outcomes, Answering]]


@pytest.fixture
def score(tmp_path: Path) -> Score:
    """Runs a task on records with given answers: its figures, outcomes and the requests."""

    def run(
        task: str, records: list[Json], *answers: str, **options: Any
    ) -> tuple[dict[str, float], Outcomes, Answering]:
        plm = Answering(*answers)
        data, chosen = lines(tmp_path, records), TaskOptions(**options)
        found = get_task(task)
        found.check(chosen)
        result = found.function()(plm, data, chosen, lambda *_: None)
        (part,) = result.parts.values()
        return {m.name: m.compute(part.columns) for m in result.metrics}, part, plm

    return run


def lines(folder: Path, records: Sequence[Any], name: str = "data.jsonl") -> str:
    file = folder / name
    file.write_text("".join(json.dumps(record) + "\n" for record in records), "utf-8")
    return str(file)


def asked(question: str, answer: str, **more: Any) -> Json:
    return {"image": "a.png", "question": question, "answer": answer, **more}


def test_exact_match_by_kind(score: Score, tmp_path: Path) -> None:
    records = [asked("1?", "a", kind="x"), asked("2?", "b", kind="y"), asked("3?", "c", kind="y")]
    values, part, plm = score("exact-match", records, "a", " b\n", "d")
    assert values == {"exact match": pytest.approx(2 / 3)}
    assert part.groups == ["x", "y", "y"]
    assert part.ids == ["line 1", "line 2", "line 3"]
    assert part.answers == ["a", "b", "d"]
    assert [request.prompt for request in plm.requests] == ["1?", "2?", "3?"]
    assert plm.requests[0].images == [str(tmp_path / "a.png")]


def test_earlier_questions_are_history(score: Score, tmp_path: Path) -> None:
    turns = [("human", "<image> What?"), ("gpt", "A cat."), ("human", "<image> And?"), ("gpt", "X")]
    record = {
        "images": ["a.png", "b.png"], "id": 7,
        "conversations": [{"from": role, "value": text} for role, text in turns],
    }  # fmt: skip
    _, part, plm = score("exact-match", [record], "X", prompt="{} Be brief.", max_new_tokens=9)
    (request,) = plm.requests
    (earlier,) = request.history
    assert (earlier.prompt, earlier.answer) == ("<image> What?", "A cat.")
    assert earlier.images == [str(tmp_path / "a.png")]
    assert request.images == [str(tmp_path / "b.png")]
    assert (request.prompt, request.max_new_tokens) == ("<image> And? Be brief.", 9)
    assert part.ids == ["7"]
    assert [item.source for item in part.files] == [*earlier.images, *request.images]


def test_questions_without_images_have_no_pictures(score: Score) -> None:
    _, part, plm = score("exact-match", [{"question": "1?", "answer": "a"}], "a")
    assert part.pictures == ()
    assert plm.requests[0].images == []


def test_several_right_answers(score: Score) -> None:
    record = {"image": "a.png", "question": "1?", "answers": ["hello", "hallo"]}
    assert score("anls", [record], "hallx")[0] == {"ANLS": pytest.approx(0.8)}
    annotated = [{"answer": "two"}] * 2 + [{"answer": "3"}] * 8
    values, part, _ = score("vqa-accuracy", [{**record, "answers": annotated}], "2")
    assert values == {"VQA accuracy": pytest.approx(0.6)}
    assert part.expected == [["two"] * 2 + ["3"] * 8]
    assert score("relaxed-accuracy", [asked("?", "100")], "104")[0] == {"relaxed accuracy": 1}


def test_captions(score: Score) -> None:
    records = [{"image": f"{n}.png", "captions": [f"a word{n} in town{n}"]} for n in range(3)]
    values, _, plm = score(
        "captions", records, *(r["captions"][0] for r in records[:2]), "", prompt="Describe{}"
    )
    # 10 for unigrams to 4-grams; words in all captions weigh nothing.
    assert values == {"CIDEr": pytest.approx(20 / 3)}
    assert plm.requests[0].prompt == "Describe"


def test_choices_by_letter(score: Score) -> None:
    choices = ["a cat", "a dog"]
    records = [
        asked("What?", "a dog", choices=choices),
        asked("What?", "B", options={"option_0": "a cat", "option_1": "a dog"}),
        asked("What?", "(a)", choices=choices),
    ]
    values, part, plm = score("multiple-choice", records, "(B) a dog", "C", "b")
    assert values == {"accuracy": pytest.approx(1 / 3), "answered": pytest.approx(2 / 3)}
    assert part.expected == ["B", "B", "A"]
    wording = "Question: What?\nOptions:\n(A) a cat\n(B) a dog\nOnly give the best option."
    assert {request.prompt for request in plm.requests} == {wording}


def test_choices_by_score(score: Score) -> None:
    records = [asked("What?", "b", choices=["a", "b"]), asked("?", "bbb", choices=["ba", "bbb"])]
    values, part, plm = score("multiple-choice", records, score_choices=True)
    # "bbb" is likelier than "ba", -3 against -4, and "b" than "a".
    assert values == {"accuracy": 1, "accuracy per character": 1}
    assert part.answers == ["b", "bbb"]
    assert [request.prompt for request in plm.requests] == ["What?", "What?", "?", "?"]


def test_a_set_of_questions_counts_if_all_are_right(score: Score) -> None:
    records = [
        asked(f"{n}?", "yes", choices=["yes", "no"], qa_uid=name, uid=n)
        for n, name in enumerate("xyxyz")
    ]
    values, part, _ = score("multi-binary", records, "A", "A", "A", "B", "B")
    assert values["multi-binary accuracy"] == pytest.approx(1 / 3)
    assert values["mean accuracy"] == pytest.approx(0.5)
    assert part.ids == ["x", "y", "z"]
    assert part.texts == ["0? / 2?", "1? / 3?", "4?"]
    assert len(part.files) == 5


def test_yes_and_no(score: Score) -> None:
    records = [asked(f"{n}?", right) for n, right in enumerate(("yes", "Yes", "no", "no"))]
    values, _, _ = score("yes-no", records, "Yes.", "no", "yes", "maybe")
    assert values["accuracy"] == 0.25  # "maybe" is wrong
    assert values["F1"] == values["precision"] == values["recall"] == 0.5
    assert values["answers yes"] == 0.5


def test_boxes(score: Score) -> None:
    placed = {"bbox": [[10, 10, 10, 10]], "width": 100, "height": 100}
    records = [asked("1?", "At <|bbox0|>.", **placed), asked("2?", "[000,000,100,100]")]
    values, part, _ = score("boxes", records, "[100,100,200,200]", "[000,000,040,100]")
    assert values == {"accuracy@0.5": 0.5, "mean IoU": pytest.approx(0.7)}
    assert part.expected[0] == "At [100,100,200,200]."


def test_moments(score: Score) -> None:
    records = [asked(f"{n}?", "[0, 10]") for n in range(2)]
    values, _, _ = score("moments", records, "From [2, 10]", "never")
    assert values["mean IoU"] == pytest.approx(0.4)
    assert values["recall@0.7"] == values["answered"] == 0.5
    assert values["mean recall"] == 3 / 8


def test_clips_are_cut_and_boxes_drawn(score: Score, tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "v.mp4"), "w") as file:
        stream = file.add_stream("mpeg4", rate=1)
        stream.width = stream.height = 64
        for _ in range(6):
            frame = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    record = {
        "video": "v.mp4", "question": "?", "answer": "[0, 1]", "start_time": 2, "end_time": 3,
        "bbox_map": {"2": [0, 0, 63, 63], "3": None},
    }  # fmt: skip
    _, _, plm = score("moments", [record], "", num_frames=2)
    (frames,) = plm.requests[0].videos
    assert frames.shape == (2, 8, 8, 3)
    assert frames[0, :, 0, 0].min() > 100
    assert frames[1].max() < 40


@pytest.mark.parametrize(
    ("task", "record", "message"),
    [
        ("exact-match", {"image": "a.png"}, "line 1 of .*no conversation, question and answer"),
        ("exact-match", asked("?", "a", image="https://x/a.png"), "the image is not the path of a"),
        ("exact-match", asked("?", "a", id=[1]), "line 1 .*id or question_id or uid must be a"),
        ("exact-match", asked("?", "a", answers=[1]), "answers must be a list of texts"),
        ("exact-match", asked("?", "a", answers=[]), "answers must be a list of texts"),
        ("vqa-accuracy", asked("?", "a"), "1 answers; at least 4 are needed"),
        ("multiple-choice", asked("?", "a"), "choices must be a list of 2 to 26 texts"),
        ("multiple-choice", asked("?", "a", choices=["x"]), "choices must be a list"),
        ("multiple-choice", asked("?", "C", choices=["x", "y"]), "'C' is neither a choice nor"),
        ("multi-binary", asked("?", "x", choices=["x", "y"]), "qa_uid must name the question's"),
        ("yes-no", asked("?", "perhaps"), "the answer must be yes or no"),
        ("boxes", asked("?", "there"), "'there' must have one box"),
        ("moments", asked("?", "then"), "'then' must have a moment"),
        ("moments", {"video": "v.mp4", "question": "?", "answer": "[0, 1]", "bbox_map": [1]},
         "line 1 .*bbox_map must be an object"),
    ],
)  # fmt: skip
def test_unusable_records_are_named(score: Score, task: str, record: Json, message: str) -> None:
    with pytest.raises(InputError, match=message):
        score(task, [record], "x")


def test_unusable_data_and_options(score: Score, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"must be a \.jsonl file"):
        read_questions(str(tmp_path))
    with pytest.raises(InputError, match="have no questions"):
        read_questions(lines(tmp_path, []))
    with pytest.raises(InputError, match="'7' occurs twice"):
        read_questions(lines(tmp_path, [asked("?", "a", id=7)] * 2))
    with pytest.raises(InputError, match=r"'Hello' must have \{\}"):
        score("exact-match", [asked("?", "a")], "a", prompt="Hello")
    with pytest.raises(InputError, match="does not take --score-choices"):
        score("exact-match", [asked("?", "a")], "a", score_choices=True)


def test_a_missing_image_ends_the_evaluation(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(picture("red"))
    data = lines(tmp_path, [asked("1?", "a"), asked("2?", "a", image="b.png")])
    with pytest.raises(InputError, match=r"line 2 of .*b\.png"):
        evaluate("demo:plm", "exact-match", data)


def test_scores_of_the_demo_equal_its_own_check(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    count = 8
    data = write("locate", count, tmp_path, held_out=True)
    out = tmp_path / "report.json"
    arguments = ["--task", "boxes", "--data", str(data), "--out", str(out)]
    assert main(["eval", "demo:plm", *arguments]) == 0
    assert "mean IoU" in capsys.readouterr().out
    (part,) = json.loads(out.read_text())["parts"]
    answers = [entry["answer"] for entry in part["answers"]]
    records = [held_out_record("locate", number) for number in range(count)]
    right = [is_right("locate", a, r) for a, r in zip(answers, records, strict=True)]
    assert part["metrics"][0]["value"] == sum(right) / count
    assert sum(right) > count / 2
    assert part["groups"][0]["name"] == "locate"
    assert (tmp_path / "report-sheet.png").is_file()


def test_an_encoder_is_refused() -> None:
    with pytest.raises(InputError, match="is an encoder; exact-match is for a language model"):
        evaluate("demo:pe", "exact-match", "data.jsonl")
