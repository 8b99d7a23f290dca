"""The process group of a run: one process, or the ranks that torchrun started, over gloo.

The only module that reads torchrun's environment. Collectives here are no-ops for one process.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This process's `rank` among `ranks`."""

    rank: int = 0
    ranks: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0


@contextmanager
def process_group() -> Iterator[Group]:
    """Joins the group that torchrun set up, or stands alone without torchrun."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield Group()
        return
    dist.init_process_group("gloo")
    try:
        yield Group(rank=dist.get_rank(), ranks=dist.get_world_size())
    finally:
        dist.destroy_process_group()


def average_gradients(parameters: Iterable[Tensor], group: Group) -> None:
    """Replaces every gradient by its mean over ranks, in one message."""
    if group.ranks == 1:
        return
    grads = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in grads])
    dist.all_reduce(flat)
    flat /= group.ranks
    for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
        grad.copy_(part.view_as(grad))


def average(value: Tensor, group: Group) -> Tensor:
    """The mean of a scalar over ranks."""
    total = value.detach().clone()
    if group.ranks > 1:
        dist.all_reduce(total)
    return total / group.ranks
