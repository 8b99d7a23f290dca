"""Embeds the items of several clients in one engine call."""

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError, QueueFullError

Float32 = NDArray[np.float32]
Run = Callable[[list[Any]], Float32]

MOST_ITEMS = 64  # of one batch, unless one client sends more
MOST_WAITING = 4096


@dataclass(slots=True, eq=False)
class _Job:
    items: Sequence[Any]
    rows: "asyncio.Future[Float32]" = field(repr=False)


class Batcher:
    """Collects items for a moment, then embeds them together. For one event loop."""

    def __init__(
        self,
        run: Run,
        executor: ThreadPoolExecutor,
        *,
        window_s: float,
        on_batch: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Makes a batcher.

        Args:
            run: embeds items, float32 (N, D); called in the executor.
            executor: of one thread if engine calls must not overlap.
            window_s: how long the first item of a batch waits for others.
            on_batch: called with the number of items of each batch.
        """
        self._run = run
        self._executor = executor
        self._window_s = window_s
        self._on_batch = on_batch
        self._jobs: deque[_Job] = deque()
        self._task: asyncio.Task[None] | None = None

    @property
    def waiting(self) -> int:
        """Items that wait for a batch."""
        return sum(len(job.items) for job in self._jobs)

    async def embed(self, items: Sequence[Any]) -> Float32:
        """Embeds items, float32 (N, D).

        If this call is cancelled before its batch begins, its items are left out.

        Raises:
            QueueFullError: too many items wait.
            PerceptionError: as `run`, for these items alone.
        """
        if self._jobs and self.waiting + len(items) > MOST_WAITING:
            raise QueueFullError(f"{self.waiting} items wait already; the limit is {MOST_WAITING}")
        job = _Job(items, asyncio.get_running_loop().create_future())
        self._jobs.append(job)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._work())
        return await job.rows

    async def _work(self) -> None:
        loop = asyncio.get_running_loop()
        while self._jobs:
            if self._window_s and self.waiting < MOST_ITEMS:
                await asyncio.sleep(self._window_s)
            jobs = self._next()
            if not jobs:
                continue
            self._on_batch(sum(len(job.items) for job in jobs))
            parts = [job.items for job in jobs]
            try:
                found = await loop.run_in_executor(self._executor, run_parts, self._run, parts)
            except Exception as error:
                found = [error] * len(jobs)
            for job, rows in zip(jobs, found, strict=True):
                if job.rows.done():  # cancelled
                    continue
                if isinstance(rows, Exception):
                    job.rows.set_exception(rows)
                else:
                    job.rows.set_result(rows)

    def _next(self) -> list[_Job]:
        jobs: list[_Job] = []
        count = 0
        while self._jobs:
            if self._jobs[0].rows.done():
                self._jobs.popleft()
                continue
            count += len(self._jobs[0].items)
            if jobs and count > MOST_ITEMS:
                break
            jobs.append(self._jobs.popleft())
        return jobs


def run_parts(run: Run, parts: Sequence[Sequence[Any]]) -> list[Float32 | Exception]:
    """Rows of each part, or its error. A part with an unusable item does not spoil the others."""
    try:
        rows = run([item for part in parts for item in part])
    except InputError as error:
        if len(parts) == 1:
            return [error]
        return [run_parts(run, [part])[0] for part in parts]
    ends = np.cumsum([len(part) for part in parts])
    return list(np.split(rows, ends[:-1]))
