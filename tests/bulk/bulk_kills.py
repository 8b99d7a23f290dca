"""Runs a bulk job in child processes that are killed at random moments."""

import random
import subprocess
import sys
import time
from pathlib import Path

from perception_rt.demo import package_paths

SHARD_ITEMS = 64


def command(folder: Path, out: Path) -> list[str]:
    return [
        sys.executable, "-m", "perception_rt", "embed", str(package_paths()["demo:pe"]),
        str(folder), "--out", str(out), "--skip-errors", "--shard-size", str(SHARD_ITEMS),
        "--threads", "1", "--workers", "2", "--json",
    ]  # fmt: skip


def run_killed(folder: Path, out: Path, kills: int, shards: int, seed: int) -> tuple[int, int]:
    """Starts the job until `kills` runs were killed, then lets it end.

    A run is killed at a random moment of its start, or after it has written so few shards that work
    is left for the last run.

    Args:
        folder: what to embed.
        out: the result.
        kills: runs to kill.
        shards: number of shards of the job.
        seed: RNG seed.

    Returns:
        How many runs were killed before they ended, and the last exit status.
    """
    draws, killed = random.Random(seed), 0
    for _ in range(kills):
        before = _written(out)
        # It may write one more before it is dead.
        more = draws.randint(0, (shards - 1) // kills - 1)
        child = subprocess.Popen(
            [*command(folder, out), "--resume"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        end = time.monotonic() + (draws.uniform(0, 1.5) if more == 0 else 600)
        while (
            child.poll() is None and time.monotonic() < end and _written(out) < before + (more or 1)
        ):
            time.sleep(0.001)
        time.sleep(draws.uniform(0, 0.01))
        child.kill()
        killed += child.wait() < 0
    last = subprocess.run([*command(folder, out), "--resume"], capture_output=True)
    return killed, last.returncode


def _written(out: Path) -> int:
    parts = out.with_name(f"{out.name}.parts")
    return sum(1 for folder in (out, parts) for _ in folder.glob("part-*"))
