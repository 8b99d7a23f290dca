"""`python benchmarks/gpu_check.py [--out FILE]`: measures what this project runs on a GPU machine.

Takes at most eight minutes. A row that fails, or lacks a library, is in the table with its error.
The GPU's limits are measured first; figures are also given as shares of the limit that bounds them,
with the clock at the time. Weights are random. `--quick` tries the script with tiny models, also on
a CPU.

1. Limits: copy bandwidth, and peak rate of float16 products.
2. PE towers: float16, eager and compiled; images/s at batch 64, milliseconds at batch 1; cosine
   with eager float32.
3. PLM decoders: float16 with a static cache; time to the first token of a 512-token prompt, then
   tokens/s.
4. Engines: each backend on this GPU, compared with the same graphs on the CPU; the demo models
   first, then PE-Core-L14-336 and PLM-1B with random weights.
"""

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import run_command, write_json
from benchmarks.gpu.eager import decoder_rows, tower_rows
from benchmarks.gpu.engines import DEMOS, Engine, engine_rows
from benchmarks.gpu.timing import Bench, Row, gpu_state, limits, sm_clock
from benchmarks.rounds import progress
from benchmarks.tables import table
from perception_rt.archs import get_config
from perception_rt.config import VisionConfig
from perception_rt.errors import InputError
from perception_rt.plm_config import PlmConfig
from perception_rt.targets import TARGETS
from training.arguments import Parser

BUDGET_S = 480
# The most important models come first: time may run out before the last.
MODELS = ("PE-Core-L14-336", "PLM-1B", "PE-Core-G14-448", "PLM-3B", "PLM-8B")
ENGINES = ("PE-Core-L14-336", "PLM-1B")  # each export takes one or two minutes
_MOST_WORDS = 300


def attempts(
    bench: Bench, folder: Path, peak: Row
) -> Iterator[tuple[Row, Callable[[], Iterator[Row]]]]:
    """Yields the measurements: the fields of a row if it fails, and a function that yields rows."""
    tiny = VisionConfig(
        patch_size=8, width=64, layers=2, heads=2, mlp_ratio=4.0, output_dim=32, image_size=32,
        use_cls_token=True, attn_pooler_heads=2,
    )  # fmt: skip
    for model in DEMOS:
        yield from _engines(bench, folder, peak, model)
    for model in MODELS[: 2 if bench.quick else None]:
        config = get_config(model)
        if not isinstance(config, PlmConfig):
            tower = tiny if bench.quick else config.vision
            yield {"model": model}, partial(tower_rows, bench, model, tower, peak)
        else:
            decoder = config.decoder
            if bench.quick:
                decoder = replace(
                    decoder, dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=128,
                    max_seqlen=64,
                )  # fmt: skip
            yield {"model": model}, partial(decoder_rows, bench, model, decoder, peak)
        if model in ENGINES and not bench.quick:
            yield from _engines(bench, folder, peak, model)


def _engines(
    bench: Bench, folder: Path, peak: Row, model: str
) -> Iterator[tuple[Row, Callable[[], Iterator[Row]]]]:
    """Yields the measurements of a model on each backend and precision for GPUs."""
    decodes = model.startswith("PLM")
    for backend, target in TARGETS.items():
        for precision in target.precisions:
            devices = target.devices(precision, decodes=decodes) or ()
            if "cuda" in devices and (precision != "fp32" or model in DEMOS):
                engine = Engine(model=model, backend=backend, precision=precision)
                out = folder / f"{model} {engine.how}"
                row = {"model": model, "how": engine.how}
                yield row, partial(engine_rows, bench, engine, out, peak)


def run(bench: Bench, save: Callable[[Mapping[str, Any]], object]) -> Mapping[str, Any]:
    """Measures all rows and saves them after each attempt; a failed one is a row with its error."""
    rows: list[Row] = []
    started = time.monotonic()
    result: dict[str, Any] = {"gpu": {"before": gpu_state()}, "torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        peak = limits(bench)
        result |= {"limits": peak, "rows": rows}
        for name, measure in attempts(bench, Path(folder), peak):
            if time.monotonic() > bench.deadline:
                rows.append({**name, "failed": "not started: out of time"})
                continue
            try:
                for figures in measure():
                    rows.append({**figures, "sm_mhz": sm_clock()})  # before the clock changes
                    progress(json.dumps(rows[-1]))
            except Exception as error:  # the other rows are measured in any case
                words = " ".join(str(error).split())[:_MOST_WORDS]
                rows.append({**name, "failed": f"{type(error).__name__}: {words}"})
            result["seconds"] = time.monotonic() - started
            save(result)
    result["gpu"]["after"] = gpu_state()
    return result


def markdown(result: Mapping[str, Any]) -> str:
    """Formats a result as a Markdown table; a dash stands for a missing figure."""
    names = ["model", "how"]
    for row in result["rows"]:
        names += [name for name in row if name not in names]
    peak = result["limits"]
    lines = [
        f"{result['gpu']['before']}; torch {result['torch']}; measured limits "
        f"{peak['flops'] / 1e12:.0f} TFLOP/s, {peak['bytes_per_s'] / 1e9:.0f} GB/s.",
        "",
        *table(
            names, ([_text(row.get(name, "-")) for name in names] for row in result["rows"]), {}
        ),
    ]
    return "\n".join(lines)


def _text(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the check; returns the exit status."""
    return run_command(arguments, _parsed, run_check, markdown)


def run_check(options: argparse.Namespace) -> Mapping[str, Any]:
    """Measures what checked options ask for, and writes the figures so far after each attempt."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    deadline = time.monotonic() + BUDGET_S * 0.8

    def save(figures: Mapping[str, Any]) -> None:
        if options.out:
            write_json(options.out, figures)

    return run(Bench(device=device, quick=options.quick, deadline=deadline), save)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(prog="gpu_check.py", description="Measure models and engines on a GPU.")
    parser.add_argument("--out", type=Path, help="JSON file for all figures")
    parser.add_argument("--quick", action="store_true", help="a trial with tiny models")
    options = parser.parse_args(arguments)
    if not (torch.cuda.is_available() or options.quick):
        raise InputError("torch finds no GPU; --quick tries the script on the CPU")
    return options


if __name__ == "__main__":
    sys.exit(main())
