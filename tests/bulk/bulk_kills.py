"""Runs a bulk job in child processes that are killed at random moments."""

import random
import subprocess
import sys
import time
from pathlib import Path

from perception_rt.demo import package_paths


def command(folder: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "perception_rt", "embed", str(package_paths()["demo:pe"]),
        str(folder), "--out", str(out), "--skip-errors", "--shard-size", "64", "--threads", "1",
        "--workers", "2", "--json",
    ]  # fmt: skip


def run_killed(folder: Path, out: Path, kills: int, seconds: float, seed: int) -> tuple[int, int]:
    """Starts the job until `kills` runs were killed, then lets it end.

    Args:
        folder: what to embed.
        out: the result.
        kills: runs to kill.
        seconds: a run is killed at a random moment of its first seconds.
        seed: of the moments.

    Returns:
        How many runs were killed before they ended, and the last exit status.
    """
    moments, killed = random.Random(seed), 0
    for _ in range(kills):
        child = subprocess.Popen(
            [*command(folder, out), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moments.uniform(0, seconds))
        child.kill()
        killed += child.wait() < 0
    last = subprocess.run([*command(folder, out), "--resume"], capture_output=True)
    return killed, last.returncode
