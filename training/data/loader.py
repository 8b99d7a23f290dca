"""Batches from lanes: endless rows of data, each a pure function of where it is.

A batch of B rows has B lanes, whatever the number of ranks; a rank reads the lanes of its share.
The position of a lane is one integer, so all B of them are the data position of a run, and a run
that goes on with another number of ranks goes on with the same batches. Rows are read ahead by
threads, which changes nothing: a position counts once its row was handed out.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from perception_rt.errors import InputError, PerceptionError
from training.distributed import Group, total

R = TypeVar("R")
M = TypeVar("M")
R_co = TypeVar("R_co", covariant=True)

_ENOUGH = 100  # samples, before the share of bad ones means anything


@dataclass(frozen=True, slots=True, kw_only=True)
class Read(Generic[R_co]):
    """One row of one lane.

    Attributes:
        row: what the task makes a batch of.
        position: where the lane goes on.
        seen: samples that were looked at.
        bad: why samples were left out, and how many for each reason.
    """

    row: R_co
    position: int
    seen: int = 1
    bad: Counter[str] = field(default_factory=Counter)


class Source(Protocol[R_co]):
    """Where rows come from. Called by several threads."""

    def read(self, lane: int, position: int) -> "Read[R_co]":
        """The row of a lane at a position; the same for the same arguments, in any order."""


class LaneStream(Generic[R, M]):
    """This rank's share of every batch.

    Args:
        source: rows.
        collate: rows of one part of a batch, in lane order, to what the model is given.
        lanes: rows per step over all ranks.
        parts: that a rank's share is cut into, for gradient accumulation.
        group: this process's place among the ranks.
        workers: threads that read ahead.
        bad_fraction: share of samples that may be bad.
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
        self._counts = torch.zeros(2, dtype=torch.int64)  # of this rank: samples seen, bad ones
        self.reasons: Counter[str] = Counter()  # of this rank, since the start of the process
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="data")
        self._ahead: list[Future[Read[R]]] | None = None

    def next(self) -> list[M]:
        """The parts of this rank's share of the next batch.

        Raises:
            PerceptionError: more samples than may be are unusable.
        """
        reads = [future.result() for future in self._ahead or self._submit()]
        for lane, read in zip(self._own, reads, strict=True):
            self._positions[lane] = read.position
            self._counts += torch.tensor([read.seen, read.bad.total()])
            self.reasons.update(read.bad)
        self._check_bad()
        self._ahead = self._submit()
        size = len(reads) // self._parts
        rows = [read.row for read in reads]
        return [self._collate(rows[i : i + size]) for i in range(0, len(rows), size)]

    @property
    def bad_samples(self) -> int:
        """Unusable samples that this rank has met."""
        return int(self._counts[1])

    def state(self) -> dict[str, Tensor]:
        """The position of every lane, int64, and counts; the same on all ranks, which all call."""
        own = torch.zeros_like(self._positions)
        own[self._own.start : self._own.stop] = self._positions[self._own.start : self._own.stop]
        counts = total(self._counts, self._group)
        return {"positions": total(own, self._group), "counts": counts}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Goes on where `state` was taken, on this rank's share of the lanes."""
        self._positions.copy_(state["positions"])
        # Counts are of all ranks together: the first goes on with them.
        self._counts.copy_(state["counts"] if self._group.is_main else torch.zeros(2))
        self._ahead = None

    def close(self) -> None:
        """Ends the threads; rows that they were at are not waited for."""
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _submit(self) -> list[Future[Read[R]]]:
        read, positions = self._source.read, self._positions
        return [self._pool.submit(read, lane, int(positions[lane])) for lane in self._own]

    def _check_bad(self) -> None:
        seen, bad = (int(count) for count in self._counts)
        if seen >= _ENOUGH and bad > self._bad_fraction * seen:
            common = "; ".join(f"{why} ({n} times)" for why, n in self.reasons.most_common(3))
            raise PerceptionError(
                f"{bad} of {seen} samples are unusable; data.bad_fraction is "
                f"{self._bad_fraction}: {common}"
            )
