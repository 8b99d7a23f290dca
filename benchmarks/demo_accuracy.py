"""`python benchmarks/demo_accuracy.py [--count N]`: accuracy of PLM-Demo in each precision.

Exports the model in each precision, asks about held-out scenes, and prints a Markdown table. The
digits are by writers that the model has not seen; see `training/demo/questions.py`.
"""

import argparse
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path

import perception_rt as prt
from perception_rt.cli import export_main
from training.demo.questions import LEARNED, Record, held_out_record, is_right

# The graphs that TensorRT builds engines from; ONNX Runtime runs them on the CPU.
GRAPHS = ("--backend", "tensorrt", "--target", "none")
PRECISIONS: dict[str, tuple[str, ...]] = {
    "fp32": (),
    "int8": (),
    "int4": (),
    "fp16": GRAPHS,
    "fp8": GRAPHS,
}
SETS = ("read3", *LEARNED)


def request(found: Record) -> prt.Request:
    """A request that asks the question of a record."""
    image = found["image"]
    images = image if isinstance(image, list) else [image]
    question = found["conversations"][0]["value"]
    return prt.Request(question, images=images, max_new_tokens=160)


def accuracy(package: Path, names: Sequence[str], count: int) -> dict[str, float]:
    """Share of right answers, 0 to 1, to `count` questions of each set."""
    shares = {}
    with prt.load(package, backend="onnxruntime") as plm:
        assert isinstance(plm, prt.Generator)
        for name in names:
            records = [held_out_record(name, number) for number in range(count)]
            results = plm.generate_batch([request(found) for found in records])
            right = sum(
                is_right(name, result.text, found)
                for result, found in zip(results, records, strict=True)
            )
            shares[name] = right / count
    return shares


def main(arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(
        description="Accuracy of PLM-Demo: the shipped weights, in each precision."
    )
    parser.add_argument("--count", type=int, default=500, help="questions of each kind")
    parser.add_argument("--checkpoint", help="folder of a training run")
    parser.add_argument("--precision", choices=PRECISIONS, help="only this precision")
    options = parser.parse_args(arguments)
    model = ["--model", "PLM-Demo"]
    if options.checkpoint:
        model = ["--checkpoint", options.checkpoint]
    print(f"| {options.count} questions each | {' | '.join(SETS)} | mean but read3 |")
    print("|---" * (len(SETS) + 2) + "|")
    with tempfile.TemporaryDirectory() as folder:
        for precision in [options.precision] if options.precision else PRECISIONS:
            package = Path(folder) / precision
            how = ["--precision", precision, *PRECISIONS[precision], "--out", str(package)]
            with redirect_stdout(sys.stderr):
                status = export_main([*model, *how])
            if status:
                return status
            shares = accuracy(package, SETS, options.count)
            mean = sum(shares[name] for name in LEARNED) / len(LEARNED)
            cells = " | ".join(f"{100 * shares[name]:.1f}" for name in SETS)
            print(f"| {precision} | {cells} | {100 * mean:.1f} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
