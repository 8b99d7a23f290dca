"""`python benchmarks/bulk_embed.py`: a bulk job against a plain loop, and its peak memory.

Makes small JPEG files, 1 % of them broken, in a temporary folder. The job writes a folder of
Parquet shards; the loop calls `embed_images` once per file. Each runs in a process of its own, and
the peak memory is compared between two numbers of items.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

try:
    from benchmarks.command import check_number, check_out, run_command
    from benchmarks.machine import environment
    from benchmarks.rounds import progress
    from benchmarks.tables import MIB, table
    from perception_rt.demo import package_paths
    from perception_rt.errors import BackendError
    from training.arguments import Parser
except ModuleNotFoundError as missing:
    print(f'error: no module {missing.name}; run `pip install -e ".[dev]"` first', file=sys.stderr)
    sys.exit(2)

_SCHEMA = 1
_MOST = {"count": 1_000_000, "few": 1_000_000, "many": 1_000_000, "side": 4096}
_BROKEN = 100  # every so many files is cut short
_CHILD = """
import json, pathlib, sys, time
import numpy as np
import perception_rt as prt
from perception_rt.bulk.run import BulkOptions, embed_sources
from perception_rt.bulk.sources import Sources
from perception_rt.memory import peak_rss_bytes

kind, package, folder, out = sys.argv[1:]
with prt.Embedder.load(package) as engine:
    engine.embed_images([np.zeros((9, 9, 3), np.uint8)])  # opens the engine
    start, rows, errors = time.perf_counter(), 0, 0
    if kind == "job":
        totals = embed_sources(engine, Sources(paths=(folder,)), out, BulkOptions(skip_errors=True))
        rows, errors = totals.rows, totals.errors
    else:
        for path in sorted(pathlib.Path(folder).iterdir()):
            try:
                rows += len(engine.embed_images([path]))
            except prt.InputError:
                errors += 1
    seconds = time.perf_counter() - start
print(json.dumps({"rows": rows, "errors": errors, "seconds": seconds, "peak": peak_rss_bytes()}))
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Measures what checked options ask for."""
    machine = environment()
    package = options.package or package_paths()["demo:pe"]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory(prefix="perception_rt-benchmark-") as work:
        most = max(options.count, options.few, options.many)
        progress(f"{most} JPEG files of {options.side} x {options.side} pixels")
        files = write_images(Path(work) / "files", most, options.side)
        for kind, count in (
            ("job", options.count),
            ("loop", options.count),
            ("job", options.few),
            ("job", options.many),
        ):
            progress(f"{kind}: {count} files")
            folder = Path(work) / f"{len(runs)}"
            folder.mkdir()
            for path in files[:count]:
                (folder / path.name).hardlink_to(path)
            runs.append({
                "kind": kind, "count": count,
                **_measure(kind, package, folder, Path(work) / f"out{len(runs)}"),
            })  # fmt: skip
    return {"schema": _SCHEMA, "environment": machine, "side": options.side, "runs": runs}


def write_images(folder: Path, count: int, side: int) -> list[Path]:
    """Writes JPEG files of coloured squares; the last of each hundred is cut short."""
    folder.mkdir()
    paths = []
    for index in range(count):
        squares = np.random.default_rng(index).integers(0, 256, (8, 8, 3), np.uint8)
        buffer = io.BytesIO()
        picture = Image.fromarray(squares).resize((side, side), Image.Resampling.BICUBIC)
        picture.save(buffer, "JPEG", quality=85)
        data = buffer.getvalue()
        broken = index % _BROKEN == _BROKEN - 1
        path = folder / f"{index:07}.jpg"
        path.write_bytes(data[: len(data) // 3] if broken else data)
        paths.append(path)
    return paths


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table."""
    machine, side = result["environment"], result["side"]
    cells = (
        [
            "bulk job" if run["kind"] == "job" else "loop over embed_images",
            *(f"{run[name]:,}" for name in ("count", "rows", "errors")),
            f"{run['count'] / run['seconds']:,.0f}",
            f"{run['peak'] / MIB:,.0f}",
        ]
        for run in result["runs"]
    )
    return "\n".join(
        [
            f"{machine['cpu']}, {machine['cores']} cores; perception_rt "
            f"{machine['perception_rt']}, onnxruntime {machine['onnxruntime']}; load average: "
            f"{machine['load_average']}  ",
            f"JPEG files of {side} x {side} pixels",
            "",
            *table(("run", "files", "rows", "errors", "files/s", "peak RSS, MiB"), cells, {}),
        ]
    )


def _measure(kind: str, package: Path, folder: Path, out: Path) -> dict[str, Any]:
    """Rows, errors, seconds and peak bytes of one run in a process of its own."""
    command = [sys.executable, "-c", _CHILD, kind, str(package), str(folder), str(out)]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    if child.returncode != 0:
        raise BackendError(f"a run failed: {child.stderr.strip()[-300:]}")
    found: dict[str, Any] = json.loads(child.stdout)
    return found


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parses the options and checks them before any work."""
    parser = Parser(prog="bulk_embed.py", description="Embed many small images, timed.")
    add = parser.add_argument
    add("--package", type=Path, metavar="DIR", help="a package to measure instead of demo:pe")
    add("--count", type=int, default=3000, help="files of the comparison (default: 3000)")
    add("--few", type=int, default=1000, help="files of the first memory run (default: 1000)")
    add("--many", type=int, default=10_000, help="files of the second (default: 10000)")
    add("--side", type=int, default=160, help="pixels (default: 160)")
    add("--out", type=Path, metavar="FILE.json", help="figures of each run")
    options = parser.parse_args(arguments)
    for name, most in _MOST.items():
        check_number(name, getattr(options, name), 1, most)
    check_out(options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
