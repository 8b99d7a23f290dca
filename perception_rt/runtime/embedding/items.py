"""Checks the items given to an embedder, decodes them ahead, and stacks their rows."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image_loader import THREAD_NAME, OnError

Array: TypeAlias = NDArray[Any]
Float32: TypeAlias = NDArray[np.float32]

_T = TypeVar("_T")
_R = TypeVar("_R")


def check_items(items: object, name: str, item_ndim: int = 0) -> None:
    """InputError for a single item where several are expected."""
    one = isinstance(items, str | bytes | os.PathLike)
    one |= isinstance(items, np.ndarray) and items.ndim <= item_ndim
    if one or not isinstance(items, Iterable):
        raise InputError(f"{name} must be a list, not one {type(items).__name__}")


def listed(items: Iterable[Any], name: str, item_ndim: int = 0) -> list[Any]:
    """Items as a list; errors as `check_items`."""
    check_items(items, name, item_ndim)
    return list(items)


def nonempty_array(values: Any) -> Array:
    """Rows as an array; InputError for a ragged list, or one without rows."""
    try:
        array = np.asarray(values)
    except ValueError:
        array = np.empty(0)
    if array.ndim == 0 or array.dtype == object or len(array) == 0:
        raise InputError("expected an array of at least one row")
    return array


def stacked(parts: Iterable[Float32], shape: tuple[int, ...]) -> Float32:
    """One array of all parts, (N, *shape); N may be 0."""
    return np.concatenate([np.empty((0, *shape), np.float32), *parts])


def in_batches(
    items: Sequence[Any] | Array,
    size: int,
    on_progress: Callable[[int, int], None] | None,
    run: Callable[[Any], Float32],
) -> Iterator[Float32]:
    """Results of `run` on parts of at most `size` items."""
    for start in range(0, len(items), size):
        yield run(items[start : start + size])
        if on_progress is not None:
            on_progress(min(start + size, len(items)), len(items))


def unit(rows: Float32) -> Float32:
    """Rows divided by their lengths; zeros stay."""
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    scaled: Float32 = rows / np.maximum(norms, np.float32(1e-12))
    return scaled


def usable_tokens(
    tokenizer: ClipTokenizer, texts: Sequence[str], start: int, on_error: OnError | None
) -> tuple[list[int], Array]:
    """Encodes the usable ones of some texts.

    Args:
        tokenizer: encodes texts.
        texts: the texts.
        start: index of the first, for errors.
        on_error: called with the index and the error of each unusable text; None raises it.

    Returns:
        Positions of the usable texts, and their token ids, int64 (n, context).
    """
    if on_error is None:
        return list(range(len(texts))), tokenizer(texts)
    usable, rows = [], [np.empty((0, tokenizer.context_length), np.int64)]
    for position, text in enumerate(texts):
        try:
            rows.append(tokenizer([text]))
        except InputError as error:
            on_error(start + position, error)
        else:
            usable.append(position)
    return usable, np.concatenate(rows)


def run_ahead(
    work: Callable[[_T], _R], items: Iterable[_T], *, workers: int
) -> Generator[_R | InputError, None, None]:
    """Yields the result of `work` for each item, or its InputError, in order.

    Args:
        work: called in a thread.
        items: its arguments, taken by the calling thread.
        workers: threads, and results that wait at most; with 1, `work` is called in this thread
            when the iterator comes to the item.
    """

    def attempt(item: _T) -> _R | InputError:
        try:
            return work(item)
        except InputError as error:
            return error.with_traceback(None)

    if workers == 1 or (isinstance(items, Sized) and len(items) <= 1):
        yield from map(attempt, items)
        return
    pool = ThreadPoolExecutor(workers, thread_name_prefix=THREAD_NAME)
    pending: deque[Future[_R | InputError]] = deque()
    try:
        for item in items:
            pending.append(pool.submit(attempt, item))
            if len(pending) > workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
