"""One task of a benchmark in a process of its own: so that memory is that task's, and freed.

`run_task` starts the process and is all that the parent uses. A task is JSON on the command line,
its result JSON in a file, so that nothing that a library prints can get in between.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from perception_rt.config import PeConfig
from perception_rt.errors import BackendError, PerceptionError


def run_task(task: Mapping[str, Any], *, module: str = "benchmarks.encoder.worker") -> Any:
    """Performs a task in a new process of `module`; BackendError if it fails."""
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", module, json.dumps(task), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(result.read_text())
    if done.returncode < 0:
        raise BackendError(f"{_label(task)} was ended by signal {-done.returncode}: out of memory?")
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise BackendError(f"{_label(task)} failed: {last}")


def perform(task: Mapping[str, Any]) -> Any:
    """Does a task in this process; the result is plain JSON."""
    match task["do"]:
        case "limits":
            from benchmarks.machine import limits

            return limits(threads=task["threads"], quick=task["quick"])
        case "prepare":
            from benchmarks.encoder.prepare import prepare

            return prepare(
                PeConfig.from_dict(task["config"]),
                Path(task["work"]),
                name=task["model"],
                count=task["count"],
                precisions=task["precisions"],
            )
        case _:
            return _measure_row(task)


def _measure_row(task: Mapping[str, Any]) -> dict[str, Any]:
    """Samples by batch; batches ascend, so that each peak of memory is that batch's."""
    import numpy as np

    from benchmarks.encoder.runners import IMAGES_FILE, PIXELS_FILE, REFERENCE_FILE, Row, open_row
    from benchmarks.timing import measure

    row, work = Row(**task["row"]), Path(task["work"])
    config = PeConfig.from_dict(task["config"])
    inputs = np.load(work / (IMAGES_FILE if row.kind == "images" else PIXELS_FILE))
    reference = np.load(work / REFERENCE_FILE)
    run = open_row(row, config.vision, work, task["threads"])
    return {
        str(batch): asdict(measure(run, inputs, reference, batch=batch, repeats=task["repeats"]))
        for batch in sorted(task["batches"])
    }


def _label(task: Mapping[str, Any]) -> str:
    """A task in words."""
    what = task["row"]["name"] if task["do"] == "row" else task["do"]
    return f"{task['model']}: {what}" if "model" in task else str(what)


def main() -> int:
    """Entry point of the process: task and result file."""
    task, result = sys.argv[1:]
    try:
        value = perform(json.loads(task))
    except PerceptionError as error:
        print(error, file=sys.stderr)
        return 1
    Path(result).write_text(json.dumps(value))
    return 0


if __name__ == "__main__":
    sys.exit(main())
