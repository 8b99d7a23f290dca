"""Common parts of the benchmark commands: options, one-line errors, a report, a JSON file."""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perception_rt.errors import InputError, PerceptionError


def run_command(
    arguments: Sequence[str] | None,
    parse: Callable[[Sequence[str] | None], argparse.Namespace],
    measure: Callable[[argparse.Namespace], Mapping[str, Any]],
    report: Callable[[Mapping[str, Any]], str],
) -> int:
    """Parses options, measures, prints the report and writes the result to `options.out`.

    Returns:
        The exit status: 0, 1 for a failure, 2 for wrong input, 130 for an interrupt.
    """
    try:
        options = parse(arguments)
        result = measure(options)
        print(report(result))
        if options.out is not None:
            write_json(options.out, result)
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def write_json(path: Path, result: Mapping[str, Any]) -> None:
    """Writes a result as indented JSON."""
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def check_number(name: str, value: int, least: int, most: int) -> None:
    """Raises InputError unless the value of option `--name` is in a range."""
    if not least <= value <= most:
        raise InputError(f"--{name} must be {least} to {most}, not {value}")


def check_out(path: Path | None) -> None:
    """Raises InputError unless `--out` is None or a .json file in an existing folder."""
    if path is not None and (path.suffix != ".json" or path.is_dir() or not path.parent.is_dir()):
        raise InputError(f"--out must be a .json file in an existing folder, not {str(path)!r:.80}")


def or_default(value: int | None, default: int) -> int:
    """`value`, or `default` if the option was left out."""
    return default if value is None else value
