"""Reads questions with their right answers from a jsonl file."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perception_rt.bulk.listing import Item, Kind
from perception_rt.errors import InputError, SampleError
from perception_rt.evaluation.data.files import read_records
from perception_rt.evaluation.data.labelled import check_items
from perception_rt.processing.boxes import PixelBox
from perception_rt.processing.conversation_layouts import (
    frame_boxes,
    marks_per_question,
    read_layout,
)

_IDS = ("id", "question_id", "uid")
_KINDS = ("kind", "category")
_REMOTE = ("http://", "https://", "data:")


@dataclass(frozen=True, slots=True, kw_only=True)
class Turn:
    """A question of a conversation.

    Attributes:
        text: the question, with its marks.
        items: its images and videos.
    """

    text: str
    items: Sequence[Item]


@dataclass(frozen=True, slots=True, kw_only=True)
class Clip:
    """The part of a video that a question is about.

    Attributes:
        start_s: start in seconds; None for the first frame.
        end_s: end in seconds; None for the last frame.
        boxes: box x1, y1, x2, y2 in pixels to draw into each frame, by its number in the file.
    """

    start_s: float | None
    end_s: float | None
    boxes: Mapping[int, PixelBox]


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question: the last one of a record's conversation.

    Attributes:
        id: the record's `id`, `question_id` or `uid`; else "line N".
        where: place of the record, for messages.
        turns: the earlier questions, then this one.
        answers: answer to each question; the last is the right one.
        system: system prompt; None for the default one.
        clip: the part of a video; None for a whole one.
        kind: the record's `kind` or `category`, for results per kind; "" for none.
        record: the record, for the fields of tasks.
    """

    id: str
    where: str
    turns: Sequence[Turn]
    answers: Sequence[str]
    system: str | None
    clip: Clip | None
    kind: str
    record: Mapping[str, Any]

    @property
    def text(self) -> str:
        """The question."""
        return self.turns[-1].text

    @property
    def answer(self) -> str:
        """The right answer."""
        return self.answers[-1]

    @property
    def items(self) -> list[Item]:
        """Images and videos of the whole conversation."""
        return [item for turn in self.turns for item in turn.items]

    def accepted(self) -> list[str]:
        """All right answers: texts of `answers` or `captions`, else the conversation's answer.

        Raises:
            InputError: the field is no list of texts, or of objects with a text in `answer`.
        """
        found = self.record.get("answers", self.record.get("captions"))
        if found is None:
            return [self.answer]
        listed = found if isinstance(found, list) else []
        texts = [text.get("answer") if isinstance(text, dict) else text for text in listed]
        accepted = [text for text in texts if isinstance(text, str)]
        if not accepted or len(accepted) < len(texts):
            raise InputError(f"{self.where}: answers must be a list of texts")
        return accepted


def read_questions(data: str) -> list[Question]:
    """Reads questions.

    Args:
        data: a `.jsonl` file with a conversation per line, in the layouts of training data
            (`processing/conversation_layouts.py`). Paths are relative to the file. A record with
            `question` needs no `answer` if it has `answers`; one with `captions`, no question.

    Raises:
        InputError: the file or a record is unusable, it has no question, or two have the same id.
    """
    if not data.lower().endswith(".jsonl"):
        raise InputError(f"data {data!r:.200} must be a .jsonl file")
    root = os.path.dirname(data)  # noqa: PTH120
    questions = []
    for number, record in read_records(data):
        where = f"line {number} of {data!r:.200}"
        try:
            questions.append(_question(record, root, where, number))
        except SampleError as error:
            raise InputError(": ".join(filter(None, (where, str(error), error.detail)))) from None
        except InputError as error:
            raise InputError(f"{where}: {error}") from None
    if not questions:
        raise InputError(f"data {data!r:.200} have no questions")
    check_items([], [question.id for question in questions])
    return questions


def _question(record: dict[str, Any], root: str, where: str, number: int) -> Question:
    found = read_layout(_with_answer(record))
    texts, answers = found.texts[::2], found.texts[1::2]
    items = [_item(path, "image", root) for path in found.images]
    if found.video is not None:
        items = [_item(found.video, "video", root)]
    rest = iter(items)
    turns = [
        Turn(text=text, items=[next(rest) for _ in range(count)])
        for text, count in zip(texts, marks_per_question(texts, len(items)), strict=True)
    ]
    return Question(
        id=_name(record, _IDS) or f"line {number}",
        where=where,
        turns=turns,
        answers=answers,
        system=found.system,
        clip=_clip(record) if found.video is not None else None,
        kind=_name(record, _KINDS),
        record=record,
    )


def _with_answer(record: dict[str, Any]) -> dict[str, Any]:
    """The record with an answer, if it has several and the layout asks for one."""
    several = record.get("answers", record.get("captions"))
    if not several or "answer" in record or "caption" in record:
        return record
    first = several[0] if isinstance(several, list) else several
    first = first.get("answer") if isinstance(first, dict) else first
    return {**record, "question": record.get("question", ""), "answer": first}


def _item(path: Any, kind: Kind, root: str) -> Item:
    if isinstance(path, dict):
        path = path.get("path") or path.get("url")
    if not isinstance(path, str) or not path or path.startswith(_REMOTE):
        raise InputError(f"the {kind} is not the path of a local file")
    return Item(kind, os.path.join(root, path.removeprefix("file://")))  # noqa: PTH118


def _clip(record: Mapping[str, Any]) -> Clip | None:
    clip = Clip(
        start_s=record.get("start_time"), end_s=record.get("end_time"), boxes=frame_boxes(record)
    )
    return None if clip.start_s is None and clip.end_s is None and not clip.boxes else clip


def _name(record: Mapping[str, Any], keys: Sequence[str]) -> str:
    """The first text or number of some keys; "" without any."""
    found = next((record[key] for key in keys if record.get(key) is not None), "")
    if type(found) not in (str, int):
        raise InputError(f"{' or '.join(keys)} must be a text or an integer")
    return str(found)
