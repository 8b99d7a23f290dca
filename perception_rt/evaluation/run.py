"""`evaluate`: runs a task with a package, or with two on the same data."""

import os

from perception_rt.errors import InputError
from perception_rt.evaluation.data.digest import data_digest
from perception_rt.evaluation.report.contents import PartReport, Report, Run
from perception_rt.evaluation.report.figures import check_same_task, compare, figures, group_figures
from perception_rt.evaluation.tasks import OnProgress, Task, TaskOptions, get_task
from perception_rt.families import get_family
from perception_rt.runtime.load import load
from perception_rt.runtime.session import LoadedModel

Model = LoadedModel | str | os.PathLike[str]


def evaluate(
    model: Model,
    task: str,
    data: str | os.PathLike[str],
    options: TaskOptions | None = None,
    *,
    against: Model | None = None,
    on_progress: OnProgress | None = None,
) -> Report:
    """Evaluates a package on a task.

    Args:
        model: a loaded package, or the name or path of one.
        task: name of the task; see `perception_rt.evaluation.tasks.TASKS`.
        data: the data; each task says which forms it reads.
        options: options of the task.
        against: another package, such as the one in fp32, for the points lost against it.
        on_progress: called with the noun of what is counted, the number done and the total.

    Returns:
        The report; `write_report` writes it.

    Raises:
        InputError: the task, an option or the data are unusable, or do not suit the package.
        PackageError, BackendError: as for `perception_rt.load`.
    """
    found = get_task(task)
    path, chosen = os.fspath(data), TaskOptions() if options is None else options
    run = _run(model, found, path, chosen, on_progress)
    other = None if against is None else _run(against, found, path, chosen, on_progress)
    return make_report(found, path, run, other)


def run_task(
    model: LoadedModel,
    task: Task,
    data: str,
    options: TaskOptions,
    on_progress: OnProgress | None = None,
    *,
    name: str = "",
) -> Run:
    """Runs a task with a loaded package.

    Args:
        model: the package.
        task: the task.
        data: path of the data.
        options: options of the task.
        on_progress: as for `evaluate`.
        name: name of the package for the report; "" for the model's.

    Raises:
        InputError: as for `evaluate`.
    """
    task.check(options)
    content = model.manifest.content
    family = get_family(content.family)
    if family != task.family:
        raise InputError(
            f"{content.name} is {family.label}; {task.name} is for {task.family.label}"
        )
    report = on_progress or _ignore
    result = task.function()(model, data, options, report)
    package = {
        "name": name or content.name,
        "id": model.manifest.id,
        "model": content.name,
        "precision": content.target.precision,
        "backend": model.backend,
        "device": model.device,
    }
    return Run(package=package, result=result, digest=data_digest(result, report))


def make_report(task: Task, data: str, run: Run, against: Run | None = None) -> Report:
    """The report of one run, or of one against another.

    Raises:
        InputError: the runs had different data.
    """
    if against is not None:
        check_same_task(run.result, against.result)
        if run.digest != against.digest:
            raise InputError("the data changed between the two packages")
    parts = []
    for name, outcomes in run.result.parts.items():
        metrics = run.result.metrics
        other = None if against is None else against.result.parts[name]
        parts.append(
            PartReport(
                name=name,
                outcomes=outcomes,
                figures=figures(outcomes, metrics),
                groups=group_figures(outcomes, metrics),
                comparison=None if other is None else compare(outcomes, other, metrics),
                other=other,
            )
        )
    return Report(task=task.name, data=data, run=run, against=against, parts=parts)


def _run(
    model: Model, task: Task, data: str, options: TaskOptions, on_progress: OnProgress | None
) -> Run:
    if isinstance(model, LoadedModel):
        return run_task(model, task, data, options, on_progress)
    with load(model) as loaded:
        return run_task(loaded, task, data, options, on_progress, name=os.fspath(model))


def _ignore(*_: object) -> None:
    pass
