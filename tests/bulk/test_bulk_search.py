"""Exact and approximate search of results, and reading rows by number."""

import json
import os
from pathlib import Path

import numpy as np
import pytest

from perception_rt.bulk import index as index_module
from perception_rt.bulk.index import build_index, has_index, index_path, indexed_search
from perception_rt.bulk.result import Result, open_result, write_result
from perception_rt.bulk.rows import count_rows, rows_at
from perception_rt.bulk.search import best, embed_query, exact_search
from perception_rt.bulk.shards import ParquetShards, Shard
from perception_rt.errors import BackendError, InputError

KINDS = ("rows.npy", "rows.jsonl", "rows.parquet", "rows")
DIM, ROWS = 24, 4500  # more rows than a block
GONE = 5  # item without a row


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def write(path: Path, rows: np.ndarray, *, shard_rows: int = 700, package: str = "a") -> Result:
    """A result in which item 5 has no row."""
    ids = np.array([n for n in range(len(rows) + 1) if n != GONE][: len(rows)], np.int64)
    names = [f"photos/{n}.jpg" for n in ids]
    shards = [
        Shard(
            start=n, stop=n + shard_rows, ids=ids[n : n + shard_rows],
            sources=names[n : n + shard_rows], rows=rows[n : n + shard_rows],
        )
        for n in range(0, len(rows), shard_rows)
    ]  # fmt: skip
    origin = {"package": package, "model": "M", "dim": rows.shape[1], "dtype": rows.dtype.name}
    if path.suffix:
        write_result(path, shards, len(rows), origin)
    else:
        path.mkdir()
        for number, shard in enumerate(shards):
            ParquetShards().write(path / f"part-{number:05}.parquet", shard, origin)
    return open_result(path)


