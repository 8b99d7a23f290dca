"""The process group of a run: one process, or the ranks that torchrun started.

Only this module reads torchrun's environment variables. A single process forms a group of one, so
sharding and checkpoints use the same code everywhere.
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

_TIMEOUT = timedelta(minutes=10)  # per collective: another rank may be saving or reading data


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """The place of this process in the run.

    Attributes:
        rank: data rank; equal for all processes of one tensor-parallel group.
        ranks: number of data ranks.
        tensor_rank: rank among the processes that share each layer, and therefore their data.
        processes: number of processes.
        device: device to compute on.
        fair_threads: this process's share of the machine's CPU cores.
        control: process group for small CPU tensors; None if the default group handles them.
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
    """Joins the group that torchrun set up, or makes a group of one process.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        tensor: number of processes that share each layer.

    Raises:
        InputError: there is no GPU, or `tensor` does not divide the number of processes.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch finds no GPU; use run.device=cpu")
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
            fair_threads=max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
            control=dist.new_group(backend="gloo", timeout=_TIMEOUT) if cuda else None,
            is_main=rank == 0,
        )
    finally:
        dist.destroy_process_group()


def available_cores() -> int:
    """Number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def build_mesh(config: ParallelConfig, group: Group) -> DeviceMesh:
    """Arranges the processes as a grid with the dimensions `replicate`, `shard` and `tensor`.

    Dimensions of size 1 are left out, except `shard`. Neighbouring processes share layers, then
    weights.

    Raises:
        InputError: the number of processes does not fit the recipe.
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
    """Averages every gradient over processes, with one all-reduce per dtype.

    A missing gradient counts as zeros, since other processes may have one.
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
    """Sums a tensor over the data ranks. All processes call it with a tensor on any device."""
    summed = value.detach().clone()
    if group.tensor_rank > 0:
        summed.zero_()  # ranks that share layers hold the same value; it counts once
    if group.processes > 1:
        dist.all_reduce(summed, group=group.control if summed.device.type == "cpu" else None)
    return summed
