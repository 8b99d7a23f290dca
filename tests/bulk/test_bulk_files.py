"""Files of a result: names, order, leftovers, and full disks."""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

import perception_rt as prt
from perception_rt.bulk.atomic import write_bytes
from perception_rt.bulk.listing import Item, Listing
from perception_rt.bulk.result import Result
from perception_rt.bulk.run import BulkOptions, embed_sources
from perception_rt.bulk.sources import Sources

SMALL = BulkOptions(shard_items=8, workers=1, skip_errors=True)


def test_a_full_disk_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as error:
        write_bytes(tmp_path / "rows.npy", b"x")
    assert error.value.filename == str(tmp_path / "rows.npy")
    with pytest.raises(FileNotFoundError) as absent:
        write_bytes(tmp_path / "absent" / "rows.npy", b"x")
    assert absent.value.filename == str(tmp_path / "absent" / "rows.npy")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_the_listing_is_named(tmp_path: Path) -> None:
    def items() -> Iterator[Item]:
        yield Item("image", "a.jpg")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left") as error:
        Listing(items(), tmp_path)
    assert error.value.filename == str(tmp_path)


def test_results_of_other_kinds_keep_their_errors(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    embed_sources(engine, Sources(paths=(str(photos),)), tmp_path / "rows.npy", SMALL)
    errors = (tmp_path / "rows.npy.errors.jsonl").read_bytes()
    good = Sources(paths=(str(photos / "00001.jpg"),))
    assert embed_sources(engine, good, tmp_path / "rows.jsonl", SMALL).errors == 0
    assert (tmp_path / "rows.npy.errors.jsonl").read_bytes() == errors


def test_leftovers_of_a_killed_assembly_are_removed(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    names = "rows.npy", "rows.ids.txt", "rows.meta.json", "rows.npy.errors.jsonl"
    for name in names:
        (tmp_path / f".{name}.0123456789ab.tmp").write_bytes(b"x")
    others = [tmp_path / f".{name}.0123456789ab.tmp" for name in ("rows.jsonl", "rows.npy.usearch")]
    for path in others:
        path.write_bytes(b"x")
    embed_sources(engine, Sources(paths=(str(photos),)), tmp_path / "rows.npy", SMALL)
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        [*names, *(path.name for path in others), "photos"]
    )


def test_names_that_readers_may_split_stay_one_line(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    texts = ("a\rb", "a\u2028b", "a\x0c", "\n", "a\tb", "\u00fc")
    embed_sources(engine, Sources(texts=texts), tmp_path / "rows.npy", SMALL)
    lines = (tmp_path / "rows.ids.txt").read_text("utf-8").splitlines()
    assert lines == ["a\\rb", "a\\u2028b", "a\\x0c", "\\n", "a\tb", "\u00fc"]


def test_shards_are_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (100_000, 99_999, 7):
        (tmp_path / f"part-{number:05}.parquet").write_bytes(b"")
    result = Result(path=tmp_path, package="", model="", dim=1, origin={})
    assert [path.name[5:-8] for path in result.files] == ["00007", "99999", "100000"]
