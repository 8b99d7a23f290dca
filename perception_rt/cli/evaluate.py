"""The command `perception-rt eval`: scores of a package on a task, as a table and a report."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from perception_rt.cli.arguments import CommandParser, output_path, package_arguments
from perception_rt.errors import InputError, escaped
from perception_rt.families import Family
from perception_rt.progress import Progress

if TYPE_CHECKING:
    from perception_rt.evaluation.report.contents import PartReport, Report
    from perception_rt.evaluation.tasks import TaskOptions

_SHOWN_GROUPS = 20
_NAME_WIDTH = 16  # of a metric, at least


def add_evaluate_arguments(parser: CommandParser) -> None:
    """Adds the arguments of the command: its own, and those of the tasks."""
    from perception_rt.evaluation.tasks import TASKS, TaskOptions, flag

    package_arguments(parser)
    parser.add_argument("--task", required=True, choices=list(TASKS), help="what to evaluate")
    parser.add_argument(
        "--data", required=True, metavar="DATA", help="the items, as the task reads"
    )
    parser.add_argument(
        "--against", metavar="DIR", help="another package, such as the one in fp32, for the points "
        "lost against it"
    )  # fmt: skip
    parser.add_argument(
        "--out", metavar="FILE.json", help="report to write; pictures are written beside it"
    )
    for option in fields(TaskOptions):
        help_line = f"{option.metadata['help']} [{_takers(option.name)}]"
        kind = _kind(option)
        if kind is bool:
            parser.add_argument(flag(option.name), action="store_const", const=True, help=help_line)
        else:
            parser.add_argument(
                flag(option.name), type=kind, metavar=option.metadata["metavar"], help=help_line
            )
    lines = "\n".join(f"  {task.name:<18}{task.text}" for task in TASKS.values())
    parser.epilog = f"tasks:\n{lines}\n\n{parser.epilog}"


def _kind(option: Any) -> Any:
    """Type of an option's value."""
    kinds = {"bool": bool, "int": int, "float": float}
    return kinds.get(str(option.type).partition(" ")[0], str)


def named_options(values: Sequence[str]) -> "TaskOptions":
    """Options of a task from texts such as "k=5".

    Raises:
        InputError: a text is not NAME=VALUE, a name is unknown, or a value is of the wrong type.
    """
    from perception_rt.evaluation.tasks import TaskOptions

    known = {option.name: option for option in fields(TaskOptions)}
    found: dict[str, Any] = {}
    for text in values:
        name, equals, value = text.partition("=")
        if not equals or name not in known:
            raise InputError(f"{text!r:.80} is not NAME=VALUE with a NAME of {', '.join(known)}")
        kind = _kind(known[name])
        try:
            found[name] = value == "true" if kind is bool else kind(value)
        except ValueError:
            raise InputError(f"{name} must be of type {kind.__name__}, not {value!r:.60}") from None
    return TaskOptions(**found)


def _takers(option: str) -> str:
    """The tasks that take an option: by name, or by family if all of a family do."""
    from perception_rt.evaluation.tasks import TASKS

    names = list[str]()
    for family in dict.fromkeys(task.family for task in TASKS.values()):
        tasks = [task for task in TASKS.values() if task.family == family]
        takers = [task.name for task in tasks if option in task.options]
        names += takers if len(takers) < len(tasks) else [f"all tasks of {family.label}"]
    return ", ".join(names)


def task_options(options: argparse.Namespace) -> "TaskOptions":
    """The options of tasks among the arguments."""
    from perception_rt.evaluation.tasks import TaskOptions

    return TaskOptions(**{f.name: getattr(options, f.name) for f in fields(TaskOptions)})


class EvaluateCommand:
    """One call of the command: checks the options, evaluates, writes and shows the report.

    Raises:
        InputError: the task does not take an option, or the report cannot be written.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from perception_rt.evaluation.tasks import get_task

        self._options = options
        self._task = get_task(options.task)
        self._task_options = task_options(options)
        self._task.check(self._task_options)
        self._out = None if options.out is None else output_path("--out", options.out, ".json")

    @property
    def family(self) -> Family:
        """Family of the packages that the task evaluates."""
        return self._task.family

    def run(self, load: Callable[[str], AbstractContextManager[Any]], progress: Progress) -> None:
        """Evaluates the packages one after the other, writes and prints.

        Args:
            load: opens a package.
            progress: shows the steps.
        """
        from perception_rt.evaluation.report.output import write_report
        from perception_rt.evaluation.run import make_report, run_task

        options, runs = self._options, []
        for package in filter(None, [options.package, options.against]):
            with load(package) as engine:
                runs.append(
                    run_task(
                        engine, self._task, options.data, self._task_options,
                        counter(progress, package), name=package,
                    )
                )  # fmt: skip
        progress.step("drawing resamples")
        report = make_report(self._task, options.data, *runs)
        files = []
        if self._out is not None:
            progress.step("writing the report")
            files = write_report(report, self._out)
        progress.stop()
        if options.json:
            names = [path.name for path in files[1:]]
            print(json.dumps(report.to_dict(names), indent=1))
            return
        for line in report_lines(report):
            print(escaped(line))
        if files:
            print(escaped(", ".join(map(str, files))))


def counter(progress: Progress, package: str) -> Callable[[str, int, int], None]:
    """A callback for `run_task` that shows what is counted."""
    return lambda noun, done, total: progress.count(
        f"{escaped(package)}: {done} of {total} {noun}", done, total
    )


def report_lines(report: "Report") -> Iterator[str]:
    """The tables of a report."""
    package = report.run.package
    shown = f"{package['model']} {package['precision']} on {package['backend']}"
    yield f"{report.task}, {report.data}: {shown}"
    for part in report.parts:
        title = f"{part.name}, {len(part.outcomes)} items" if part.name else "items"
        yield f"{title if part.name else f'{len(part.outcomes)} items'}"
        width = max(_NAME_WIDTH, *(len(figure.name) + 2 for figure in part.figures))
        for figure in part.figures:
            interval = f"{100 * figure.low:.2f} to {100 * figure.high:.2f}"
            yield f"  {figure.name:<{width}}{100 * figure.value:7.2f} %  {interval:>18}"
        yield from _group_lines(part)
        if report.against is not None:
            yield from _comparison_lines(part, report.against.package)


def _group_lines(part: "PartReport") -> Iterator[str]:
    """Groups, the lowest first."""
    if not part.groups:
        return
    name = part.figures[0].name
    ranked = sorted(part.groups, key=lambda group: group.values[name])[:_SHOWN_GROUPS]
    yield f"  {name} by class, lowest first ({len(ranked)} of {len(part.groups)})"
    for group in ranked:
        yield f"    {group.name:<24} {100 * group.values[name]:7.2f} % of {group.items}"


def _comparison_lines(part: "PartReport", other: Any) -> Iterator[str]:
    found = part.comparison
    assert found is not None
    yield f"  points lost against {other['model']} {other['precision']} ({other['name']})"
    width = max(_NAME_WIDTH, *(len(figure.name) + 2 for figure in found.lost)) - 2
    for figure in found.lost:
        interval = f"{figure.low:.2f} to {figure.high:.2f}"
        yield f"    {figure.name:<{width}}{figure.value:7.2f}    {interval:>18}"
    yield f"    {len(found.changed)} of {len(part.outcomes)} answers changed"
    if found.cosines is not None:
        yield f"    cosine: mean {found.cosines.mean():.6f}, lowest {found.cosines.min():.6f}"
