"""A job that is killed and resumed gives the same bytes as one that is not."""

import subprocess
from pathlib import Path

import pytest
from bulk_files import contents, write_photos
from bulk_kills import SHARD_ITEMS, command, run_killed

pytest.importorskip("pyarrow")


def compare(tmp_path: Path, count: int, name: str, kills: int) -> None:
    write_photos(tmp_path / "photos", count, frozenset(range(5, count, 100)))
    (tmp_path / "whole").mkdir()
    (tmp_path / "out").mkdir()
    whole = command(tmp_path / "photos", tmp_path / "whole" / name)
    assert subprocess.run(whole, stdout=subprocess.DEVNULL).returncode == 1
    killed, status = run_killed(
        tmp_path / "photos", tmp_path / "out" / name, kills, -(-count // SHARD_ITEMS), seed=0
    )
    assert (killed, status) == (kills, 1)
    folders = tmp_path / "whole", tmp_path / "out"
    if (folders[0] / name).is_dir():
        folders = folders[0] / name, folders[1] / name
    assert contents(folders[0]) == contents(folders[1])


def test_two_kills(tmp_path: Path) -> None:
    compare(tmp_path, 5 * SHARD_ITEMS, "rows", kills=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["rows", "rows.parquet", "rows.npy", "rows.jsonl"])
def test_twenty_kills(tmp_path: Path, name: str) -> None:
    compare(tmp_path, 3000, name, kills=20)
