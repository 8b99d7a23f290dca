"""`perception-rt embed` with files and folders."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from bulk_files import write_photos

from perception_rt.cli import main
from perception_rt.cli.embed import cosine_table
from perception_rt.demo import package_paths

PACKAGE = str(package_paths()["demo:pe"])
EMBED = ["embed", PACKAGE]


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    status = main(["embed", *map(str, arguments), "--threads", "1"])
    captured = capsys.readouterr()
    return status, captured.out, captured.err


def test_skipped_items_set_the_status(photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.npy"
    status, printed, _ = run(capsys, PACKAGE, photos, "--out", out, "--skip-errors")
    assert status == 1
    errors = tmp_path / "rows.npy.errors.jsonl"
    first, table = printed.split("\n", 1)
    assert first == f"{out}: 18 rows of 64 float32; 2 errors in {errors}"
    assert table.startswith("18 items, dim 64, cosines\n")
    assert np.load(out).shape == (18, 64)
    assert len((tmp_path / "rows.ids.txt").read_text().splitlines()) == 18
    status, printed, _ = run(capsys, PACKAGE, photos, "--out", out, "--resume", "--json")
    assert status == 1 and json.loads(printed) == {
        "out": str(out), "count": 20, "rows": 18, "errors": 2, "errors_file": str(errors),
        "dim": 64,
    }  # fmt: skip


def test_the_first_error_is_one_line(photos: Path, tmp_path: Path, capsys) -> None:
    status, printed, line = run(capsys, PACKAGE, photos, "--out", tmp_path / "rows.npy")
    assert (status, printed) == (2, "") and line.count("\n") == 1
    assert "item 3, " in line and "00003.jpg" in line and "skip_errors" in line
    assert not (tmp_path / "rows.npy").exists()


def test_sources_may_follow_options(photos: Path, tmp_path: Path, capsys) -> None:
    out, one, two = tmp_path / "rows.npy", photos / "00001.jpg", photos / "00002.jpg"
    assert run(capsys, PACKAGE, "--out", out, one, two)[0] == 0
    assert len(np.load(out)) == 2
    assert run(capsys, PACKAGE, one, "--out", out, "--dtype", "float16", two, "--json")[0] == 2
    out.unlink()
    assert run(capsys, PACKAGE, one, "--out", out, "--dtype", "float16", two, "--json")[0] == 0
    assert np.load(out).dtype == "float16"
    with pytest.raises(SystemExit):
        main([*EMBED, str(one), "--unknown", "x"])


def test_without_out_a_few_items_are_compared(photos: Path, capsys) -> None:
    status, printed, _ = run(capsys, PACKAGE, photos / "0000[01].jpg", "--text", "a red three")
    lines = printed.splitlines()
    assert status == 0 and lines[0] == "3 items, dim 64, cosines"
    assert [line.split()[0] for line in lines[2:]] == ["1", "2", "3"]
    assert lines[2].split()[2] == "1.000" and "a red three" in lines[4]
    status, printed, _ = run(capsys, PACKAGE, photos / "00001.jpg", "--json")
    assert len(json.loads(printed)["embeddings"][0]) == 64


def test_no_table_of_many_items(tmp_path: Path, capsys) -> None:
    write_photos(tmp_path / "p", 21)
    assert run(capsys, PACKAGE, tmp_path / "p")[1] == "21 items, dim 64\n"


def test_paths_come_from_standard_input(photos: Path, monkeypatch, capsys) -> None:
    paths = f"{photos / '00001.jpg'}\n{photos / '00002.jpg'}\n"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(paths.encode())))
    assert json.loads(run(capsys, PACKAGE, "--from", "-", "--json")[1])["items"] == (
        paths.splitlines()
    )


def test_a_list_takes_no_source_that_follows(photos: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "list").write_text(f"{photos / '00001.jpg'}\n")
    arguments = ("--from", tmp_path / "list", PACKAGE, photos / "00002.jpg", "--json")
    items = json.loads(run(capsys, *arguments)[1])["items"]
    assert items == [str(photos / "00002.jpg"), str(photos / "00001.jpg")]


def test_named_items_write_sources_too(photos: Path, tmp_path: Path, capsys) -> None:
    out = tmp_path / "rows.npy"
    for _ in range(2):  # an earlier file is replaced
        assert run(capsys, PACKAGE, "--text", "a", "b\nc", "--out", out)[0] == 0
    assert (tmp_path / "rows.ids.txt").read_text() == "a\nb\\nc\n"
    assert json.loads((tmp_path / "rows.meta.json").read_text())["model"] == "PE-Demo"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to embed: give SOURCE"),
        (["absent/"], "source 'absent/' does not exist"),
        (["--text", "a", "--resume"], "--resume needs --out"),
        (["--text", "a", "--out", "rows.csv"], ".npy, .jsonl, .parquet or name a folder"),
        (["--text", "a", "--out", "absent/rows.npy"], "its folder is missing"),
        (["--text", "a", "--out", "rows", "--part", "4/3"], "--part must be I/N"),
        (["--text", "a", "--out", "rows.npy", "--part", "1/3"], "parts need a folder"),
        (["--text", "a", "--out", "rows.npy", "--shard-size", "0"], "shard_items must be"),
        (["--from", "absent"], "list 'absent' cannot be read"),
    ],
)
def test_bad_uses_are_one_line(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    status, printed, line = run(capsys, PACKAGE, *arguments)
    assert (status, printed, line.count("\n")) == (2, "", 1)
    assert message in line
    assert list(tmp_path.iterdir()) == []


def test_the_table_is_aligned() -> None:
    rows = np.eye(2, dtype=np.float32)
    names = ["folder/" * 10 + "1.jpg", "\u732b\x1b"]
    lines = cosine_table(names, rows)
    assert lines[2] == f" 1  ...{names[0][-37:]}   1.000   0.000"
    assert lines[3] == f" 2  \u732b\\x1b{' ' * 34}   0.000   1.000"
