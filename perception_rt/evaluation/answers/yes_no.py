"""Task: questions whose answer is yes or no, as in POPE."""

from perception_rt.errors import InputError
from perception_rt.evaluation.answers.asking import ask, outcomes, prompt_of
from perception_rt.evaluation.answers.questions import read_questions
from perception_rt.evaluation.metrics import binary
from perception_rt.evaluation.outcomes import Metric, TaskResult, mean_of
from perception_rt.evaluation.tasks import OnProgress, TaskOptions
from perception_rt.runtime.generator import Generator

_METRICS = {"F1": binary.f1_score, "precision": binary.precision, "recall": binary.recall}


def run(plm: Generator, data: str, options: TaskOptions, on_progress: OnProgress) -> TaskResult:
    """Runs the task: accuracy, F1, precision and recall of the answer yes, and its share.

    An answer that is neither is wrong.

    Args:
        plm: a loaded language model.
        data: as for `read_questions`.
        options: `prompt` and the options of `ask`.
        on_progress: called after each batch.

    Raises:
        InputError: the data are unusable, or a right answer is neither yes nor no.
    """
    questions = read_questions(data)
    expected = []
    for question in questions:
        right = binary.yes_or_no(question.answer)
        if right is None:
            raise InputError(f"{question.where}: the answer must be yes or no")
        expected.append(right)
    prompts = [prompt_of(question.text, options) for question in questions]
    answers = ask(plm, questions, prompts, options, on_progress)
    rows = [
        {
            "accuracy": float(binary.yes_or_no(answer) == right),
            "yes": float(binary.yes_or_no(answer) == "yes"),
            "expected yes": float(right == "yes"),
        }
        for answer, right in zip(answers, expected, strict=True)
    ]
    return TaskResult(
        parts={"": outcomes(questions, answers, rows, expected=expected)},
        metrics=[mean_of("accuracy"), *map(_metric, _METRICS), mean_of("yes", "answers yes")],
        settings=options.given(),
    )


def _metric(name: str) -> Metric:
    return Metric(
        name=name, compute=lambda columns: _METRICS[name](columns["yes"], columns["expected yes"])
    )
