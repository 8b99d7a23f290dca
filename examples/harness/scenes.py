"""Functions of the tasks in the YAML files beside this: questions about rows of digits."""

from pathlib import Path
from typing import Any

from PIL import Image

from training.demo.questions import is_right

FOLDER = Path("out/harness/scenes")

Document = dict[str, Any]


def visuals(document: Document) -> list[Any]:
    """Images of a question, or the path of its video."""
    if "video" in document:
        return [str(FOLDER / document["video"])]
    return [Image.open(FOLDER / name) for name in document["image"]]


def question(document: Document) -> str:
    """The question."""
    return str(document["conversations"][0]["value"])


def answer(document: Document) -> str:
    """The expected answer."""
    return str(document["conversations"][1]["value"])


def score(document: Document, answers: list[str]) -> dict[str, float]:
    """Whether the answer is right, for the mean over all questions and over those of its kind."""
    right = float(is_right(document["kind"], answers[0], document))
    return {"right": right, document["kind"]: right}


def number_of_answer(document: Document) -> int:
    """Number of the right choice."""
    return int(document["choices"].index(answer(document)))
