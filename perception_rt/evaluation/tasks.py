"""Tasks as data: name, family, function and the options that each takes."""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any, TypeAlias

from perception_rt.errors import InputError
from perception_rt.families import PE, PLM, Family, import_named

# The noun of what is counted, such as "images", the number done and the total.
OnProgress: TypeAlias = Callable[[str, int, int], None]


def _option(text: str, metavar: str = "") -> Any:
    """A field of `TaskOptions`: its help, and how the command line names its value."""
    return field(default=None, metadata={"help": text, "metavar": metavar})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Options of tasks; None leaves an option out, and a task refuses those that it does not take.

    The command line has a flag for each field: `--num-frames` for `num_frames`.
    """

    classes: str | None = _option(
        "class names: a text file with one per line, or a JSON list, in the order of the class "
        "numbers; or imagenet", "FILE",
    )  # fmt: skip
    templates: str | None = _option(
        "sentences with {} for the class name: a text file with one per line, or a JSON list; or "
        "imagenet", "FILE",
    )  # fmt: skip
    train_data: str | None = _option("examples with labels, as DATA", "DATA")
    k: int | None = _option("nearest neighbours that vote (default: 20)", "K")
    temperature: float | None = _option(
        "temperature of the votes: lower favours the nearest (default: 0.07; of tracking, 0.1)", "T"
    )
    dual_softmax: bool | None = _option(
        "rank by a softmax over both directions, which needs all queries at once"
    )
    num_frames: int | None = _option(
        "frames per video (default: 8; of a language model, the most it takes)", "N"
    )
    prompt: str | None = _option(
        "text with {} for the question, such as '{} Answer with one word.'", "TEXT"
    )
    max_new_tokens: int | None = _option("most tokens of an answer (default: 256)", "N")
    max_tiles: int | None = _option("tiles per image (default: the model's limit)", "N")
    score_choices: bool | None = _option(
        "compare the probabilities of the choices' texts, instead of asking for a letter"
    )
    layer: int | None = _option("block whose features are used (default: -1, the last)", "K")
    raw_patches: bool | None = _option(
        "use the pixels of each patch instead of its features, as a baseline"
    )
    ignore_label: int | None = _option("number of pixels that do not count (default: 255)", "N")
    context_frames: int | None = _option("latest frames to take labels from (default: 7)", "N")
    radius: int | None = _option(
        "patches by which labels move between frames; 0: any number (default: 12)", "N"
    )
    top_k: int | None = _option("most similar patches to take labels from (default: 5)", "K")

    def given(self) -> dict[str, Any]:
        """Options that are not None, by name."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """A task.

    Attributes:
        name: name on the command line.
        family: family of the packages that it evaluates.
        text: one line for the help.
        run: "module:function" called with the loaded package, the path of the data as a string,
            `TaskOptions` and an `OnProgress`, which returns a `TaskResult`.
        options: fields of `TaskOptions` that it takes.
    """

    name: str
    family: Family
    text: str
    run: str
    options: tuple[str, ...] = ()

    def check(self, options: TaskOptions) -> None:
        """InputError if an option is given that the task does not take."""
        unknown = [name for name in options.given() if name not in self.options]
        if unknown:
            flags = ", ".join(map(flag, self.options)) or "none"
            raise InputError(f"{self.name} does not take {flag(unknown[0])}; it takes {flags}")

    def function(self) -> Callable[..., Any]:
        """The function that `run` names."""
        found: Callable[..., Any] = import_named(self.run)
        return found


def flag(name: str) -> str:
    """The command-line flag of a field of `TaskOptions`."""
    return f"--{name.replace('_', '-')}"


_ANSWER_OPTIONS = ("prompt", "max_new_tokens", "max_tiles", "num_frames")


def _answers(name: str, run: str, text: str, *more: str) -> Task:
    """A task of language models; `run` is below `perception_rt.evaluation.answers`."""
    return Task(
        name=name,
        family=PLM,
        text=text,
        run=f"perception_rt.evaluation.answers.{run}",
        options=(*_ANSWER_OPTIONS, *more),
    )


_TASKS: tuple[Task, ...] = (
    Task(
        name="zero-shot",
        family=PE,
        text="classify images or videos by class names and templates",
        run="perception_rt.evaluation.encoder.zero_shot:run",
        options=("classes", "templates", "num_frames"),
    ),
    Task(
        name="retrieval",
        family=PE,
        text="find images or videos by their captions, and captions by their images",
        run="perception_rt.evaluation.encoder.retrieval:run",
        options=("dual_softmax", "num_frames"),
    ),
    Task(
        name="knn",
        family=PE,
        text="classify by the nearest labelled examples",
        run="perception_rt.evaluation.encoder.neighbours:run",
        options=("train_data", "classes", "k", "temperature", "num_frames"),
    ),
    Task(
        name="linear-probe",
        family=PE,
        text="classify by logistic regression on frozen embeddings",
        run="perception_rt.evaluation.encoder.linear_probe:run",
        options=("train_data", "classes", "num_frames"),
    ),
    Task(
        name="segmentation",
        family=PE,
        text="label pixels by a linear probe on frozen dense features",
        run="perception_rt.evaluation.encoder.segmentation:run",
        options=("train_data", "classes", "layer", "raw_patches", "ignore_label"),
    ),
    Task(
        name="tracking",
        family=PE,
        text="carry the masks of a video's first frame on by dense features, as in DAVIS",
        run="perception_rt.evaluation.encoder.tracking:run",
        options=(
            "layer", "raw_patches", "context_frames", "radius", "top_k", "temperature"
        ),
    ),
    _answers("exact-match", "texts:run_exact_match", "answers equal to a right one"),
    _answers("vqa-accuracy", "texts:run_vqa", "agreement with several annotators, as in VQAv2"),
    _answers("anls", "texts:run_anls", "edit distance to the right answers, as in DocVQA"),
    _answers("relaxed-accuracy", "texts:run_relaxed", "numbers within 5 %, as in ChartQA"),
    _answers(
        "multiple-choice", "choices:run_choices", "one of several choices, by letter or by score",
        "score_choices",
    ),
    _answers(
        "multi-binary", "choices:run_multi_binary",
        "sets of questions with choices, all of which must be right, as in PLM-VideoBench's FGQA",
    ),
    _answers("yes-no", "yes_no:run", "accuracy and F1 of yes and no, as in POPE"),
    _answers("boxes", "localization:run_boxes", "boxes in images: accuracy at IoU 0.5, mean IoU"),
    _answers(
        "moments", "localization:run_moments",
        "moments in videos: recall at IoU 0.3 to 0.9, as in PLM-VideoBench's RTLoc",
    ),
    _answers("captions", "texts:run_captions", "CIDEr of captions"),
)  # fmt: skip
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """The record of a task; InputError names the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task {name!r:.40}; known are {', '.join(TASKS)}") from None
