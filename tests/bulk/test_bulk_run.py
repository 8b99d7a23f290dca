"""Bulk jobs: rows equal those of the embedder, errors are kept, and any part can be done again."""

import errno
import json
import os
import threading
import tracemalloc
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bulk_files import contents, jpeg, write_photos, write_tar

import perception_rt as prt
from perception_rt.bulk.output import Output, Totals
from perception_rt.bulk.result import open_result
from perception_rt.bulk.run import BulkOptions, embed_sources
from perception_rt.bulk.sources import Sources
from perception_rt.errors import InputError

KINDS = ("rows", "rows.parquet", "rows.npy", "rows.jsonl")
SMALL = BulkOptions(shard_items=8, workers=1, skip_errors=True)


FILES = Path(__file__).parents[1] / "processing" / "files"


class StopError(Exception):
    """Ends a job as a signal would."""


def options(**changes: Any) -> BulkOptions:
    return BulkOptions(**{"shard_items": 8, "workers": 1, "skip_errors": True, **changes})


def sources(folder: Path) -> Sources:
    return Sources(paths=(str(folder),))


def read(out: Path) -> tuple[list[int], list[str], np.ndarray]:
    blocks = list(open_result(out).blocks())
    return (
        [int(i) for ids, _, _ in blocks for i in ids],
        [name for _, names, _ in blocks for name in names],
        np.concatenate([rows for _, _, rows in blocks]),
    )


@pytest.mark.parametrize("name", KINDS)
def test_rows_are_those_of_the_embedder(
    engine: prt.Embedder, photos: Path, tmp_path: Path, name: str
) -> None:
    if name in KINDS[:2]:
        pytest.importorskip("pyarrow")
    out = tmp_path / name
    totals = embed_sources(engine, sources(photos), out, SMALL)
    assert totals == Totals(items=20, rows=18, errors=2)
    ids, names, rows = read(out)
    good = [i for i in range(20) if i not in (3, 17)]
    assert names == [str(photos / f"{i:05}.jpg") for i in good]
    assert ids == (list(range(18)) if name == "rows.npy" else good)
    # Batches start anew with each shard of 8, and leave broken images out.
    expected = [engine.embed_images(list(part)) for part in (names[:7], names[7:15])]
    np.testing.assert_array_equal(rows[:15], np.concatenate(expected))
    errors = out / "errors.jsonl" if out.is_dir() else tmp_path / f"{name}.errors.jsonl"
    lines = [json.loads(line) for line in errors.read_text().splitlines()]
    assert [(line["id"], line["source"]) for line in lines] == [
        (i, str(photos / f"{i:05}.jpg")) for i in (3, 17)
    ]
    assert all("ends within its header" in line["reason"] for line in lines)
    result = open_result(out)
    assert (result.package, result.model, result.dim) == (
        engine.manifest.id, "PE-Demo", engine.dim
    )  # fmt: skip
    assert not (tmp_path / f"{name}.parts").exists()


