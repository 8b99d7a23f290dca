"""Tasks as data: name, family, function and the options that each takes."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from perception_rt.errors import InputError
from perception_rt.families import PE, Family


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskOptions:
    """Options of tasks; None leaves an option out, and a task refuses those that it does not take.

    Attributes:
        classes: file of class names, one per line or a JSON list, in the order of the class
            numbers; or "imagenet".
        templates: file of templates, one per line or a JSON list, each with one `{}`; or
            "imagenet".
    """

    classes: Path | str | None = None
    templates: Path | str | None = None

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
        run: "module:function" called with the loaded package, the path of the data, `TaskOptions`
            and `on_progress`, which returns a `TaskResult`.
        options: fields of `TaskOptions` that it takes.
    """

    name: str
    family: Family
    text: str
    run: str
    options: tuple[str, ...] = ()


_TASKS: tuple[Task, ...] = (
    Task(
        name="zero-shot",
        family=PE,
        text="classify images by class names and templates",
        run="perception_rt.evaluation.zero_shot:run",
        options=("classes", "templates"),
    ),
)
TASKS = {task.name: task for task in _TASKS}


def get_task(name: str) -> Task:
    """The record of a task; InputError names the known ones."""
    try:
        return TASKS[name]
    except KeyError:
        raise InputError(f"unknown task {name!r:.40}; known are {', '.join(TASKS)}") from None
