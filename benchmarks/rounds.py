"""Runs the tasks of a benchmark in rounds, and records which of them this machine cannot run.

The list of tasks runs once per round, every second time backwards, and samples are pooled: a
machine that slows down or speeds up in the meantime does so to every task. Each round begins with
the machine's limits, of which the best counts.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.limits import LIMITS
from perception_rt.errors import BackendError

Run = Callable[[Mapping[str, Any]], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Task:
    """One measurement, repeated in each round.

    Attributes:
        name: name in the report.
        values: JSON values for the worker.
        ours: True if the task runs our own engine. Its failure stops the benchmark; any other task
            that fails is unavailable on this machine.
    """

    name: str
    values: Mapping[str, Any] = field(repr=False)
    ours: bool = False


@dataclass(slots=True, kw_only=True)
class Measured:
    """Results of the tasks of one group.

    Attributes:
        run: performs the values of a task; raises BackendError if the task fails.
        label: name of the group, in front of the task's name in errors and progress; may be empty.
        samples: results by task name, one per round.
        unavailable: reasons by name of the tasks that this machine cannot run.
    """

    run: Run
    label: str = ""
    samples: dict[str, list[Any]] = field(default_factory=dict)
    unavailable: dict[str, str] = field(default_factory=dict)

    def try_task(self, task: Task) -> Any:
        """Runs a task once and returns its result.

        If a task that is not ours fails, its result is None, its samples are dropped, and `measure`
        leaves it out from then on.

        Raises:
            BackendError: a task of ours failed; the message names it.
        """
        try:
            return self.run(task.values)
        except BackendError as error:
            if task.ours:
                raise BackendError(f"{self.title(task)} failed: {error}") from None
            self.unavailable[task.name] = str(error)
            self.samples.pop(task.name, None)
            return None

    def measure(self, task: Task, where: str) -> None:
        """Adds a sample of a task unless it is unavailable; `where` begins the progress line."""
        if task.name in self.unavailable:
            return
        progress(f"{where}: {self.title(task)}")
        sample = self.try_task(task)
        if task.name not in self.unavailable:
            self.samples.setdefault(task.name, []).append(sample)

    def title(self, task: Task) -> str:
        """The task's name with the label of its group."""
        return f"{self.label}: {task.name}" if self.label else task.name


def limit_tasks(*, threads: int | None, quick: bool) -> list[Task]:
    """One task per limit of the machine; see `limits.measure_limit` for the arguments."""
    setup = {"threads": threads, "quick": quick}
    return [Task(name=name, values={"limit": name, **setup}) for name in LIMITS]


def run_rounds(
    tasks: Sequence[Task],
    measured: Measured,
    limits: Measured,
    *,
    setup: Sequence[Task],
    rounds: int,
) -> None:
    """Runs all tasks `rounds` times.

    Args:
        tasks: what to measure.
        measured: takes the samples of `tasks`.
        limits: takes the samples of `setup`.
        setup: tasks of the machine's limits, which begin each round.
        rounds: number of rounds, at least 1.
    """
    for index in range(rounds):
        where = f"round {index + 1} of {rounds}"
        for task in setup:
            limits.measure(task, where)
        for task in tasks if index % 2 == 0 else reversed(tasks):
            measured.measure(task, where)


def best_limits(limits: Measured) -> dict[str, float]:
    """The best rate of each available limit, by name."""
    return {name: max(rates) for name, rates in limits.samples.items()}


def progress(line: str) -> None:
    """Prints a line to standard error at once."""
    print(line, file=sys.stderr, flush=True)