@pytest.fixture(scope="module")
def rows() -> np.ndarray:
    """Unit rows, each of which is there three times in distant places."""
    drawn = np.random.default_rng(0).normal(size=(ROWS // 3, DIM))
    return unit(np.tile(drawn, (3, 1))).astype(np.float32)


@pytest.fixture(scope="module")
def results(rows: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("results")
    return {kind: write(folder / kind, rows) for kind in KINDS}


@pytest.fixture(scope="module")
def queries() -> np.ndarray:
    return unit(np.random.default_rng(1).normal(size=(3, DIM))).astype(np.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_exact_search_equals_a_full_sort(kind: str, results, rows, queries) -> None:
    found = exact_search(results[kind], queries, 20)
    for query, hits in zip(queries, found, strict=True):
        scores = (rows.astype(np.float64) * query.astype(np.float64)).sum(axis=1)
        order = np.lexsort((np.arange(ROWS), -scores))[:20]  # equal scores by number
        assert [hit.row for hit in hits] == order.tolist()
        assert [hit.score for hit in hits] == scores[order].tolist()
        numbers = order if kind == "rows.npy" else order + (order >= GONE)
        assert [hit.id for hit in hits] == numbers.tolist()
        assert [hit.source for hit in hits] == [f"photos/{n + (n >= GONE)}.jpg" for n in order]
    # Each row is there three times: all ties are seen.
    assert {hits[0].row % (ROWS // 3) for hits in found} == {
        hits[2].row % (ROWS // 3) for hits in found
    }


def test_a_query_alone_gives_the_same_scores(results, queries) -> None:
    together = exact_search(results["rows"], queries, 7)
    assert [exact_search(results["rows"], query[None], 7)[0] for query in queries] == together


def test_equal_rows_beyond_k_are_the_first_items(tmp_path: Path) -> None:
    result = write(tmp_path / "same", np.ones((2000, 4), np.float32) / 2)
    (hits,) = exact_search(result, np.ones((1, 4)) / 2, 8)
    assert [hit.id for hit in hits] == [0, 1, 2, 3, 4, 6, 7, 8]
    assert {hit.score for hit in hits} == {1.0}


def test_fewer_rows_than_k_and_rows_that_are_no_numbers(tmp_path: Path) -> None:
    rows = np.eye(4, dtype=np.float16)
    rows[2] = np.nan
    result = write(tmp_path / "rows.npy", rows)
    (hits,) = exact_search(result, np.eye(4)[:1], 9)
    assert [(hit.row, hit.score) for hit in hits] == [(0, 1.0), (1, 0.0), (3, 0.0)]


@pytest.mark.parametrize("kind", KINDS)
def test_rows_by_number(kind: str, results, rows) -> None:
    result = results[kind]
    assert count_rows(result) == ROWS
    found = rows_at(result, [4499, 0, 4096, 699, 700, 0])
    assert sorted(found) == [0, 699, 700, 4096, 4499]
    for number, (item, source, row) in found.items():
        assert item == number + (kind != "rows.npy" and number >= GONE)
        assert source == f"photos/{number + (number >= GONE)}.jpg"
        np.testing.assert_array_equal(row, rows[number])
    with pytest.raises(InputError, match="has no row 4500"):
        rows_at(result, [3, 4500])


@pytest.mark.parametrize(
    ("shape", "k", "message"),
    [
        ((1, 3), 5, "queries must be"),
        ((24,), 5, "queries must be"),
        ((1, 24), 0, "k must be"),
        ((1, 24), True, "k must be"),
        ((1, 24), 10_001, "k must be"),
    ],
)
def test_unusable_arguments(shape, k, message: str, results) -> None:
    with pytest.raises(InputError, match=message):
        exact_search(results["rows.npy"], np.zeros(shape), k)


def test_damaged_results(tmp_path: Path) -> None:
    result = write(tmp_path / "rows.npy", np.eye(4, dtype=np.float32))
    (tmp_path / "rows.ids.txt").write_bytes(b"a\nb\n")
    with pytest.raises(InputError, match="does not fit its sources"):
        exact_search(result, np.eye(4))
    (tmp_path / "rows.ids.txt").unlink()
    with pytest.raises(InputError, match=r"rows.ids.txt' cannot be read"):
        exact_search(result, np.eye(4))
    result.path.write_bytes(b"no array")
    with pytest.raises(InputError, match="is damaged"):
        count_rows(result)


# The index


@pytest.fixture
def indexed(tmp_path: Path, rows: np.ndarray) -> Result:
    pytest.importorskip("usearch")
    result = write(tmp_path / "rows", rows[:300])
    build_index(result, threads=1)
    return result


@pytest.mark.parametrize("kind", KINDS)
def test_index_of_each_kind_of_result(kind: str, rows, queries, tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    result = write(tmp_path / kind, rows[:400])
    assert not has_index(result)
    report = build_index(result, threads=1)
    assert (report.rows, report.queries, report.k) == (400, 200, 10)
    assert report.path == index_path(result) and report.size_bytes == report.path.stat().st_size
    assert 0.95 < report.recall <= 1
    assert has_index(result)
    found, true = indexed_search(result, queries, 10), exact_search(result, queries, 10)
    assert found == true  # scores are those of the rows, not of the index
    assert not list(tmp_path.rglob("*.tmp"))


def test_recall_is_a_share_of_the_exact_hits(rows, tmp_path: Path, monkeypatch) -> None:
    """An index that loses every second row finds half of the neighbours."""
    pytest.importorskip("usearch")
    result = write(tmp_path / "rows.npy", rows[:240])
    build_index(result, threads=1)

    class Half:
        def __init__(self, index) -> None:
            self.index = index

        def __len__(self) -> int:
            return len(self.index)

        def __getattr__(self, name: str):
            return getattr(self.index, name)

        def search(self, query, count: int, **options):
            matches = self.index.search(query, len(self.index), **options)
            return type("Matches", (), {"keys": [k for k in matches.keys if k % 2][:count]})

    make = index_module.empty_index
    monkeypatch.setattr(index_module, "empty_index", lambda *given: Half(make(*given)))
    report = build_index(result, threads=1)
    assert 0.4 < report.recall < 0.6


def test_recall_with_other_queries(indexed: Result, tmp_path: Path, queries) -> None:
    asked = write(tmp_path / "texts.npy", queries)
    report = build_index(indexed, asked, threads=1)
    assert report.queries == 3 and report.recall > 0.9
    other = write(tmp_path / "other.npy", queries, package="b")
    with pytest.raises(InputError, match=r"other.npy' was embedded by b \('M'\), not by a"):
        build_index(indexed, other)


def test_expansion_raises_the_recall(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    drawn = np.random.default_rng(2).normal(size=(1500, 64))
    result = write(tmp_path / "rows.npy", unit(drawn).astype(np.float32))
    low = build_index(result, expansion=2, threads=1).recall
    assert low < 0.9 < build_index(result, expansion=512, threads=1).recall
    (hits,) = indexed_search(result, drawn[:1], 5)
    assert hits == exact_search(result, drawn[:1], 5)[0]
    with pytest.raises(InputError, match="expansion must be"):
        build_index(result, expansion=0)


def test_an_old_index_is_refused(indexed: Result, queries) -> None:
    shard = indexed.files[-1]
    status = shard.stat()
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    with pytest.raises(InputError, match=r"older than its result: build it anew by percep"):
        indexed_search(indexed, queries)
    os.utime(shard, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert len(indexed_search(indexed, queries)[0]) == 20
    shard.unlink()
    with pytest.raises(InputError, match="older than its result"):
        indexed_search(indexed, queries)


def test_a_damaged_index_is_refused(indexed: Result, queries) -> None:
    path = index_path(indexed)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    with pytest.raises(InputError, match="is damaged: build it anew"):
        indexed_search(indexed, queries)
    path.write_bytes(bytes(len(data)))
    with pytest.raises(InputError, match="is damaged: build it anew"):
        indexed_search(indexed, queries)
    path.with_name("index.usearch.json").write_bytes(b"{")
    with pytest.raises(InputError, match="is damaged: build it anew"):
        indexed_search(indexed, queries)
    path.unlink()
    path.with_name("index.usearch.json").unlink()
    with pytest.raises(InputError, match="has no index: build it by perception-rt index"):
        indexed_search(indexed, queries)


def test_index_of_no_rows(tmp_path: Path) -> None:
    pytest.importorskip("usearch")
    result = write(tmp_path / "rows.npy", np.zeros((0, 4), np.float32))
    with pytest.raises(InputError, match="has no rows to index"):
        build_index(result)
    assert not has_index(result)
    assert exact_search(result, np.eye(4)[:1]) == [[]]


def test_without_usearch(results, queries, monkeypatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "usearch", None)
    with pytest.raises(BackendError, match=r'pip install "perception_rt\[search\]"'):
        build_index(results["rows"])


# Queries


class FakeEngine:
    """An engine whose text is one axis and whose image another."""

    def __init__(self, package: str) -> None:
        content = type("Content", (), {"name": "M"})
        self.manifest = type("Manifest", (), {"id": package, "content": content})

    def embed_texts(self, texts):
        return np.eye(DIM, dtype=np.float32)[: len(texts)]

    def embed_images(self, images):
        return np.eye(DIM, dtype=np.float32)[1 : 1 + len(images)]


def test_query_of_text_and_image(results) -> None:
    engine, result = FakeEngine("a"), results["rows"]
    assert embed_query(engine, result, "x").tolist() == np.eye(DIM)[0].tolist()
    assert embed_query(engine, result, None, "x.png").tolist() == np.eye(DIM)[1].tolist()
    both = embed_query(engine, result, "x", "x.png")
    np.testing.assert_allclose(both[:3], [0.5**0.5, 0.5**0.5, 0], rtol=1e-6)
    with pytest.raises(InputError, match="nothing to search for"):
        embed_query(engine, result)
    with pytest.raises(InputError, match=r"embedded by a \('M'\), not by b \('M'\)"):
        embed_query(FakeEngine("b"), result, "x")


def test_facts_of_an_index(indexed: Result) -> None:
    facts = json.loads(index_path(indexed).with_name("index.usearch.json").read_text())
    assert facts["package"] == "a" and facts["path"] == "index.usearch" and facts["rows"] == 300
    assert best([], 3) == []
