"""Runs a script in a process of its own, with a local cluster of two workers."""

import os
import subprocess
import sys
from pathlib import Path

START = """
import ray
ray.init(
    num_cpus=CPUS, _node_ip_address="127.0.0.1", include_dashboard=False, log_to_driver=False,
    logging_level="ERROR",
)
"""


# Ray gives its processes 30 s to start, and that cannot be changed: too few beside other work.
SLOW_START = "timed out during startup"
ATTEMPTS = 3


def run_on_cluster(script: str, folder: Path, *, cpus: int = 2, timeout: float = 300) -> list[str]:
    """Returns the lines that a script, which finds Ray started, and Ray printed."""
    environment = {
        **os.environ,
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": str(Path(__file__).parents[2]),
    }
    for _ in range(ATTEMPTS):
        ended = subprocess.run(
            [sys.executable, "-c", START.replace("CPUS", str(cpus)) + script],
            cwd=folder, env=environment, capture_output=True, text=True, timeout=timeout,
        )  # fmt: skip
        if SLOW_START not in ended.stderr:
            break
    assert ended.returncode == 0, ended.stderr[-4000:]
    return ended.stdout.splitlines()
