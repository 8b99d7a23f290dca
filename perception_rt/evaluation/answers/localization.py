"""Tasks whose answers are places: boxes in images, and moments in videos."""

from collections.abc import Callable

from perception_rt.errors import InputError
from perception_rt.evaluation.answers.asking import ask, outcomes, prompt_of
from perception_rt.evaluation.answers.questions import read_questions
from perception_rt.evaluation.metrics.localization import (
    THRESHOLDS,
    box_iou,
    parse_segment,
    segment_iou,
    segment_recalls,
)
from perception_rt.evaluation.outcomes import Metric, TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.processing.boxes import parse_boxes
from perception_rt.runtime.generator import Generator

_LEAST_OVERLAP = 0.5  # IoU of a box that counts as found
_Row = dict[str, float]


def run_boxes(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Runs the task of boxes: accuracy at an IoU of 0.5, and the mean IoU.

    Args:
        plm: a loaded language model.
        data: as for `read_questions`. The right answer has one box, "[x1,y1,x2,y2]" in thousandths
            of the image; `<|bbox0|>` stands for the first one of `bbox`.
        options: `prompt` and the options of `ask`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable, or a right answer has not one box.
    """
    metrics = [mean_of("accuracy@0.5"), mean_of("IoU", "mean IoU")]
    return _run(plm, data, options, on_progress, _check_box, _score_box, metrics)


def run_moments(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Runs the task of moments: mean recall, recall at each IoU, and the mean IoU.

    Args:
        plm: a loaded language model.
        data: as for `read_questions`. The right answer has a moment, "[start, end]", in the unit
            that the question asks for.
        options: `prompt` and the options of `ask`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable, or a right answer has no moment.
    """
    metrics = [mean_of("mean recall"), *(mean_of(f"recall@{t}") for t in THRESHOLDS)]
    metrics += [mean_of("IoU", "mean IoU"), mean_of("answered")]
    return _run(plm, data, options, on_progress, _check_moment, _score_moment, metrics)


def _run(
    plm: Generator,
    data: str,
    options: TaskOptions,
    on_progress: OnProgress,
    check: Callable[[str], None],
    score: Callable[[str, str], _Row],
    metrics: list[Metric],
) -> TaskResult:
    questions = read_questions(data)
    for question in questions:
        try:
            check(question.answer)
        except InputError as error:
            raise InputError(f"{question.where}: {error}") from None
    prompts = [prompt_of(question.text, options) for question in questions]
    answers = ask(plm, questions, prompts, options, on_progress)
    rows = [score(a, question.answer) for a, question in zip(answers, questions, strict=True)]
    return TaskResult(
        parts={"": outcomes(questions, answers, rows)},
        metrics=metrics,
        settings=options.given(),
    )


def _check_box(expected: str) -> None:
    if len(parse_boxes(expected)) != 1:
        raise InputError(f"the answer {expected!r:.60} must have one box, [x1,y1,x2,y2]")


def _score_box(answer: str, expected: str) -> _Row:
    iou = box_iou(answer, expected)
    return {"accuracy@0.5": float(iou >= _LEAST_OVERLAP), "IoU": iou}


def _check_moment(expected: str) -> None:
    if parse_segment(expected) is None:
        raise InputError(f"the answer {expected!r:.60} must have a moment, [start, end]")


def _score_moment(answer: str, expected: str) -> _Row:
    found, right = parse_segment(answer), parse_segment(expected)
    assert right is not None
    iou = 0.0 if found is None else segment_iou(found, right)
    recalls = segment_recalls(iou)
    return {
        **recalls,
        "mean recall": sum(recalls.values()) / len(recalls),
        "IoU": iou,
        "answered": float(found is not None),
    }
