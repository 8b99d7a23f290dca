"""Trains a model: `torchrun training/train.py RECIPE.yaml --set key=value ...`.

Runs one process if started with `python` instead. With `--plan`, prints memory and time needs and
does not train. Exits with 2 for a wrong recipe or option, with 1 if the run fails.
"""

import argparse
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path

try:
    from perception_rt.errors import InputError, PerceptionError, escaped
    from training.arguments import Parser
    from training.distributed import Launch, is_first_process, process_group
    from training.planning.memory import report
    from training.recipe.schema import TrainConfig, load_config
    from training.tasks.registry import make_task
    from training.tasks.task import Task
    from training.trainer import Trainer, check
except ModuleNotFoundError as error:
    print(f'error: no module {error.name}; run `pip install -e ".[train]"` first', file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str]) -> int:
    """Runs the recipe of a command line and returns the exit status.

    All processes check the recipe before they form a group, and one of them prints a mistake.
    """
    prepared: tuple[TrainConfig, Task] | None = None
    failure: PerceptionError | OSError | None = None
    try:
        options = _parse(arguments)
        if options.plan:
            return _plan(options) if is_first_process() else 0
        prepared = _prepare(options)
    except (PerceptionError, OSError) as error:
        failure = error
    launch = Launch()
    ready = launch.all_ready(None if failure is None else partial(_fail, failure))
    if prepared is None or not ready:
        return _status(failure)
    config, task = prepared
    try:
        with process_group(config.run.device, config.parallel.tensor, launch.store) as group:
            Trainer(config, task, group).run()
    except (PerceptionError, OSError) as error:
        return _fail(error)
    return 0


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(
        description="Trains a PE or PLM as its recipe says.",
        epilog="example: torchrun training/train.py training/configs/pe_demo.yaml "
        "--set run.out_dir=out/demo optim.lr=0.001",
    )
    parser.add_argument("recipe", nargs="?", help="YAML file; training/configs has examples")
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="override settings, for example optim.lr=0.001; repeatable",
    )
    parser.add_argument(
        "--plan", action="store_true", help="print memory and time needs, and do not train"
    )
    parser.add_argument(
        "--ranks",
        type=int,
        nargs="+",
        default=[8, 64],
        metavar="N",
        help="numbers of GPUs to plan for (default: 8 64)",
    )
    options = parser.parse_args(arguments)
    if options.recipe is None:  # `--set` also takes a recipe that follows it
        others = [setting for setting in options.set if "=" not in setting]
        if len(others) != 1:
            parser.error("the following arguments are required: recipe")
        options.set.remove(others[0])
        options.recipe = others[0]
    return options


def _plan(options: argparse.Namespace) -> int:
    """Prints memory and time needs and returns the exit status."""
    try:
        print(report(load_config(Path(options.recipe), options.set), options.ranks))
    except PerceptionError as error:
        return _fail(error)
    return 0


def _prepare(options: argparse.Namespace) -> tuple[TrainConfig, Task]:
    """Reads and checks a recipe; returns it with its task."""
    config = load_config(Path(options.recipe), options.set)
    task = make_task(config)
    check(config, task)
    return config, task


def _fail(error: PerceptionError | OSError) -> int:
    """Prints an error and returns the exit status."""
    message = str(error)
    if isinstance(error, OSError):  # for example a full disk while metrics are written
        message = f"{Path(str(error.filename or 'a file')).name}: {error.strerror or 'failed'}"
    print(f"error: {escaped(message)}", file=sys.stderr, flush=True)
    return _status(error)


def _status(error: PerceptionError | OSError | None) -> int:
    """Exit status for an error; None stands for another process's."""
    return 2 if error is None or isinstance(error, InputError) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
