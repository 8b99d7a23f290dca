"""The process group of a run: one process, or the ranks that torchrun started.

The only module that reads torchrun's environment. A single process is a group of one, so that
sharding and checkpoints are the same code everywhere.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from perception_rt.errors import InputError
from training.recipe.schema import ParallelConfig

_TIMEOUT = timedelta(minutes=10)  # of a message: the other ranks may be saving or reading


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """This process's place.

    Attributes:
        rank: of the data: ranks of one tensor-parallel group have the same.
        ranks: that data is spread over.
        tensor_rank: among the processes that share each layer, and so their data.
        processes: of the run.
        device: what this process computes on.
        fair_threads: of the machine's cores, this process's share.
        control: group of all processes for small values in host memory; None for the default one.
        is_main: whether this process writes files and prints.
    """

    rank: int = 0
    ranks: int = 1
    tensor_rank: int = 0
    processes: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    fair_threads: int = 1
    control: dist.ProcessGroup | None = None
    is_main: bool = True


@contextmanager
def process_group(device: str = "auto", tensor: int = 1) -> Iterator[Group]:
    """Joins the group that torchrun set up, or makes a group of one.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        tensor: processes that share each layer, and so their data.

    Raises:
        InputError: there is no GPU, or the processes cannot be divided so.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("run.device is cuda, and torch finds no GPU")
    here = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else None
    if here is not None:
        torch.cuda.set_device(here)
    backend = "nccl" if cuda else "gloo"
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    try:
        rank, processes = dist.get_rank(), dist.get_world_size()
        if processes % tensor:
            raise InputError(f"parallel.tensor {tensor} does not divide the {processes} processes")
        yield Group(
            rank=rank // tensor,
            ranks=processes // tensor,
            tensor_rank=rank % tensor,
            processes=processes,
            device=here or torch.device("cpu"),
            fair_threads=max(1, _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            control=dist.new_group(backend="gloo", timeout=_TIMEOUT) if cuda else None,
            is_main=rank == 0,
        )
    finally:
        dist.destroy_process_group()


def _cores() -> int:
    """That this process may run on."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_mesh(config: ParallelConfig, group: Group) -> DeviceMesh:
    """The processes as a grid: `replicate` and `tensor`, where they are more than one, and `shard`.

    Processes that share layers are neighbours, and so are those that share weights.

    Raises:
        InputError: the processes cannot be divided so.
    """
    shard = {"replicate": 1, "shard": group.ranks, "hybrid": config.shard_ranks}[config.mode]
    if group.ranks % shard:
        raise InputError(
            f"parallel.shard_ranks {shard} does not divide the {group.ranks} ranks that data is "
            "spread over"
        )
    sizes = {"replicate": group.ranks // shard, "shard": shard, "tensor": config.tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(group.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def average_gradients(parameters: Iterable[nn.Parameter], group: Group) -> None:
    """Replaces every gradient by its mean over processes, in one message per dtype.

    A parameter without a gradient has one of zeros: others may have used it.
    """
    if group.processes == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
    for grads in by_dtype.values():
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        flat /= group.processes
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))


def total(value: Tensor, group: Group) -> Tensor:
    """The sum of a tensor, on any device, over the ranks that data is spread over.

    Called by all processes.
    """
    summed = value.detach().clone()
    if group.tensor_rank > 0:
        summed.zero_()  # the others that share these layers have the same
    if group.processes > 1:
        dist.all_reduce(summed, group=group.control if summed.device.type == "cpu" else None)
    return summed
