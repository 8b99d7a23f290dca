"""Runs one task of a benchmark in a process of its own, so that its peak memory is its own.

`run_task` starts the process and `serve` is its entry point. The task is JSON on the command line,
and the result is JSON in a file: whatever a library prints cannot get in between.
"""

import json
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from perception_rt.errors import BackendError, PerceptionError

_MOST_CHARACTERS = 300
_HINTS: dict[int, str] = {
    signal.SIGKILL: ": out of memory?",
    signal.SIGILL: ": an instruction that the processor lacks",
}


def run_task(task: Mapping[str, Any], *, module: str) -> Any:
    """Performs a task in a new process.

    Args:
        task: JSON values for the `perform` function of the module.
        module: full name of a worker, whose `__main__` calls `serve`.

    Returns:
        The JSON value that `perform` returned.

    Raises:
        BackendError: the task failed; the message is the last line of its error.
    """
    with tempfile.TemporaryDirectory() as directory:
        result = Path(directory) / "result.json"
        command = [sys.executable, "-m", module, json.dumps(task), str(result)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            return json.loads(result.read_text())
    if done.returncode < 0:
        hint = _HINTS.get(-done.returncode, "")
        raise BackendError(f"ended by signal {-done.returncode}{hint}")
    last = (done.stderr.strip() or "no message").splitlines()[-1]
    raise BackendError(last[:_MOST_CHARACTERS])


def serve(perform: Callable[[Mapping[str, Any]], Any]) -> int:
    """Entry point of a worker: performs the task that the command line holds; the exit status."""
    task, result = sys.argv[1:]
    try:
        value = perform(json.loads(task))
    except PerceptionError as error:
        print(error, file=sys.stderr)
        return 1
    except ImportError as error:  # its first line, without the path that may be at the end
        print(str(error).partition("\n")[0].partition(" (")[0], file=sys.stderr)
        return 1
    Path(result).write_text(json.dumps(value))
    return 0
