"""Searches the rows of a result for those nearest to a query.

Legend: N rows, D channels, Q queries.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.bulk.result import Result
from perception_rt.errors import InputError
from perception_rt.records import check_integer

Float32 = NDArray[np.float32]
Float64 = NDArray[np.float64]
RowProgress: TypeAlias = Callable[[int], None]

MAX_HITS = 10_000
MAX_EXACT_ROWS = 1_000_000  # above, commands use an index if there is one
# Above the error of a float32 product of unit rows, whose sum depends on the block.
_MARGIN = 1e-5


class QueryEngine(Protocol):
    """The part of `perception_rt.Embedder` that a query uses."""

    manifest: Any

    def embed_images(self, images: Any) -> Float32:
        """Embeds images."""

    def embed_texts(self, texts: Any) -> Float32:
        """Embeds texts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hit:
    """A row found.

    Attributes:
        row: its number in the result, from 0.
        id: number of its item; in a `.npy` result, the same as `row`.
        source: name of its item.
        score: cosine with the query.
    """

    row: int
    id: int
    source: str
    score: float


def check_package(result: Result, package: str, model: str) -> None:
    """Checks that a package embedded a result.

    Args:
        result: the result.
        package: id of the package.
        model: name of its model.

    Raises:
        InputError: another package did; rows of two packages cannot be compared.
    """
    if result.package != package:
        raise InputError(
            f"{str(result.path)!r:.200} was embedded by {result.package} ({result.model!r:.80}), "
            f"not by {package} ({model!r:.80}): search it with the package that made it"
        )


def embed_query(
    engine: QueryEngine, result: Result, text: str | None = None, image: Any = None
) -> Float32:
    """Embeds a text, an image, or both: then the query is the mean of the two directions.

    Args:
        engine: the package that embedded the result.
        result: the result to search.
        text: a text, or None.
        image: whatever `Embedder.embed_images` takes, or None.

    Returns:
        A unit row (D).

    Raises:
        InputError: there is neither, one is unusable, or the package is another one.
    """
    check_package(result, engine.manifest.id, engine.manifest.content.name)
    parts = []
    if text is not None:
        parts.append(engine.embed_texts([text])[0])
    if image is not None:
        parts.append(engine.embed_images([image])[0])
    if not parts:
        raise InputError("nothing to search for: give a text, an image or both")
    total = np.sum(parts, axis=0)
    unit: Float32 = (total / max(float(np.linalg.norm(total)), 1e-12)).astype(np.float32)
    return unit if len(parts) > 1 else parts[0]


def exact_search(
    result: Result, queries: NDArray[Any], k: int = 20, *, on_progress: RowProgress | None = None
) -> list[list[Hit]]:
    """Compares every row with every query; memory does not grow with the rows.

    Scores are float64 sums and depend on the row and the query alone, not on the kind of result.

    Args:
        result: the result to search.
        queries: unit rows (Q, D).
        k: hits per query.
        on_progress: called with the number of rows compared so far.

    Returns:
        For each query, at most k hits by falling score; equal scores by item number.

    Raises:
        InputError: k or the shape of the queries is unusable, or the result is damaged.
    """
    queries = check_queries(result, queries)
    found = [_Nearest(query, check_k(k)) for query in queries]
    start = 0
    for ids, sources, rows in result.blocks():
        scores = rows.astype(np.float32, copy=False) @ queries.T
        for number, nearest in enumerate(found):
            nearest.add(start, ids, sources, rows, scores[:, number])
        start += len(rows)
        if on_progress is not None:
            on_progress(start)
    return [nearest.hits for nearest in found]


def check_k(k: object) -> int:
    """Returns a number of hits; InputError if it is unusable."""
    return check_integer("k", k, 1, MAX_HITS)


def check_queries(result: Result, queries: NDArray[Any]) -> Float32:
    """Returns queries as float32 (Q, D); InputError if they have another shape."""
    queries = np.asarray(queries)
    if queries.ndim != 2 or queries.shape[1] != result.dim:
        raise InputError(
            f"queries must be (Q, {result.dim}), the channels of {str(result.path)!r:.200}, "
            f"not {queries.shape}"
        )
    return queries.astype(np.float32, copy=False)


def cosines(rows: NDArray[Any], query: NDArray[Any]) -> Float64:
    """Scores (N) of rows (N, D): sums whose order depends on D alone, unlike those of BLAS."""
    products = rows.astype(np.float64) * query.astype(np.float64)
    scores: Float64 = products.sum(axis=1)
    return scores


class _Nearest:
    """The best hits of one query so far."""

    def __init__(self, query: Float32, k: int) -> None:
        self._query = query
        self._k = k
        self.hits: list[Hit] = []

    def add(
        self, start: int, ids: NDArray[np.int64], sources: list[str], rows: NDArray[Any],
        rough: Float32,
    ) -> None:  # fmt: skip
        """Adds a block.

        Args:
            start: number of its first row.
            ids: int64 (N).
            sources: N names.
            rows: (N, D).
            rough: float32 scores (N), which select the candidates.
        """
        least = self.hits[-1].score if len(self.hits) == self._k else -np.inf
        if len(rough) > self._k:
            least = max(least, float(np.partition(rough, -self._k)[-self._k]))
        (candidates,) = np.nonzero(rough >= least - _MARGIN)
        if not len(candidates):
            return
        scores = cosines(rows[candidates], self._query)
        hits = [
            Hit(row=start + int(n), id=int(ids[n]), source=sources[n], score=float(score))
            for n, score in zip(candidates, scores, strict=True)
        ]
        self.hits = best(self.hits + hits, self._k)


def best(hits: list[Hit], k: int) -> list[Hit]:
    """The k hits with the highest scores; equal scores by item number."""
    return sorted(hits, key=lambda hit: (-hit.score, hit.id, hit.row))[:k]
