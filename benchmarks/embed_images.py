"""`python benchmarks/embed_images.py`: `embed_images` on large photographs, by number of workers.

Exports a package, makes photographs of twelve megapixels in a temporary folder, and embeds them
once per number of workers and round, every second round backwards. The rows of all runs must be
bit-equal.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

try:
    import perception_rt as prt
    from benchmarks.command import check_number, check_out, or_default, run_command
    from benchmarks.machine import environment
    from benchmarks.photographs import write_photographs
    from benchmarks.rounds import progress
    from benchmarks.tables import table
    from perception_rt.errors import BackendError
    from perception_rt.export import ExportOptions, export
    from perception_rt.processing.image_loader import default_workers
    from training.arguments import Parser
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

_SCHEMA = 1
_MOST = {"count": 100_000, "height": 20_000, "width": 20_000, "rounds": 100, "workers": 64}
_COLUMNS = ("workers", "images/s", "slowest round", "fastest round", "speed-up")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what checked options ask for; BackendError if the rows of two runs differ."""
    machine = environment()
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        package = options.package or _exported(options, Path(work) / "package")
        progress(f"{options.count} photographs of {options.width} x {options.height} pixels")
        folder = Path(work) / "photographs"
        folder.mkdir()
        photos = write_photographs(folder, options.count, options.width, options.height)
        size = sum(path.stat().st_size for path in photos)
        with prt.Embedder.load(package) as embedder:
            embedder.embed_images(photos[:1])  # opens the engine
            seconds = measure_workers(embedder, photos, options.workers, options.rounds)
            content, package_id = embedder.manifest.content, embedder.manifest.id
            batch = embedder.batch_size
    precision = content.target.precision
    return {
        "schema": _SCHEMA,
        "environment": machine,
        "model": {"name": content.name, "precision": precision, "package": package_id},
        "batch_size": batch,
        "photographs": {
            "count": options.count,
            "width": options.width,
            "height": options.height,
            "bytes": size,
        },
        "default_workers": default_workers(),
        "bit_equal": True,
        "rows": summarize(options.count, seconds),
    }


def measure_workers(
    embedder: prt.Embedder, photos: Sequence[Path], workers: Sequence[int], rounds: int
) -> dict[int, list[float]]:
    """Embeds all photographs once per number of workers and round.

    Returns:
        Seconds of each round, by number of workers.

    Raises:
        BackendError: the rows of two runs are not bit-equal.
    """
    seconds: dict[int, list[float]] = {number: [] for number in workers}
    first: Any = None
    for index in range(rounds):
        for number in workers if index % 2 == 0 else reversed(workers):
            progress(f"round {index + 1} of {rounds}: workers={number}")
            start = time.perf_counter()
            rows = embedder.embed_images(photos, workers=number)
            seconds[number].append(time.perf_counter() - start)
            first = rows if first is None else first
            if not np.array_equal(rows.view(np.uint32), first.view(np.uint32)):
                raise BackendError(f"rows with workers={number} differ from the first run")
    return seconds


def summarize(count: int, seconds: Mapping[int, Sequence[float]]) -> list[dict[str, Any]]:
    """One record per number of workers; rates pool all rounds, and the first record is 1 x."""
    records: list[dict[str, Any]] = []
    for workers, rounds in seconds.items():
        rate = count * len(rounds) / sum(rounds)
        first = records[0]["images_per_s"] if records else rate
        records.append(
            {
                "workers": workers,
                "images_per_s": rate,
                "slowest": count / max(rounds),
                "fastest": count / min(rounds),
                "speed_up": rate / first,
                "seconds": list(rounds),
            }
        )
    return records


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table."""
    machine, model, photos = (result[key] for key in ("environment", "model", "photographs"))
    cells = (
        [
            str(r["workers"]) + (" (default)" if r["workers"] == result["default_workers"] else ""),
            *(f"{r[name]:.2f}" for name in ("images_per_s", "slowest", "fastest", "speed_up")),
        ]
        for r in result["rows"]
    )
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores; perception_rt "
            f"{machine['perception_rt']}, onnxruntime {machine['onnxruntime']}; load average: "
            f"{machine['load_average']}  ",
            f"{model['name']}, {model['precision']}, batch size {result['batch_size']}; "
            f"{photos['count']} JPEG files of {photos['width']} x {photos['height']} pixels, "
            f"{photos['bytes'] / 1e6:,.0f} MB",
            "",
            *table(_COLUMNS, cells, {}),
            "",
            f"rows of all runs bit-equal: {'yes' if result['bit_equal'] else 'NO'}",
        ]
    )


def _exported(options: argparse.Namespace, out: Path) -> Path:
    progress(f"{options.model}: exporting {options.precision}")
    export(ExportOptions(model=options.model, precision=options.precision, out=out), progress)
    return out


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options, fills in defaults and checks them before any work."""
    parser = Parser(prog="embed_images.py", description="Embed large photographs, timed.")
    add = parser.add_argument
    add("--model", default="PE-Demo", help="a model to export (default: PE-Demo)")
    add("--precision", default="fp32", help="precision of the export (default: fp32)")
    add("--package", type=Path, metavar="DIR", help="a package to measure instead of an export")
    add("--count", type=int, help="photographs (default: 300)")
    add("--width", type=int, help="pixels (default: 4000)")
    add("--height", type=int, help="pixels (default: 3000)")
    add("--workers", action="append", type=int, help="repeatable; default: 1 and the default")
    add("--rounds", type=int, help="rounds over all numbers of workers (default: 2)")
    add("--out", type=Path, metavar="FILE.json", help="figures and seconds of each run")
    options = parser.parse_args(arguments)
    options.count = or_default(options.count, 300)
    options.width = or_default(options.width, 4000)
    options.height = or_default(options.height, 3000)
    options.rounds = or_default(options.rounds, 2)
    options.workers = sorted(set(options.workers or [1, default_workers()]))
    numbers = [(name, getattr(options, name)) for name in ("count", "width", "height", "rounds")]
    for name, value in [*numbers, *(("workers", number) for number in options.workers)]:
        check_number(name, value, 1, _MOST[name])
    check_out(options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
