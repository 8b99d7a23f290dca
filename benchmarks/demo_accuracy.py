"""`python benchmarks/demo_accuracy.py [--count N]`: accuracy of PLM-Demo in each precision.

Exports the model in each precision, asks about held-out scenes, and prints a Markdown table. The
digits are by writers that the model has not seen; see `training/demo/questions.py`.
"""

import argparse
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import perception_rt as prt
from benchmarks.command import check_out, run_command
from benchmarks.rounds import progress
from benchmarks.tables import table
from perception_rt.export import ExportOptions, export
from training.arguments import Parser
from training.demo.questions import LEARNED, Record, held_out_record, is_right

# Of a TensorRT package, ONNX Runtime runs the graphs that engines are built from.
GRAPHS: dict[str, Any] = {"backend": "tensorrt", "target": ()}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "int8": {},
    "int4": {},
    "fp16": GRAPHS,
    "fp8": GRAPHS,
}
SETS = ("read3", *LEARNED)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    return run_command(arguments, _parsed, run_benchmark, markdown)


def request(found: Record) -> prt.Request:
    """A request that asks the question of a record."""
    image = found["image"]
    images = image if isinstance(image, list) else [image]
    question = found["conversations"][0]["value"]
    return prt.Request(question, images=images, max_new_tokens=160)


def backend_of(precision: str) -> str:
    """The backend that runs a package of this precision on the CPU."""
    return "onnxruntime" if PRECISIONS[precision] is GRAPHS else "auto"


def accuracy(package: Path, names: Sequence[str], count: int, backend: str) -> dict[str, float]:
    """Share of right answers, 0 to 1, to `count` questions of each set."""
    shares = {}
    with prt.Generator.load(package, backend=backend) as plm:
        for name in names:
            records = [held_out_record(name, number) for number in range(count)]
            results = plm.generate_batch([request(found) for found in records])
            right = sum(
                is_right(name, result.text, found)
                for result, found in zip(results, records, strict=True)
            )
            shares[name] = right / count
    return shares


def run_benchmark(options: argparse.Namespace) -> dict[str, Any]:
    """Shares of right answers, 0 to 1, by precision and set of questions."""
    model = {"checkpoint": options.checkpoint} if options.checkpoint else {"model": "PLM-Demo"}
    shares = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in [options.precision] if options.precision else PRECISIONS:
            package = Path(folder) / precision
            how = {**model, **PRECISIONS[precision], "precision": precision, "out": package}
            export(ExportOptions(**how), progress)
            shares[precision] = accuracy(package, SETS, options.count, backend_of(precision))
            progress(f"{precision}: {shares[precision]}")
    return {"count": options.count, "accuracy": shares}


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table in percent."""
    columns = (f"{result['count']} questions each", *SETS, "mean but read3")
    rows = [
        [precision, *(f"{100 * shares[name]:.1f}" for name in SETS), _mean(shares)]
        for precision, shares in result["accuracy"].items()
    ]
    return "\n".join(table(columns, rows, {}))


def _mean(shares: Mapping[str, float]) -> str:
    return f"{100 * sum(shares[name] for name in LEARNED) / len(LEARNED):.1f}"


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        prog="demo_accuracy.py",
        description="Accuracy of PLM-Demo: the shipped weights, in each precision.",
    )
    parser.add_argument("--count", type=int, default=500, help="questions of each kind")
    parser.add_argument("--checkpoint", help="folder of a training run, instead of PLM-Demo")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="the shares")
    options = parser.parse_args(arguments)
    check_out(options.out)
    return options


if __name__ == "__main__":
    sys.exit(main())
