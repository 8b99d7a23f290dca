"""`python benchmarks/embed.py --model PE-Core-B16-224 [...]`: engines against PyTorch, in one run.

All rows of a model have the same random weights and images. Each row runs in a process of its own,
which loads, makes two untimed calls, then times `--repeats` calls per batch. All rows run
`--rounds` times. A row or a limit that this machine or installation cannot run is reported as
unavailable with the reason; an engine that fails stops the benchmark.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

try:
    from benchmarks import subprocess_task
    from benchmarks.command import check_number, check_out, or_default, run_command
    from benchmarks.encoder.report import markdown, summarize
    from benchmarks.encoder.runners import PLAIN, Row, rows_for
    from benchmarks.flops import vision_macs
    from benchmarks.machine import environment
    from benchmarks.rounds import Measured, Task, best_limits, limit_tasks, progress, run_rounds
    from perception_rt.archs import get_config
    from perception_rt.targets import check_precision, get_target
    from training.arguments import Parser
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

run_task = partial(subprocess_task.run_task, module="benchmarks.encoder.worker")
run_limit = partial(subprocess_task.run_task, module="benchmarks.limits")

_SCHEMA = 2
_MOST = {"batch": 256, "threads": 1024, "repeats": 1000, "rounds": 100}
_IMAGES = 8
_QUICK_REPEATS = 2


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what checked options ask for; the result holds the figures and the raw samples."""
    machine = environment()
    limits = Measured(run=run_limit, label="limit")
    measured = {name: _run_model(name, options, limits) for name in options.model}
    best = best_limits(limits)
    models = []
    for name, rows in measured.items():
        vision = get_config(name).vision
        records = summarize(vision, rows_for(vision, options.precision), rows.samples, best)
        model = {"name": name, "gmacs": vision_macs(vision) / 1e9, "rows": records}
        models.append({**model, "unavailable": rows.unavailable})
    settings = {k: v for k, v in vars(options).items() if k not in ("model", "out")}
    return {
        "schema": _SCHEMA,
        "environment": machine,
        "settings": settings,
        "limits": best,
        "limit_samples": limits.samples,
        "unavailable_limits": limits.unavailable,
        "models": models,
    }


def _run_model(name: str, options: argparse.Namespace, limits: Measured) -> Measured:
    """Measures all rows of a model, and the machine's limits in each round."""
    config = get_config(name)
    measured = Measured(run=run_task, label=name)
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        common = {"config": config.to_dict(), "work": work}
        progress(f"{name}: preparing")
        values = {**common, "model": name, "count": max(_IMAGES, *options.batch)}
        values["precisions"] = options.precision
        measured.try_task(Task(name="prepare", values={**values, "do": "prepare"}, ours=True))
        measured.try_task(Task(name=PLAIN.name, values={**common, "do": "export plain"}))
        common |= {"batches": options.batch, "threads": options.threads}
        common |= {"repeats": options.repeats}
        rows = rows_for(config.vision, options.precision)
        run_rounds(
            [_row_task(row, common) for row in rows],
            measured,
            limits,
            setup=limit_tasks(threads=options.threads, quick=options.quick),
            rounds=options.rounds,
        )
    return measured


def _row_task(row: Row, common: dict[str, Any]) -> Task:
    values = {**common, "do": "row", "row": asdict(row)}
    return Task(name=row.name, values=values, ours=bool(row.precision))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options, fills in defaults and checks them before any work."""
    parser = Parser(prog="embed.py", description="Compare engines with PyTorch on this machine.")
    parser.add_argument("--model", action="append", required=True, help="repeatable")
    parser.add_argument("--batch", action="append", type=int, help="repeatable; default: 1 and 8")
    parser.add_argument("--precision", action="append", help="repeatable; default: fp32 and int8")
    parser.add_argument("--threads", type=int, help="threads (default: each library's own)")
    parser.add_argument("--repeats", type=int, help="timed calls per round (default: 10)")
    parser.add_argument("--rounds", type=int, help="rounds over all rows (default: 3)")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="raw samples and figures")
    parser.add_argument("--quick", action="store_true", help="a trial: one round of two calls")
    options = parser.parse_args(arguments)
    options.model = _unique(options.model)
    options.batch = sorted(set(options.batch or [1, 8]))
    options.precision = _unique(options.precision or ["fp32", "int8"])
    options.repeats = or_default(options.repeats, _QUICK_REPEATS if options.quick else 10)
    options.rounds = or_default(options.rounds, 1 if options.quick else 3)
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
        check_number(name, value, 1, _MOST[name])
    check_out(options.out)


def _unique(values: list[str]) -> list[str]:
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(main())
