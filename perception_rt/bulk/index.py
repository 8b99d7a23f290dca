"""An approximate index (HNSW) of a result, by usearch (extra `search`), which is imported lazily.

The index holds row numbers and rows in float16. Hits are scored again from the result's own rows,
so scores are those of an exact search, and only the choice of rows is approximate.

Legend: N rows, D channels, Q queries.
"""

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.atomic import replacing, write_bytes
from perception_rt.bulk.result import Result
from perception_rt.bulk.rows import count_rows, rows_at
from perception_rt.bulk.search import (
    Float32,
    Hit,
    RowProgress,
    best,
    check_k,
    check_package,
    check_queries,
    cosines,
    exact_search,
)
from perception_rt.errors import BackendError, InputError
from perception_rt.records import check_integer

RECALL_K = 10
MAX_QUERIES = 200  # of the recall
CONNECTIVITY = 16
EXPANSION, MAX_EXPANSION = 128, 4096
_VERSION = 1
_TIE = 1e-6  # two scores this close count as equal


@dataclass(frozen=True, slots=True, kw_only=True)
class IndexReport:
    """Facts about an index that was built.

    Attributes:
        path: its file.
        rows: rows in it.
        size_bytes: size of its file.
        queries: queries that the recall was measured with.
        k: neighbours per query.
        recall: share of the k nearest rows that the index finds.
    """

    path: Path
    rows: int
    size_bytes: int
    queries: int
    k: int
    recall: float


def index_path(result: Result) -> Path:
    """File of a result's index: in its folder, or beside its file."""
    if result.path.is_dir():
        return result.path / "index.usearch"
    return result.path.with_name(f"{result.path.name}.usearch")


def has_index(result: Result) -> bool:
    """Whether a result has an index, which may be out of date."""
    return _facts_path(result).is_file()


def build_index(
    result: Result,
    queries: Result | None = None,
    *,
    expansion: int = EXPANSION,
    threads: int = 0,
    on_progress: RowProgress | None = None,
) -> IndexReport:
    """Builds the index of a result and measures its recall; replaces an earlier index.

    Args:
        result: the result.
        queries: another result of the same package, whose first rows are the queries of the
            recall. None for rows of the result, which then do not count as their own neighbours.
        expansion: candidates kept while a row is added or searched; more of them give a higher
            recall and take more time.
        threads: threads that build; 0 for one per core. The graph depends on their timing.
        on_progress: called with the number of rows added so far.

    Raises:
        InputError: the expansion is unusable, the result has no rows or is damaged, or `queries` is
            of another package.
        BackendError: usearch is not installed.
    """
    expansion = check_integer("expansion", expansion, 1, MAX_EXPANSION)
    usearch = _usearch()
    if queries is not None:
        check_package(queries, result.package, result.model)
    marks = _fingerprint(result)
    index, added = empty_index(usearch, result.dim, expansion), 0
    for _, _, rows in result.blocks():
        keys = np.arange(added, added + len(rows), dtype=np.uint64)
        index.add(keys, rows.astype(np.float32), threads=threads)
        added += len(rows)
        if on_progress is not None:
            on_progress(added)
    if not added:
        raise InputError(f"{str(result.path)!r:.200} has no rows to index")
    number, recall = _recall(index, result, added, queries, threads)
    path, facts = index_path(result), _facts_path(result)
    facts.unlink(missing_ok=True)  # an index without its facts does not exist
    with replacing(path) as file:
        index.save(str(file.name))
    report = IndexReport(
        path=path, rows=added, size_bytes=path.stat().st_size, queries=number, k=RECALL_K,
        recall=recall,
    )  # fmt: skip
    record = {
        **asdict(report), "path": path.name, "version": _VERSION, "expansion": expansion,
        "usearch": usearch.__version__, "package": result.package, "dim": result.dim,
        "fingerprint": marks,
    }  # fmt: skip
    write_bytes(facts, json.dumps(record, indent=2).encode("ascii") + b"\n")
    return report


def indexed_search(result: Result, queries: NDArray[Any], k: int = 20) -> list[list[Hit]]:
    """Finds rows with the index of a result; arguments and hits as of `exact_search`.

    The index is mapped into memory, not read as a whole. It may miss a row.

    Raises:
        InputError: there is no index, or the result has changed since it was built.
        BackendError: usearch is not installed.
    """
    queries = check_queries(result, queries)
    return _search(_open(result), result, queries, check_k(k))


