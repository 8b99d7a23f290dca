"""`python benchmarks/embed.py --model PE-Core-B16-224 [...]`: engines against PyTorch, in one run.

All rows of a model have the same random weights and images. Each runs in a process of its own that
loads, makes two calls that are not timed, then times `--repeats` calls per batch. The list of rows
runs `--rounds` times, every second time backwards, and samples are pooled, so that a machine that
slows down or speeds up meanwhile does so to every row. The machine's limits are measured in each
round, and the best counts.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NoReturn

try:
    from benchmarks.encoder.report import markdown, summarize
    from benchmarks.encoder.runners import rows_for
    from benchmarks.encoder.worker import run_task
    from benchmarks.flops import vision_macs
    from benchmarks.machine import environment
    from perception_rt.archs import get_config
    from perception_rt.errors import InputError, PerceptionError
    from perception_rt.targets import check_precision, get_target
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

_SCHEMA = 1
_MOST = {"batch": 256, "threads": 1024, "repeats": 1000, "rounds": 100}
_IMAGES = 8
_QUICK_REPEATS = 2


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line, as everything else is."""

    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    try:
        options = _parsed(arguments)
        result = run_benchmark(options)
        print(markdown(result))
        if options.out is not None:
            options.out.write_text(json.dumps(result, indent=1) + "\n")
    except PerceptionError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    return 0


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures everything that checked options ask for; raw samples are in the result."""
    machine = environment()
    measured: list[dict[str, float]] = []
    samples = {name: _run_model(name, options, measured) for name in options.model}
    limits = {key: max(m[key] for m in measured) for key in measured[0]}
    models = []
    for name, rounds in samples.items():
        vision = get_config(name).vision
        rows = rows_for(vision, options.precision)
        records = summarize(vision, rows, rounds, limits)
        models.append({"name": name, "gmacs": vision_macs(vision) / 1e9, "rows": records})
    settings = {k: v for k, v in vars(options).items() if k not in ("model", "out")}
    return {
        "schema": _SCHEMA,
        "environment": machine,
        "settings": settings,
        "limits": limits,
        "limits_by_round": measured,
        "models": models,
    }


def _run_model(
    name: str, options: argparse.Namespace, limits: list[dict[str, float]]
) -> list[dict[str, Any]]:
    """Samples by row name, for each round; appends to `limits` what each round measured."""
    config = get_config(name)
    rows = rows_for(config.vision, options.precision)
    rounds = []
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        common = {"model": name, "config": config.to_dict(), "work": work}
        _progress(f"{name}: preparing")
        count = max(_IMAGES, *options.batch)
        run_task({**common, "do": "prepare", "count": count, "precisions": options.precision})
        for index in range(options.rounds):
            _progress(f"{name}: round {index + 1} of {options.rounds}: limits")
            setup = {"threads": options.threads, "quick": options.quick}
            limits.append(run_task({"do": "limits", **setup}))
            samples = {}
            for row in rows if index % 2 == 0 else reversed(rows):
                _progress(f"{name}: round {index + 1} of {options.rounds}: {row.name}")
                task = {
                    **common,
                    "do": "row",
                    "row": asdict(row),
                    "batches": options.batch,
                    "threads": options.threads,
                    "repeats": options.repeats,
                }
                samples[row.name] = run_task(task)
            rounds.append(samples)
    return rounds


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options with their defaults, checked before any work; InputError names what is wrong."""
    parser = _Parser(prog="embed.py", description="Compare engines with PyTorch on this machine.")
    parser.add_argument("--model", action="append", required=True, help="repeatable")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default: 1 and 8")
    parser.add_argument("--precision", action="append", help="repeatable; default: fp32 and int8")
    parser.add_argument("--threads", type=int, help="default: each library's own")
    parser.add_argument("--repeats", type=int, help="timed calls per round (default: 10)")
    parser.add_argument("--rounds", type=int, help="over all rows (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="raw samples and figures")
    parser.add_argument("--quick", action="store_true", help="a trial: one round of two calls")
    options = parser.parse_args(arguments)
    options.model = _unique(options.model)
    options.batch = sorted(set(options.batch or [1, 8]))
    options.precision = _unique(options.precision or ["fp32", "int8"])
    options.repeats = _or_default(options.repeats, _QUICK_REPEATS if options.quick else 10)
    options.rounds = _or_default(options.rounds, 1 if options.quick else 3)
    _check(options)
    return options


def _check(options: argparse.Namespace) -> None:
    for name in options.model:
        get_config(name)
    for precision in options.precision:
        check_precision(get_target("onnxruntime"), precision)
    numbers = [("batch", value) for value in options.batch]
    numbers += [(name, getattr(options, name)) for name in ("repeats", "rounds")]
    if options.threads is not None:
        numbers.append(("threads", options.threads))
    for name, value in numbers:
        if not 1 <= value <= _MOST[name]:
            raise InputError(f"--{name} must be 1 to {_MOST[name]}, not {value}")
    out = options.out
    if out is not None and (out.suffix != ".json" or out.is_dir() or not out.parent.is_dir()):
        raise InputError(f"--out must be a .json file in an existing folder, not {str(out)!r:.80}")


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value


def _unique(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _progress(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
