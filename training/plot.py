"""Draws training curves: `python training/plot.py RUN_DIR... [--out curves.png]`.

One panel each for loss, learning rate, gradient norm and every evaluated figure, with one line per
run. Exits with 2 if there is nothing to draw.
"""

import argparse
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from perception_rt.errors import InputError
from training.atomic_files import METRICS_FILE

_TRAINING = {"loss": "loss", "lr": "learning rate", "grad_norm": "gradient norm"}
_COLUMNS = 3
_PANEL = (5.0, 3.2)  # inches
# panel title -> (steps, values)
Curves = dict[str, tuple[list[int], list[float]]]


def read_curves(run: Path) -> Curves:
    """Reads the curves of one run by panel title, in panel order.

    Raises:
        InputError: the folder has no metrics, or they are damaged.
    """
    file = run / METRICS_FILE
    curves: Curves = {title: ([], []) for title in _TRAINING.values()}
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError):
        raise InputError(f"no readable {METRICS_FILE} in {run}") from None
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            kind, step = str(event["kind"]), int(event["step"])
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{file}: line {number} is not an event") from None
        for title, value in _points(kind, event):
            steps, values = curves.setdefault(title, ([], []))
            steps.append(step)
            values.append(value)
    return {title: curve for title, curve in curves.items() if curve[0]}


def _points(kind: str, event: Mapping[str, object]) -> list[tuple[str, float]]:
    """The (title, value) points that an event adds."""
    if kind == "train":
        titles = _TRAINING
    elif kind == "eval":
        titles = {name: f"evaluation: {name}" for name in event if name not in ("kind", "step")}
    else:
        return []
    numbers = ((title, event.get(name)) for name, title in titles.items())
    return [(title, float(n)) for title, n in numbers if isinstance(n, int | float)]


def draw(runs: Mapping[str, Curves], out: Path) -> None:
    """Draws runs into a PNG file.

    Args:
        runs: curves by the run's name in the legend.
        out: the PNG file.

    Raises:
        InputError: there is nothing to draw, matplotlib is missing, or the file cannot be written.
    """
    titles = list(dict.fromkeys(title for curves in runs.values() for title in curves))
    if not titles:
        raise InputError("the runs have recorded nothing yet")
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise InputError("drawing needs `pip install matplotlib`") from None
    columns = min(_COLUMNS, len(titles))
    rows = math.ceil(len(titles) / columns)
    figure = Figure(figsize=(columns * _PANEL[0], rows * _PANEL[1]), layout="constrained")
    for index, title in enumerate(titles):
        axes = figure.add_subplot(rows, columns, index + 1, title=title, xlabel="step")
        for name, curves in runs.items():
            steps, values = curves.get(title, ([], []))
            marker = "o" if title.startswith("evaluation") else ""
            axes.plot(steps, values, label=name, linewidth=1, marker=marker, markersize=3)
        axes.grid(alpha=0.3)
    if len(runs) > 1:
        figure.axes[0].legend()
    try:
        figure.savefig(out, format="png", dpi=120)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror}") from None


def main(arguments: Sequence[str]) -> int:
    """Draws the runs of a command line and returns the exit status."""
    parser = argparse.ArgumentParser(description="Draws the training curves of runs as a PNG.")
    parser.add_argument(
        "runs", type=Path, nargs="+", metavar="RUN_DIR", help="run.out_dir of a run"
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("curves.png"),
        help="PNG file to write (default: curves.png)",
    )
    options = parser.parse_args(arguments)
    try:
        draw({str(run): read_curves(run) for run in options.runs}, options.out)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
