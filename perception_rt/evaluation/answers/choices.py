"""Tasks with choices: by letter or by score, alone or in sets that count as one."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from perception_rt.errors import InputError
from perception_rt.evaluation.answers.asking import ask, model_inputs, outcomes, prompt_of
from perception_rt.evaluation.answers.questions import Question, read_questions
from perception_rt.evaluation.metrics.choices import chosen_number, letter
from perception_rt.evaluation.outcomes import Outcomes, TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.generator import Generator

_MOST = 26  # choices, each with a letter
_BY_LETTER = "{}\nOnly give the best option."  # the wording of PLM-VideoBench
_SET = "qa_uid"
_Row = dict[str, float]


def run_choices(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Runs the task of multiple choice: accuracy of the letter, or of the likeliest choice.

    Args:
        plm: a loaded language model.
        data: as for `read_questions`, with the texts of the choices in `choices`, a list, or in
            `options`, an object whose values they are. The right answer is one of the texts, or
            its letter.
        options: `score_choices` asks the question alone and compares the log-probabilities of the
            texts, as they are and per character. `prompt`; and the options of `ask`.
        on_progress: called after each batch, or after each question.

    Raises:
        InputError: the data are unusable.
    """
    questions = read_questions(data)
    if options.score_choices:
        return _by_score(plm, questions, options, on_progress)
    part, _ = _by_letter(plm, questions, options, on_progress)
    return TaskResult(
        parts={"": part}, metrics=[mean_of("accuracy"), mean_of("answered")],
        settings={"by": "letter", "prompt": _BY_LETTER, **options.given()},
    )  # fmt: skip


def run_multi_binary(
    plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    """Runs multi-binary accuracy: a set of questions counts if every answer is right.

    Args:
        plm: a loaded language model.
        data: as for `run_choices`, and the name of a question's set in `qa_uid`: the layout of
            PLM-VideoBench's FGQA.
        options: `prompt` and the options of `ask`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable, or a question has no set.
    """
    questions = read_questions(data)
    names = [_set_name(question) for question in questions]
    part, rows = _by_letter(plm, questions, options, on_progress)
    sets: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        sets.setdefault(name, []).append(index)
    whole = outcomes(
        [questions[indices[0]] for indices in sets.values()],
        [[part.answers[index] for index in indices] for indices in sets.values()],
        [_set_row([rows[index] for index in indices]) for indices in sets.values()],
        expected=[[part.expected[index] for index in indices] for indices in sets.values()],
    )
    texts = [" / ".join(part.texts[index] for index in indices) for indices in sets.values()]
    return TaskResult(
        parts={"": replace(whole, ids=list(sets), texts=texts, files=part.files)},
        metrics=[mean_of("multi-binary accuracy"), mean_of("mean accuracy")],
        settings={"questions": len(questions), "prompt": _BY_LETTER, **options.given()},
    )


def _set_name(question: Question) -> str:
    name = question.record.get(_SET)
    if type(name) not in (str, int):
        raise InputError(f"{question.where}: {_SET} must name the question's set")
    return str(name)


def _set_row(rows: Sequence[_Row]) -> _Row:
    right = [row["accuracy"] for row in rows]
    return {"multi-binary accuracy": min(right), "mean accuracy": sum(right) / len(right)}


def _by_letter(
    plm: Generator, questions: Sequence[Question], options: TaskOptions, on_progress: OnProgress
) -> tuple[Outcomes, list[_Row]]:
    """Outcomes of questions with lettered choices, and their rows."""
    texts = [_choices(question) for question in questions]
    expected = [_right(question, own) for question, own in zip(questions, texts, strict=True)]
    prompts = [
        prompt_of(_lettered(question, own), options, _BY_LETTER)
        for question, own in zip(questions, texts, strict=True)
    ]
    answers = ask(plm, questions, prompts, options, on_progress)
    rows = []
    for answer, right, own in zip(answers, expected, texts, strict=True):
        number = chosen_number(answer)
        answered = number is not None and number < len(own)
        rows.append({"accuracy": float(number == right), "answered": float(answered)})
    letters = [letter(number) for number in expected]
    return outcomes(questions, answers, rows, expected=letters), rows


def _by_score(
    plm: Generator, questions: Sequence[Question], options: TaskOptions, on_progress: OnProgress
) -> TaskResult:
    answers, expected, rows = list[str](), list[str](), list[_Row]()
    texts = [_choices(question) for question in questions]
    rights = [_right(question, own) for question, own in zip(questions, texts, strict=True)]
    for question, own, right in zip(questions, texts, rights, strict=True):
        totals = np.array(_totals(plm, question, own, options))
        best = int(totals.argmax())
        per_character = int((totals / [len(text) for text in own]).argmax())
        answers.append(own[best])
        expected.append(own[right])
        rows.append(
            {"accuracy": float(best == right), "per character": float(per_character == right)}
        )
        on_progress("questions", len(rows), len(questions))
    return TaskResult(
        parts={"": outcomes(questions, answers, rows, expected=expected)},
        metrics=[mean_of("accuracy"), mean_of("per character", "accuracy per character")],
        settings={"by": "score", **options.given()},
    )


def _totals(
    plm: Generator, question: Question, choices: Sequence[str], options: TaskOptions
) -> list[float]:
    """Log-probability of each choice as the answer."""
    if question.system is not None:
        raise InputError(f"{question.where}: choices cannot be scored with a system prompt")
    prompt = prompt_of(question.text, options)
    inputs = model_inputs(plm, question, options)
    try:
        return [plm.score(prompt, text, **inputs).total for text in choices]
    except InputError as error:
        raise InputError(f"{question.where}: {error}") from None


def _lettered(question: Question, choices: Sequence[str]) -> str:
    """The question with its choices, as PLM-VideoBench writes them."""
    lines = [f"({letter(number)}) {text}" for number, text in enumerate(choices)]
    return "\n".join([f"Question: {question.text}", "Options:", *lines])


def _choices(question: Question) -> list[str]:
    found = question.record.get("choices", question.record.get("options"))
    texts = list(found.values()) if isinstance(found, dict) else found
    if (
        not isinstance(texts, list)
        or not 2 <= len(texts) <= _MOST
        or not all(isinstance(text, str) and text for text in texts)
    ):
        raise InputError(f"{question.where}: choices must be a list of 2 to {_MOST} texts")
    return texts


def _right(question: Question, choices: Sequence[str]) -> int:
    """Number of the right choice."""
    answer = question.answer
    if answer in choices:
        return choices.index(answer)
    number = chosen_number(answer)
    if number is None or number >= len(choices) or len(answer.split()) > 1:
        raise InputError(
            f"{question.where}: the answer {answer!r:.60} is neither a choice nor the letter of one"
        )
    return number
