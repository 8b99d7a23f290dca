"""A job that is killed and resumed gives the same bytes as one that is not."""

import subprocess
import time
from pathlib import Path

import pytest
from bulk_files import contents, write_photos
from bulk_kills import command, run_killed

pytest.importorskip("pyarrow")


def timed(arguments: list[str]) -> float:
    started = time.monotonic()
    assert subprocess.run(arguments, stdout=subprocess.DEVNULL).returncode == 1
    return time.monotonic() - started


def compare(tmp_path: Path, count: int, name: str, kills: int) -> None:
    broken = frozenset(range(5, count, 100))
    write_photos(tmp_path / "photos", count, broken)
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    whole = command(tmp_path / "photos", tmp_path / "whole" / name)
    run_s = timed(whole)
    start_s = timed([*whole, "--resume"])  # there is nothing left to do
    # So few seconds of work in each that the last of them is needed.
    seconds = start_s + 1.5 * max(run_s - start_s, 0) / kills
    killed, status = run_killed(
        tmp_path / "photos", tmp_path / "out" / name, kills, seconds, seed=0
    )
    assert killed >= 0.8 * kills and status == 1
    folders = tmp_path / "whole", tmp_path / "out"
    if (folders[0] / name).is_dir():
        folders = folders[0] / name, folders[1] / name
    assert contents(folders[0]) == contents(folders[1])


def test_two_kills(tmp_path: Path) -> None:
    compare(tmp_path, 260, "rows", kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "rows.parquet", "rows.npy", "rows.jsonl"])
def test_twenty_kills(tmp_path: Path, name: str) -> None:
    compare(tmp_path, 3000, name, kills=20)
