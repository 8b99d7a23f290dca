"""Writes a run's metrics: JSON lines in a file, progress lines on the screen, optional TensorBoard.

Values that depend on the clock or the machine are named in `CLOCK` or end with `_per_s`. All other
values are the same whenever a run is repeated.
"""

import json
import resource
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from perception_rt.errors import InputError
from perception_rt.models.plm import PerceptionLM
from training.atomic_files import write_text
from training.distributed import Group
from training.planning.flops import Work, step_flops
from training.recipe.schema import TrainConfig
from training.tasks.task import MicroBatch

CLOCK = frozenset({"mfu", "memory_gib", "elapsed_s", "remaining_s"})
_DURATIONS = ("elapsed_s", "remaining_s")


class MetricsLog:
    """Appends events to a JSONL file and prints them.

    Args:
        path: JSONL file. Events after `step` are dropped, since a resumed run repeats them.
        step: number of steps that are already done.
        screen: stream for progress lines.
        tensorboard: also write TensorBoard events, into a folder `tensorboard` beside the file.

    Raises:
        InputError: `tensorboard` is set but not installed.
    """

    def __init__(self, path: Path, *, step: int, screen: TextIO, tensorboard: bool = False) -> None:
        self._board = _board(path.with_name("tensorboard"), step) if tensorboard else None
        kept = _lines_up_to(step, path) if step and path.exists() else []
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.path = path
        self.screen = screen

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records one event; `step` is the number of finished steps."""
        event = {"kind": kind, "step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        text = "  ".join(f"{name} {_shown(name, value)}" for name, value in values.items())
        print(f"{kind} step {step}  {text}", file=self.screen, flush=True)
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(f"{kind}/{name}", value, step)
            self._board.flush()


class Meter:
    """Measures throughput, memory and time since the last progress line.

    Args:
        config: the recipe.
        model: the trained module.
        group: this process's place. Rates cover all ranks, assuming that they all work alike.
    """

    def __init__(self, config: TrainConfig, model: nn.Module, group: Group) -> None:
        self._config = config
        self._model = model
        self._group = group
        self._began = time.monotonic()
        self._clear()

    def add(self, parts: Sequence[MicroBatch], seconds: float) -> None:
        """Adds one step that took `seconds`."""
        for part in parts:
            self._counts.update(part.counts)
            self._weight += part.weight
        self._seconds += seconds
        self._steps += 1

    def figures(self, done: int) -> dict[str, float]:
        """Returns rates, memory in GiB and times in seconds since the last call.

        Args:
            done: number of finished steps.
        """
        ranks = self._group.ranks
        rates = {f"{name}_per_s": n * ranks / self._seconds for name, n in self._counts.items()}
        left = self._config.schedule.steps - done
        times = {
            "elapsed_s": time.monotonic() - self._began,
            "remaining_s": left * self._seconds / self._steps,
        }
        figures = {**rates, **self._utilisation(), "memory_gib": _peak_memory() / 2**30, **times}
        self._clear()
        return figures

    def _clear(self) -> None:
        self._counts: Counter[str] = Counter()
        self._weight = 0
        self._seconds = 0.0
        self._steps = 0

    def _utilisation(self) -> dict[str, float]:
        """Model FLOPs utilisation, from 0 to 1; empty if the peak or the model's FLOPs are unknown.

        All documents are assumed to have their mean length.
        """
        peak, tokens = self._config.run.peak_tflops, self._counts["tokens"]
        if peak is None or not isinstance(self._model, PerceptionLM):
            return {}
        length = tokens / max(1, self._counts["samples"])
        work = Work(
            tokens=tokens,
            pairs=round(tokens * (length + 1) / 2),
            tiles=self._counts["images"],
            labelled=self._weight,
        )
        flops = step_flops(self._model, work).model / self._config.parallel.tensor
        return {"mfu": flops / (self._seconds * peak * 1e12)}


def _lines_up_to(step: int, path: Path) -> list[str]:
    """Events up to a step. A killed run may have left half a line at the end; it is dropped."""
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            break
        if event["step"] <= step:
            kept.append(line)
    return kept


def _peak_memory() -> int:
    """Peak bytes: allocated by torch on a GPU, resident in the process otherwise."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _shown(name: str, value: float) -> str:
    """Formats a value for the screen; durations as hours:minutes:seconds."""
    return str(timedelta(seconds=round(value))) if name in _DURATIONS else f"{value:.5g}"


def _board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise InputError("run.tensorboard needs `pip install tensorboard`") from None
    return SummaryWriter(str(folder), purge_step=step + 1)