def test_parquet_has_the_documented_columns(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    for dtype, arrow_name in (("float32", "float"), ("float16", "halffloat")):
        out = tmp_path / dtype
        embed_sources(engine, sources(photos), out, options(dtype=dtype))
        assert sorted(p.name for p in out.iterdir()) == [
            "errors.jsonl", "job.json", "part-00000.parquet", "part-00001.parquet",
            "part-00002.parquet",
        ]  # fmt: skip
        schema = parquet.read_schema(out / "part-00001.parquet")
        assert [f"{f.name}: {f.type}" for f in schema] == [
            "id: int64", "source: string",
            f"embedding: fixed_size_list<element: {arrow_name}>[{engine.dim}]",
        ]  # fmt: skip
        record = json.loads(schema.metadata[b"perception_rt"])
        assert record["package"] == engine.manifest.id and record["dim"] == engine.dim
        assert read(out)[2].dtype == dtype


def test_the_first_error_ends_the_job_and_completed_shards_stay(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    (photos / "00003.jpg").write_bytes(jpeg(3))
    out = tmp_path / "rows"
    with pytest.raises(InputError, match=r"item 17, '.*00017.jpg'") as error:
        embed_sources(engine, sources(photos), out, options(skip_errors=False))
    assert "skip_errors" in str(error.value) and "\n" not in str(error.value)
    assert {p.name for p in out.iterdir()} == {
        "job.json", "part-00000.parquet", "part-00001.parquet"
    }  # fmt: skip
    totals = embed_sources(engine, sources(photos), out, options(resume=True))
    assert totals == Totals(items=20, rows=19, errors=1)


@pytest.mark.parametrize("name", KINDS)
def test_a_resumed_job_repeats_nothing_and_gives_the_same_bytes(
    engine: prt.Embedder, photos: Path, tmp_path: Path, name: str
) -> None:
    if name in KINDS[:2]:
        pytest.importorskip("pyarrow")
    whole, out = tmp_path / "whole" / name, tmp_path / "out" / name
    whole.parent.mkdir()
    out.parent.mkdir()
    embed_sources(engine, sources(photos), whole, SMALL)
    done: list[int] = []

    def stop(count: int, total: int, errors: int) -> None:
        done.append(count)
        assert total == 20
        if count > 8:
            raise StopError

    with pytest.raises(StopError):
        embed_sources(engine, sources(photos), out, SMALL, on_progress=stop)
    assert done == [8, 16]
    done.clear()
    again = options(resume=True)
    embed_sources(engine, sources(photos), out, again, on_progress=lambda d, *_: done.append(d))
    assert done == [16, 20]
    assert (contents(whole) if whole.is_dir() else contents(whole.parent)) == (
        contents(out) if out.is_dir() else contents(out.parent)
    )
    done.clear()
    totals = embed_sources(
        engine, sources(photos), out, again, on_progress=lambda d, *_: done.append(d)
    )
    assert totals == Totals(items=20, rows=18, errors=2) and done == []


def test_a_damaged_shard_is_made_again(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "rows"
    embed_sources(engine, sources(photos), out, SMALL)
    before = contents(out)
    (out / "part-00001.parquet").write_bytes(before["part-00001.parquet"][:-5])
    (out / ".part-00001.parquet.77.tmp").write_bytes(b"left behind")
    embed_sources(engine, sources(photos), out, options(resume=True))
    assert contents(out) == before


def test_another_job_is_refused(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    for out in (tmp_path / "rows.npy", tmp_path / "other.jsonl"):
        embed_sources(engine, sources(photos), out, SMALL)
        before = out.read_bytes()
        with pytest.raises(InputError, match="exists: --resume completes it"):
            embed_sources(engine, sources(photos), out, SMALL)
        for more, name in (
            ({"dtype": "float16"}, "dtype"),
            ({"num_frames": 4}, "num_frames"),
            ({"preprocessing": "x"}, "preprocessing"),
            ({"batch_size": 4}, "batch_size"),
        ):
            with pytest.raises(InputError, match=f"belongs to another job: its {name} is"):
                embed_sources(engine, sources(photos), out, options(resume=True, **more))
        fewer = Sources(paths=(str(photos / "00001.jpg"),))
        with pytest.raises(InputError, match=r"its items \(and sources\) is 20, not 1"):
            embed_sources(engine, fewer, out, options(resume=True))
        same_number = Sources(images=("x",) * 20)
        with pytest.raises(InputError, match="its sources is 'sha256:"):
            embed_sources(engine, same_number, out, options(resume=True))
        assert out.read_bytes() == before


def test_another_package_is_refused(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "rows.npy"
    embed_sources(engine, sources(photos), out, SMALL)

    class Other:
        batch_size, dim = engine.batch_size, engine.dim

        class manifest:  # noqa: N801
            id, content = "sha256:0", engine.manifest.content

    with pytest.raises(InputError, match=r"its package is 'sha256:.*, not 'sha256:0'"):
        embed_sources(Other, sources(photos), out, options(resume=True))


def test_unusable_places(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "old.npy").write_bytes(b"x")
    for name, message in (
        ("rows.csv", "must end in .npy, .jsonl, .parquet or name a folder"),
        ("absent/rows.npy", "parent folder is missing"),
        ("full", "is not empty, and not a result of embed"),
        ("old.npy", "old.npy.* exists, and is not a whole result"),
    ):
        if name == "full":
            pytest.importorskip("pyarrow")
        with pytest.raises(InputError, match=message):
            embed_sources(engine, sources(photos), tmp_path / name, SMALL)
    assert (tmp_path / "full" / "mine").read_text() == "x"
    assert not (tmp_path / "old.npy.parts").exists()


def test_parts_give_the_whole(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed_sources(engine, sources(photos), whole, options(shard_items=None, part=(1, 1)))
    assert embed_sources(engine, sources(photos), whole, SMALL.__class__(
        skip_errors=True, resume=True, part=(1, 1))).rows == 18  # fmt: skip
    made = []
    for part in (3, 1, 2):
        mine = options(shard_items=None, part=(part, 3))
        made.append(embed_sources(engine, sources(photos), out, mine).items)
        with pytest.raises(InputError, match=f"part {part}/3 of .* exists"):
            embed_sources(engine, sources(photos), out, mine)
    assert sum(made) == 20 and len(list(out.glob("part-*"))) == 3
    ids, names, _ = read(out)
    assert (ids, names) == read(whole)[:2]
    assert len((out / "errors.jsonl").read_text().splitlines()) == 2
    # Without --part, the recorded size of shards counts, and nothing is missing.
    assert embed_sources(engine, sources(photos), out, options(shard_items=None, resume=True)).rows
    with pytest.raises(InputError, match="parts need a folder"):
        embed_sources(engine, sources(photos), tmp_path / "x.npy", options(part=(1, 2)))


def test_parts_may_run_at_the_same_time(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    whole, out = tmp_path / "whole", tmp_path / "out"
    embed_sources(engine, sources(photos), whole, SMALL)
    failures = []

    def run(part: int) -> None:
        try:
            embed_sources(engine, sources(photos), out, options(part=(part, 3)))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(part,)) for part in (1, 2, 3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert contents(out) == contents(whole)


def test_a_damaged_shard_of_another_part_is_left(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    out = tmp_path / "rows"
    embed_sources(engine, sources(photos), out, options(part=(1, 3)))
    (out / "part-00000.parquet").write_bytes(b"damaged")
    assert embed_sources(engine, sources(photos), out, options(part=(3, 3))).items == 4
    assert embed_sources(engine, sources(photos), out, options(resume=True)).rows == 18


@pytest.mark.parametrize("part", [None, (1, 1)])
def test_file_systems_without_locks(
    engine: prt.Embedder,
    photos: Path,
    tmp_path: Path,
    part: tuple[int, int] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("pyarrow")
    fcntl = pytest.importorskip("fcntl")

    def refuse(*_: object) -> None:
        raise OSError(errno.EBADF, "Bad file descriptor")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert embed_sources(engine, sources(photos), tmp_path / "rows", options(part=part)).rows == 18


def test_two_processes_cannot_write_one_output(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("fcntl")
    out = tmp_path / "rows.npy"

    def other(*_: object) -> None:
        with pytest.raises(InputError, match="another process writes"):
            embed_sources(engine, sources(photos), out, options(resume=True))
        raise StopError

    with pytest.raises(StopError):
        embed_sources(engine, sources(photos), out, SMALL, on_progress=other)
    assert embed_sources(engine, sources(photos), out, options(resume=True)).rows == 18


def test_kinds_may_be_mixed(engine: prt.Embedder, photos: Path, tmp_path: Path) -> None:
    write_tar(tmp_path / "s.tar", {f"{i}.jpg": jpeg(i) for i in range(5)})
    (tmp_path / "t.txt").write_text("three\nseven\n" + "x" * 70_000 + "\n")
    mixed = Sources(
        paths=(str(tmp_path / "s.tar"), str(tmp_path / "t.txt"), str(photos / "00001.jpg")),
        texts=("a green two",),
        videos=(str(tmp_path / "absent.mp4"),),
    )
    out = tmp_path / "rows.jsonl"
    totals = embed_sources(engine, mixed, out, options(num_frames=2))
    assert totals == Totals(items=11, rows=9, errors=2)
    _, names, rows = read(out)
    assert names[-1] == "a green two" and names[5].endswith("t.txt#1")
    images = engine.embed_images([jpeg(i) for i in range(5)])
    np.testing.assert_array_equal(rows[:5], images)
    np.testing.assert_allclose(rows[5:7], engine.embed_texts(["three", "seven"]), atol=1e-6)
    np.testing.assert_allclose(rows[8:], engine.embed_texts(["a green two"]), atol=1e-6)
    errors = [json.loads(line) for line in (tmp_path / "rows.jsonl.errors.jsonl").open()]
    assert [e["id"] for e in errors] == [7, 10]
    assert "limit is 65536" in errors[0]["reason"] and "absent.mp4" in errors[1]["reason"]


def test_results_of_others_are_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    (tmp_path / "b.jsonl").write_text("{}\n")
    (tmp_path / "b.jsonl.meta.json").write_text("[1]")
    for name, message in (
        ("a.npy", "a.meta.json' cannot be read"),
        ("b.jsonl", "was not written by perception_rt"),
        ("absent.npy", "does not exist"),
        (".", "has no shards"),
    ):
        with pytest.raises(InputError, match=message):
            open_result(tmp_path / name)


def test_without_pyarrow_numpy_results_work(
    engine: prt.Embedder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    embed_sources(engine, sources(photos), tmp_path / "rows.npy", SMALL)
    with pytest.raises(prt.BackendError, match=r'pip install "perception_rt\[bulk\]"'):
        embed_sources(engine, sources(photos), tmp_path / "rows", SMALL)
    assert not (tmp_path / "rows").exists()


def test_bad_options_are_refused() -> None:
    for more, message in (
        ({"dtype": "int8"}, "dtype must be one of"),
        ({"part": (0, 3)}, "part must be an integer from 1 to 3, not 0"),
        ({"shard_items": 0}, "shard_items must be an integer from 1"),
    ):
        with pytest.raises(InputError, match=message):
            BulkOptions(**more)


def test_batches_do_not_depend_on_the_part(engine: prt.Embedder, tmp_path: Path) -> None:
    """A shard size that is no multiple of the batch is rounded up."""
    pytest.importorskip("pyarrow")
    write_photos(tmp_path / "p", 10)
    embed_sources(engine, sources(tmp_path / "p"), tmp_path / "o", options(shard_items=3))
    assert json.loads((tmp_path / "o" / "job.json").read_text())["shard_items"] == 8
    with Output(tmp_path / "o") as output:
        assert output.recorded() is not None


def test_a_job_without_shards_leaves_nothing(
    engine: prt.Embedder, photos: Path, tmp_path: Path
) -> None:
    pytest.importorskip("pyarrow")
    for out in (tmp_path / "rows", tmp_path / "rows.npy"):
        with pytest.raises(InputError, match="item 3"):
            embed_sources(engine, sources(photos), out, options(skip_errors=False))
    assert [path.name for path in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "mine").mkdir()
    with pytest.raises(InputError, match="item 3"):
        embed_sources(engine, sources(photos), tmp_path / "mine", options(skip_errors=False))
    assert list((tmp_path / "mine").iterdir()) == []
    # Killed before its first shard, it is begun anew, with any settings.
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "job.json").write_text('{"items": 7}')
    assert embed_sources(engine, sources(photos), tmp_path / "rows", SMALL).rows == 18


def test_a_full_disk_ends_the_job_and_leaves_whole_shards(
    engine: prt.Embedder, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    real = os.fsync

    def full(fd: int) -> None:
        calls.append(fd)
        if len(calls) == 3:  # the second shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(fd)

    out = tmp_path / "rows.npy"
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        embed_sources(engine, sources(photos), out, SMALL)
    assert sorted(path.name for path in (tmp_path / "rows.npy.parts").iterdir()) == [
        "job.json", "part-00000.npz"
    ]  # fmt: skip
    assert embed_sources(engine, sources(photos), out, options(resume=True)).rows == 18


class Zeros:
    """An engine that decodes nothing."""

    batch_size, dim = 8, 4

    class manifest:  # noqa: N801
        id = "sha256:0"

        class content:  # noqa: N801
            name = "zeros"

    def embed_images(self, images: Iterable[Any], **_: object) -> np.ndarray:
        return np.zeros((sum(1 for _ in images), 4), np.float32)


@pytest.mark.parametrize("name", ["rows.npy", "rows"])
def test_memory_does_not_grow_with_the_number_of_items(tmp_path: Path, name: str) -> None:
    if name == "rows":
        pytest.importorskip("pyarrow")
    peaks = []
    for count in (500, 5000):
        lines = tmp_path / f"{count}.txt"
        lines.write_text("".join(f"folder/{index:05}.jpg\n" for index in range(count)))
        tracemalloc.start()
        folder = tmp_path / f"out{count}"
        folder.mkdir()
        totals = embed_sources(
            Zeros(), Sources(lists=(str(lines),)), folder / name, BulkOptions(shard_items=256)
        )
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert totals.rows == count
    assert peaks[1] - peaks[0] < 100_000  # the sources alone are 300,000 bytes


def test_videos_in_tars_are_read_from_memory(engine: prt.Embedder, tmp_path: Path) -> None:
    pytest.importorskip("av")
    video = FILES / "m_hflip.mp4"
    members = {"a.mp4": video.read_bytes(), "b.mkv": b"no video", "a.jpg": jpeg(0)}
    write_tar(tmp_path / "s.tar", members)
    tar = Sources(paths=(str(tmp_path / "s.tar"), str(video)))
    totals = embed_sources(engine, tar, tmp_path / "rows.npy", options(num_frames=2))
    assert totals == Totals(items=4, rows=3, errors=1)
    _, names, rows = read(tmp_path / "rows.npy")
    assert [Path(name).name for name in names] == ["s.tar#a.mp4", "s.tar#a.jpg", "m_hflip.mp4"]
    np.testing.assert_array_equal(rows[0], engine.embed_videos([video], num_frames=2)[0])
    np.testing.assert_array_equal(rows[0], rows[2])
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []
