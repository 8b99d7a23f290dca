"""Metrics of answers against the code of lmms-eval and pycocoevalcap, run without their models.

Slow, and for an environment that has them: `pip install --no-deps lmms-eval==0.7.3
pycocoevalcap==1.2`; the tokens need Java. Functions are taken out of lmms-eval's files, so that its
other dependencies are not needed.
"""

import ast
import importlib.util
import random
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import pytest

from perception_rt.evaluation.metrics import binary, localization, text_answers, vqa
from perception_rt.evaluation.metrics.caption_tokens import caption_tokens
from perception_rt.evaluation.metrics.choices import chosen_number
from perception_rt.evaluation.metrics.cider import cider

pytestmark = pytest.mark.slow

CASES = 20_000
WORDS = (
    "the", "a", "red", "two", "None", "ten", "dont", "couldn'tve", "y'alld've", "whove", "3.5",
    "1,000", "p.m.", "U.S.", "t-shirt", "and/or", "yes", "No!", "what?", "(left)", '"stop"', "it's",
    "50%", ",", ";", "-", "a.b", "x,y", "10:30", "The", "somebody'd",
)  # fmt: skip
SUBJECTS = ("a man", "the dog's owner", "three kids", "A t-shirt", "the girls' bikes", "it")
VERBS = ("isn't eating", "stands next to", "can't see", ", which is red, holds", "they're near")
OBJECTS = (
    'a sign that says "STOP"', "a 10-year-old boy", "1,000 apples", "the St. Mary's church",
    "a cake (with candles)", "a $5 bill", "'70s furniture", "a clock at 3:30 p.m.",
)  # fmt: skip
ENDS = (".", "", "!", "...", " ;", " - outdoors.", ": a still life")
REMOVED = (
    "''", "'", "``", "`", "-LRB-", "-RRB-", "-LCB-", "-RCB-", ".", "?", "!", ",", ":", "-", "--",
    "...", ";",
)  # fmt: skip
OPTIONS = (
    "A", "b", "(A)", "(b)", "B.", "b)", "(a", "(B).", "A:", "B,", "x", "yes", "Apple", "(c)", "ab",
    "I", "(B):", "**(B)**",
)  # fmt: skip


def folder(package: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip(f"{package} is not installed")
    return Path(spec.submodule_search_locations[0])


def taken(file: str, *names: str) -> dict[str, Any]:
    """Functions and classes of one of lmms-eval's files, without its other statements."""
    tree = ast.parse((folder("lmms_eval") / file).read_text("utf-8"))
    wanted = [n for n in tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)]
    found = [node for node in wanted if node.name in names]
    for node in found:
        node.decorator_list = []
    scope: dict[str, Any] = {"re": __import__("re"), "np": np}
    exec(compile(ast.Module(found, []), file, "exec"), scope)
    return scope


@pytest.fixture
def drawn() -> random.Random:
    return random.Random(0)


def test_vqa_accuracy(drawn: random.Random) -> None:
    scope = taken("tasks/_task_utils/vqa_eval_metric.py", "EvalAIAnswerProcessor")
    processor = scope["EvalAIAnswerProcessor"]()

    def normalized(text: str) -> str:
        text = text.replace("\n", " ").replace("\t", " ").strip()
        return str(processor.process_digit_article(processor.process_punctuation(text)))

    def accuracy(answer: str, annotated: list[str]) -> float:
        texts, found = [normalized(text) for text in annotated], normalized(answer)
        others = [texts[:i] + texts[i + 1 :] for i in range(len(texts))]
        return mean(min(1.0, rest.count(found) / 3) for rest in others)

    spaces = (" ", "", ", ", "- ", "  ", "\n")
    for _ in range(CASES):
        words = drawn.choices(WORDS, k=drawn.randint(1, 5))
        text = "".join(word + drawn.choice(spaces) for word in words)
        assert vqa.normalized_answer(text) == normalized(text)
        pool = drawn.choices(WORDS, k=3)
        annotated, answer = drawn.choices(pool, k=10), drawn.choice(pool)
        assert vqa.vqa_accuracy(answer, annotated) == pytest.approx(
            accuracy(answer, annotated), abs=1e-15
        )


def test_anls(drawn: random.Random) -> None:
    anls = taken("api/metrics.py", "anls", "levenshtein_distance")["anls"]

    def text() -> str:
        words = ("".join(drawn.choices("abAB1", k=drawn.randint(1, 6))) for _ in range(2))
        return " ".join(words)

    for _ in range(CASES):
        accepted = [text() for _ in range(drawn.randint(1, 3))]
        answer = drawn.choice([text(), *accepted, accepted[0] + "x"])
        wanted = anls(accepted, [answer])["anls"]
        assert text_answers.anls(answer, accepted) == pytest.approx(wanted, abs=1e-15)


def test_relaxed_match(drawn: random.Random) -> None:
    relaxed = taken("tasks/chartqa/utils.py", "relaxed_correctness")["relaxed_correctness"]
    targets = ["12", "12.5", "0", "0.12", "12%", "Yes", "blue", "-3", "1e3", "105", "100", "5.0%"]
    for _ in range(CASES):
        target = drawn.choice(targets)
        answer = drawn.choice([*targets, "yes", "%", str(round(drawn.uniform(0, 110), 2))])
        assert text_answers.relaxed_match(answer, [target]) == relaxed(answer, target)


def test_yes_no(drawn: random.Random) -> None:
    names = [f"pope_aggregate_{name}" for name in ("precision", "recall", "f1_score")]
    scope = taken("tasks/pope/utils.py", *names)
    for _ in range(2000):
        pairs = [drawn.choices(("yes", "no"), k=2) for _ in range(drawn.randint(1, 30))]
        records = [{"prediction": a, "ground_truth": b} for a, b in pairs]
        answered, expected = np.array(pairs).T == "yes"
        for name in names:
            own = getattr(binary, name.removeprefix("pope_aggregate_"))
            found = own(answered.astype(float), expected.astype(float))
            assert found == pytest.approx(scope[name](records), abs=1e-15)


def test_moments(drawn: random.Random) -> None:
    scope = taken("tasks/plm_videobench/eval_utils.py", "calculate_iou", "evaluate_detections")
    for _ in range(CASES):
        first, second = ([round(drawn.uniform(0, 30), 1) for _ in range(2)] for _ in range(2))
        if second[0] == second[1]:
            continue
        _, recalls, ious, _ = scope["evaluate_detections"](np.array([first]), np.array([second]))
        segment = localization.parse_segment(str(first))
        assert segment is not None
        iou = localization.segment_iou(segment, (min(second), max(second)))
        assert iou == pytest.approx(ious[0, 0], abs=1e-7)  # it adds 1e-8 to the union
        assert list(localization.segment_recalls(iou).values()) == recalls


def test_letters() -> None:
    check = taken("tasks/plm_videobench/fgqa/fgqa_utils.py", "check_ans")["check_ans"]
    for prefix in ("", "Answer: ", "answer:", "The answer is "):
        for text in (f"{prefix}{option}{rest}" for option in OPTIONS for rest in ("", " because")):
            for number, right in enumerate("ABC"):
                assert (chosen_number(text) == number) == check(text, f"({right}) some text")


def penn_tokens(captions: list[str]) -> Iterator[str]:
    if shutil.which("java") is None:
        pytest.skip("Java is not installed")
    jar = folder("pycocoevalcap") / "tokenizer" / "stanford-corenlp-3.4.1.jar"
    command = ["java", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    done = subprocess.run(
        [*command, "-preserveLines", "-lowerCase"], input="\n".join(captions), text=True,
        capture_output=True, check=True,
    )  # fmt: skip
    for line in done.stdout.split("\n")[: len(captions)]:
        yield " ".join(token for token in line.split() if token not in REMOVED)


def test_captions(drawn: random.Random) -> None:
    file = folder("pycocoevalcap") / "cider" / "cider_scorer.py"
    spec = importlib.util.spec_from_file_location("cider_scorer", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    parts = (SUBJECTS, VERBS, OBJECTS)
    captions = [
        " ".join(map(drawn.choice, parts)) + drawn.choice(ENDS) for _ in range(3000)
    ]  # fmt: skip
    tokens = dict(zip(captions, penn_tokens(captions), strict=True))
    assert {caption: " ".join(caption_tokens(caption)) for caption in captions} == tokens
    for count in (1, 2, 7, 100, 500):
        references = [drawn.choices(captions, k=drawn.randint(1, 5)) for _ in range(count)]
        own = [drawn.choice([drawn.choice(captions), texts[0]]) for texts in references]
        scorer = module.CiderScorer(n=4, sigma=6.0)
        for caption, texts in zip(own, references, strict=True):
            scorer += (tokens[caption], [tokens[text] for text in texts])
        np.testing.assert_allclose(cider(own, references), scorer.compute_score()[1], atol=1e-13)
