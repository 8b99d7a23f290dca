"""Loads batches from lanes: endless sequences of rows, each row a pure function of its place.

A batch of B rows has B lanes, whatever the number of ranks; each rank reads an equal share of them.
A lane's position is one integer, so the B positions are a run's whole data state, and a run may
resume with another number of ranks. Threads read rows ahead; a position advances only when its row
is handed out.
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from perception_rt.errors import InputError, PerceptionError
from training.data.unusable import Unusable, summary
from training.distributed import Group, total

R = TypeVar("R")
M = TypeVar("M")
R_co = TypeVar("R_co", covariant=True)

_MIN_SEEN = 100  # samples before the share of unusable ones is checked
_MAX_KEPT = 100_000  # most unusable samples that are told apart
_MAX_WARNINGS = 5  # most unusable samples that a rank reports as it meets them


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Generic[R_co]):
    """One row of a lane.

    Attributes:
        row: a row, which the task collates to a batch.
        position: next position of the lane.
        seen: number of samples that were examined.
        bad: unusable samples.
    """

    row: R_co
    position: int
    seen: int = 1
    bad: tuple[Unusable, ...] = ()


class Source(Protocol[R_co]):
    """Provides rows. Several threads may call it."""

    def read(self, lane: int, position: int) -> "Read[R_co]":
        """Reads the row of a lane at a position; equal arguments give equal rows, in any order."""


class LaneStream(Generic[R, M]):
    """Loads this rank's share of every batch.

    Args:
        source: source of rows.
        collate: makes a part of a batch from rows in lane order.
        lanes: rows per step over all ranks.
        parts: parts per batch share, for gradient accumulation.
        group: this process's place among the ranks.
        workers: number of threads that read ahead.
        bad_fraction: share of samples that may be unusable, from 0 to 1.

    Raises:
        InputError: `lanes` is not divisible by the number of ranks times `parts`.
    """

    def __init__(
        self,
        source: Source[R],
        collate: Callable[[Sequence[R]], M],
        *,
        lanes: int,
        parts: int,
        group: Group,
        workers: int,
        bad_fraction: float = 0.0,
    ) -> None:
        if lanes % (group.ranks * parts):
            raise InputError(
                f"data.batch_size {lanes} is not divisible by {group.ranks} processes times "
                f"optim.accumulation {parts}"
            )
        self._source = source
        self._collate = collate
        self._parts = parts
        self._group = group
        share = lanes // group.ranks
        self._own = range(group.rank * share, (group.rank + 1) * share)
        self._bad_fraction = bad_fraction
        self._positions = torch.zeros(lanes, dtype=torch.int64)
        # Samples read by this rank, and unusable ones among them; an epoch counts each again.
        self._counts = torch.zeros(2, dtype=torch.int64)
        # Unusable samples that this rank has met since the process started, by name.
        self._unusable: dict[str, Unusable] = {}
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
        self._ahead: list[Future[Read[R]]] | None = None

    def next(self) -> list[M]:
        """Returns the parts of this rank's share of the next batch.

        Raises:
            PerceptionError: more samples than `bad_fraction` allows are unusable.
        """
        reads = [future.result() for future in self._ahead or self._submit()]
        for lane, read in zip(self._own, reads, strict=True):
            self._positions[lane] = read.position
            self._counts += torch.tensor([read.seen, len(read.bad)])
            self._report(read.bad)
        self._check_bad()
        self._ahead = self._submit()
        size = len(reads) // self._parts
        rows = [read.row for read in reads]
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    @property
    def bad_samples(self) -> int:
        """Number of different unusable samples that this rank has met since it started."""
        return len(self._unusable)

    def state(self) -> dict[str, Tensor]:
        """Returns positions, int64 (lanes,), and counts, int64 (2,), equal on all ranks.

        All ranks must call it.
        """
        own = torch.zeros_like(self._positions)
        own[self._own.start : self._own.stop] = self._positions[self._own.start : self._own.stop]
        counts = total(self._counts, self._group)
        return {"positions": total(own, self._group), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Continues from a state on this rank's share of the lanes."""
        self._positions.copy_(state["positions"])
        # Saved counts are sums over ranks: the main rank continues them, the others start at 0.
        self._counts.copy_(state["counts"] if self._group.is_main else torch.zeros(2))
        self._ahead = None

    def close(self) -> None:
        """Stops the threads without waiting for rows in progress."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> list[Future[Read[R]]]:
        read, positions = self._source.read, self._positions
        return [self._pool.submit(read, lane, int(positions[lane])) for lane in self._own]

    def _report(self, samples: Sequence[Unusable]) -> None:
        """Notes unusable samples and warns of the first ones."""
        for sample in samples:
            if sample.name in self._unusable or len(self._unusable) == _MAX_KEPT:
                continue
            self._unusable[sample.name] = sample
            if len(self._unusable) <= _MAX_WARNINGS:
                text = f"WARNING: {sample.name} is unusable and skipped: {sample.problem}"
                print(text, file=sys.stderr, flush=True)

    def _check_bad(self) -> None:
        seen, bad = (int(count) for count in self._counts)
        if seen >= _MIN_SEEN and bad > self._bad_fraction * seen:
            reasons = summary(self._unusable.values())
            raise PerceptionError(
                f"unusable samples: {self.bad_samples} different, in {bad} of {seen} samples "
                f"read; data.bad_fraction is {self._bad_fraction}: {reasons}"
            )
