"""A run's record: one JSON line per event in a file, one progress line on the screen."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TextIO

from training.state import write_text


class MetricsLog:
    """Appends events to a JSONL file and prints them. Every event has its step.

    Args:
        path: the file; events after `step` are dropped, since a resumed run repeats them.
        step: steps that are already done.
        screen: where progress lines go.
    """

    def __init__(self, path: Path, *, step: int, screen: TextIO) -> None:
        lines = path.read_text("utf-8").splitlines() if step and path.exists() else []
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        write_text(path, "".join(f"{line}\n" for line in kept))
        self.path = path
        self.screen = screen

    def write(self, kind: str, step: int, values: Mapping[str, float]) -> None:
        """Records one event; `step` counts finished steps."""
        event = {"kind": kind, "step": step, **values}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(event) + "\n")
        text = "  ".join(f"{name} {value:.5g}" for name, value in values.items())
        print(f"{kind} step {step}  {text}", file=self.screen, flush=True)
