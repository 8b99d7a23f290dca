"""Asks a language model questions in batches, and lays out the outcomes."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from perception_rt.bulk.listing import Item
from perception_rt.errors import InputError
from perception_rt.evaluation.answers.questions import Question, Turn
from perception_rt.evaluation.outcomes import Outcomes
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.processing.video import load_frames
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Exchange, Request

MAX_NEW_TOKENS = 256
_BATCH = 32  # requests between two reports of progress; clips of videos are in memory as tiles
_NO_PICTURE = Item("image", "", "missing")


def prompt_of(text: str, options: TaskOptions, default: str = "{}") -> str:
    """A question in the option `prompt`, or in a task's own.

    Raises:
        InputError: the option has no {}.
    """
    template = default if options.prompt is None else options.prompt
    if "{}" not in template:
        raise InputError(f"the prompt {template!r:.100} must have {{}} for the question")
    return template.replace("{}", text)


def ask(
    plm: Generator,
    questions: Sequence[Question],
    prompts: Sequence[str],
    options: TaskOptions,
    on_progress: OnProgress,
) -> list[str]:
    """Answers to questions, without white space around them.

    Args:
        plm: a loaded language model.
        questions: the questions.
        prompts: text of each question.
        options: `max_new_tokens`, `max_tiles` and `num_frames`.
        on_progress: called after each batch.

    Raises:
        InputError: an image, a video or a text is unusable; names the question.
        CapacityError: a question does not fit into memory.
    """
    answers = list[str]()
    most = MAX_NEW_TOKENS if options.max_new_tokens is None else options.max_new_tokens
    for start in range(0, len(questions), _BATCH):
        own = questions[start : start + _BATCH]
        requests = [
            Request(prompt, max_new_tokens=most, system=question.system,
                    **model_inputs(plm, question, options))
            for question, prompt in zip(own, prompts[start : start + _BATCH], strict=True)
        ]  # fmt: skip
        results = plm.generate_batch(requests, on_error=_failing(own))
        answers += [result.text.strip() for result in results if result is not None]
        on_progress("questions", len(answers), len(questions))
    return answers


def model_inputs(plm: Generator, question: Question, options: TaskOptions) -> dict[str, Any]:
    """Images, videos, history and budgets of a question, as arguments of `Request`.

    Raises:
        InputError: a clip of a video is unusable.
    """
    *earlier, last = question.turns
    history = [
        Exchange(prompt=turn.text, answer=answer, **_media(plm, question, turn, options))
        for turn, answer in zip(earlier, question.answers, strict=False)
    ]
    return {
        **_media(plm, question, last, options),
        "history": history,
        "max_tiles": options.max_tiles,
        "num_frames": options.num_frames,
    }


def outcomes(
    questions: Sequence[Question],
    answers: Sequence[Any],
    columns: Sequence[Mapping[str, float]],
    *,
    expected: Sequence[Any] | None = None,
) -> Outcomes:
    """Outcomes of questions.

    Args:
        questions: the questions.
        answers: the model's answer to each.
        columns: figures of each by name, the same names for all.
        expected: right answer to each; None for those of the records.
    """
    kinds = [question.kind for question in questions]
    pictures = [question.items[0] if question.items else _NO_PICTURE for question in questions]
    return Outcomes(
        ids=[question.id for question in questions],
        expected=[question.answer for question in questions] if expected is None else expected,
        answers=answers,
        columns={name: np.array([row[name] for row in columns]) for name in columns[0]},
        groups=kinds if any(kinds) else (),
        texts=[question.text for question in questions],
        pictures=() if all(item is _NO_PICTURE for item in pictures) else pictures,
        files=[item for question in questions for item in question.items],
    )


def _media(plm: Generator, question: Question, turn: Turn, options: TaskOptions) -> dict[str, Any]:
    images = [item.file for item in turn.items if item.kind == "image"]
    videos: list[Any] = [item.file for item in turn.items if item.kind == "video"]
    clip = question.clip
    if clip is not None:
        try:
            videos = [
                load_frames(
                    video, plm.tile_spec, num_frames=options.num_frames, start_s=clip.start_s,
                    end_s=clip.end_s, boxes=clip.boxes,
                )
                for video in videos
            ]  # fmt: skip
        except InputError as error:
            raise InputError(f"{question.where}: {error}") from None
    return {"images": images, "videos": videos}


def _failing(questions: Sequence[Question]) -> Callable[[int, InputError], None]:
    """An `on_error` that names the question: figures of a part of the data would mislead."""

    def fail(index: int, error: InputError) -> None:
        raise InputError(f"{questions[index].where}: {error}")

    return fail