def _search(
    index: Any, result: Result, queries: Float32, k: int, threads: int = 0
) -> list[list[Hit]]:
    # float16 changes the order of near neighbours: more are fetched than are returned.
    count = min(2 * k, len(index))
    index.expansion_search = max(index.expansion_search, 2 * count)
    keys = [[int(key) for key in index.search(q, count, threads=threads).keys] for q in queries]
    found = rows_at(result, [key for of_query in keys for key in of_query])
    hits: list[list[Hit]] = []
    for query, of_query in zip(queries, keys, strict=True):
        if not of_query:
            hits.append([])
            continue
        scores = cosines(np.stack([found[key][2] for key in of_query]), query)
        scored = [
            Hit(row=key, id=found[key][0], source=found[key][1], score=float(score))
            for key, score in zip(of_query, scores, strict=True)
        ]
        hits.append(best(scored, k))
    return hits


def _recall(
    index: Any, result: Result, rows: int, queries: Result | None, threads: int
) -> tuple[int, float]:
    """Number of queries, and the share of their nearest rows that the index finds."""
    own: list[int] = []
    if queries is None:
        own = np.unique(np.linspace(0, rows - 1, MAX_QUERIES).astype(int)).tolist()
        found = rows_at(result, own)
        asked = np.stack([found[number][2] for number in own]).astype(np.float32)
    else:
        numbers = range(min(MAX_QUERIES, count_rows(queries)))
        if not numbers:
            raise InputError(f"{str(queries.path)!r:.200} has no rows to ask with")
        found = rows_at(queries, numbers)
        asked = np.stack([found[number][2] for number in numbers]).astype(np.float32)
    k = RECALL_K + bool(own)
    exact = exact_search(result, asked, k)
    close = _search(index, result, asked, k, threads)
    right = total = 0
    for number, (true, got) in enumerate(zip(exact, close, strict=True)):
        itself = own[number] if own else None
        nearest = [hit.score for hit in true if hit.row != itself][:RECALL_K]
        if nearest:
            scores = [hit.score for hit in got if hit.row != itself][: len(nearest)]
            right += sum(score >= nearest[-1] - _TIE for score in scores)
            total += len(nearest)
    return len(asked), right / total if total else 1.0


def _open(result: Result) -> Any:
    usearch = _usearch()
    path, facts_path = index_path(result), _facts_path(result)
    again = f"perception-rt index {result.path}"
    try:
        facts = json.loads(facts_path.read_bytes())
        size = path.stat().st_size
    except FileNotFoundError:
        raise InputError(f"{str(result.path)!r:.200} has no index: build it by {again}") from None
    except (OSError, ValueError, RecursionError):
        facts, size = None, 0
    if not isinstance(facts, dict) or facts.get("size_bytes") != size:
        raise InputError(f"index {str(path)!r:.200} is damaged: build it anew by {again}")
    if facts.get("version") != _VERSION or facts.get("fingerprint") != _fingerprint(result):
        raise InputError(
            f"index {str(path)!r:.200} is older than its result: build it anew by {again}"
        )
    index = empty_index(usearch, result.dim)
    try:
        index.view(str(path))
        index.expansion_search = int(facts["expansion"])
    except Exception:  # usearch raises what its C++ throws
        index = None
    if index is None or len(index) != facts.get("rows") or index.ndim != result.dim:
        raise InputError(f"index {str(path)!r:.200} is damaged: build it anew by {again}")
    return index


def _fingerprint(result: Result) -> str:
    """Changes with the result: a digest of its package, and of names, sizes and times of files."""
    digest = hashlib.sha256(f"{result.package} {result.dim}\n".encode())
    for path in result.files:
        status = path.stat()
        digest.update(f"{path.name!r} {status.st_size} {status.st_mtime_ns}\n".encode())
    return f"sha256:{digest.hexdigest()}"


def _facts_path(result: Result) -> Path:
    path = index_path(result)
    return path.with_name(f"{path.name}.json")


def empty_index(usearch: Any, dim: int, expansion: int = EXPANSION) -> Any:
    """An index without rows, of the module `usearch`."""
    return usearch.index.Index(
        ndim=dim, metric="ip", dtype="f16", connectivity=CONNECTIVITY,
        expansion_add=expansion, expansion_search=expansion,
    )  # fmt: skip


def _usearch() -> Any:
    try:
        import usearch
        import usearch.index
    except ImportError:
        raise BackendError('an index needs usearch: pip install "perception_rt[search]"') from None
    return usearch
