"""The benchmark of bulk jobs, with a few files."""

import json
from pathlib import Path

import pytest

from benchmarks import bulk_embed
from benchmarks.tables import MIB

pytest.importorskip("pyarrow")


def test_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "result.json"
    numbers = "--count 120 --few 3 --many 5 --side 24"
    assert bulk_embed.main([*numbers.split(), "--out", str(out)]) == 0
    job, loop, few, many = json.loads(out.read_text())["runs"]
    for run in (job, loop):
        assert (run["rows"], run["errors"]) == (119, 1)
    assert (few["rows"], many["rows"]) == (3, 5)
    assert all(run["peak"] > 0 < run["seconds"] for run in (job, loop, few, many))
    assert capsys.readouterr().out.count("\n| bulk job") == 3


def test_bad_options_are_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert bulk_embed.main(["--count", "0"]) == 2
    assert "--count must be 1 to" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_is_flat(tmp_path: Path) -> None:
    """At 1,000 and at 10,000 files; and of 3,000 files with 30 broken ones, 2,970 have a row."""
    out = tmp_path / "result.json"
    assert bulk_embed.main(["--out", str(out)]) == 0
    job, loop, few, many = json.loads(out.read_text())["runs"]
    assert (job["rows"], job["errors"]) == (loop["rows"], loop["errors"]) == (2970, 30)
    assert (few["rows"], many["rows"]) == (990, 9900)
    assert abs(many["peak"] - few["peak"]) < 10 * MIB
