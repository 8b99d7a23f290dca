"""Tasks whose answers are texts: equality, VQA accuracy, ANLS, relaxed accuracy, captions."""

from collections.abc import Callable

from perception_rt.errors import InputError
from perception_rt.evaluation.answers.asking import ask, outcomes, prompt_of
from perception_rt.evaluation.answers.questions import Question, read_questions
from perception_rt.evaluation.metrics.cider import cider
from perception_rt.evaluation.metrics.text_answers import anls, exact_match, relaxed_match
from perception_rt.evaluation.metrics.vqa import LEAST_ANNOTATORS, vqa_accuracy
from perception_rt.evaluation.outcomes import TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.generator import Generator

Score = Callable[[str, list[str]], float]


def run_exact_match(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Share of answers that are equal to a right one; arguments and errors as `score_texts`."""
    return score_texts(plm, data, options, on_progress, "exact match", exact_match)


def run_anls(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Average normalised Levenshtein similarity; arguments and errors as `score_texts`."""
    return score_texts(plm, data, options, on_progress, "ANLS", anls)


def run_relaxed(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Relaxed accuracy of ChartQA; arguments and errors as `score_texts`."""
    return score_texts(plm, data, options, on_progress, "relaxed accuracy", relaxed_match)


def run_vqa(plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """VQA accuracy; arguments as `score_texts`.

    Raises:
        InputError: as `score_texts`, or a question has the answers of fewer than four annotators.
    """
    return score_texts(
        plm, data, options, on_progress, "VQA accuracy", vqa_accuracy, least=LEAST_ANNOTATORS
    )


def run_captions(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """CIDEr-D of captions; arguments and errors as `score_texts`.

    The rarity of words is that of the whole data, also in intervals and results per kind.
    """
    questions = read_questions(data)
    prompts = [prompt_of(question.text, options) for question in questions]
    accepted = _accepted(questions, 1)
    captions = ask(plm, questions, prompts, options, on_progress)
    scores = cider(captions, accepted)
    rows = [{"CIDEr": float(score)} for score in scores]
    return TaskResult(
        parts={"": outcomes(questions, captions, rows, expected=accepted)},
        metrics=[mean_of("CIDEr")],
        settings=options.given(),
    )


def score_texts(
    plm: Generator,
    data: str,
    options: TaskOptions,
    on_progress: OnProgress,
    name: str,
    score: Score,
    *,
    least: int = 1,
) -> TaskResult:
    """Asks questions and scores each answer by itself.

    Args:
        plm: a loaded language model.
        data: as for `read_questions`; `answers` has all right answers.
        options: `prompt` and the options of `ask`.
        on_progress: called after each batch.
        name: name of the metric.
        score: figure of an answer, 0 to 1, from it and the right answers.
        least: fewest right answers of a question.

    Raises:
        InputError: the data are unusable; also errors of `ask`.
    """
    questions = read_questions(data)
    prompts = [prompt_of(question.text, options) for question in questions]
    accepted = _accepted(questions, least)
    answers = ask(plm, questions, prompts, options, on_progress)
    rows = [{name: score(a, right)} for a, right in zip(answers, accepted, strict=True)]
    return TaskResult(
        parts={"": outcomes(questions, answers, rows, expected=accepted)},
        metrics=[mean_of(name)],
        settings=options.given(),
    )


def _accepted(questions: list[Question], least: int) -> list[list[str]]:
    found = []
    for question in questions:
        texts = question.accepted()
        if len(texts) < least:
            raise InputError(f"{question.where}: {len(texts)} answers; at least {least} are needed")
        found.append(texts)
    return found
