"""Trains a model: `torchrun training/train.py RECIPE.yaml [--set key=value ...]`.

Runs one process if started with `python` instead. With `--plan`, prints memory and time needs and
does not train. Exits with 2 for a wrong recipe or option, with 1 if the run fails.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

try:
    from perception_rt.errors import InputError, PerceptionError
    from training.arguments import Parser
    from training.distributed import process_group
    from training.planning.memory import report
    from training.recipe.schema import load_config
    from training.tasks.registry import make_task
    from training.trainer import Trainer
except ModuleNotFoundError as error:
    print(f'error: no module {error.name}; run `pip install -e ".[train]"` first', file=sys.stderr)
    sys.exit(2)


def main(arguments: Sequence[str]) -> int:
    """Runs the recipe of a command line and returns the exit status."""
    parser = Parser(description="Trains a PE or PLM as its recipe says.")
    parser.add_argument("recipe", type=Path, help="YAML file; training/configs has examples")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="override one setting, for example optim.lr=0.001; repeatable",
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
    try:
        options = parser.parse_args(arguments)
        config = load_config(options.recipe, options.set)
        if options.plan:
            print(report(config, options.ranks))
            return 0
        with process_group(config.run.device, config.parallel.tensor) as group:
            Trainer(config, make_task(config), group).run()
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except OSError as error:  # for example a full disk while metrics are written
        name = Path(str(error.filename or "a file")).name
        print(f"error: {name}: {error.strerror or 'failed'}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
