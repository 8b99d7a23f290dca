"""Worker of `embed.py`: performs one task in a process of its own."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.subprocess_task import serve
from perception_rt.config import PeConfig


def perform(task: Mapping[str, Any]) -> Any:
    """Performs a task in this process; returns plain JSON."""
    config, work = PeConfig.from_dict(task["config"]), Path(task["work"])
    match task["do"]:
        case "prepare":
            from benchmarks.encoder.prepare import prepare

            name, count, precisions = task["model"], task["count"], task["precisions"]
            return prepare(config, work, name=name, count=count, precisions=precisions)
        case "export plain":
            from benchmarks.encoder.prepare import export_plain

            return export_plain(config, work)
        case _:
            return _measure_row(task, config, work)


def _measure_row(task: Mapping[str, Any], config: PeConfig, work: Path) -> dict[str, Any]:
    """Samples by batch size, smallest first, so that each memory peak belongs to its batch."""
    import numpy as np

    from benchmarks.encoder.runners import IMAGES_FILE, PIXELS_FILE, REFERENCE_FILE, Row, open_row
    from benchmarks.timing import measure

    row = Row(**task["row"])
    inputs = np.load(work / (IMAGES_FILE if row.kind == "images" else PIXELS_FILE))
    reference = np.load(work / REFERENCE_FILE)
    run = open_row(row, config.vision, work, task["threads"])
    return {
        str(batch): asdict(measure(run, inputs, reference, batch=batch, repeats=task["repeats"]))
        for batch in sorted(task["batches"])
    }


if __name__ == "__main__":
    sys.exit(serve(perform))
