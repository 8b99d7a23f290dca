"""The process group of a run: one process, or the ranks that torchrun started.

Only this module reads torchrun's environment variables. A single process forms a group of one, so
sharding and checkpoints use the same code everywhere.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore, PrefixStore, Store
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from perception_rt.cores import available_cores
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


def is_first_process() -> bool:
    """Whether this process is the only one or torchrun's rank 0."""
    return int(os.environ.get("RANK", "0")) == 0


class Launch:
    """The processes that torchrun started, before they form a group.

    They share a key-value store, through which they agree whether to form the group.
    """

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", "0"))
        self.processes = int(os.environ.get("WORLD_SIZE", "1"))
        # None for a single process.
        self.store: Store | None = None
        if self.processes > 1:
            self.store, _, _ = next(rendezvous("env://", timeout=_TIMEOUT))

    def all_ready(self, report: Callable[[], object] | None) -> bool:
        """Returns whether every process is ready; otherwise one that is not calls its `report`.

        All processes must call it. Returns after the report, so that a launcher which stops all
        processes when one ends does not cut it off.

        Args:
            report: prints why this process is not ready; None if it is.
        """
        if self.store is None:
            if report is not None:
                report()
            return report is None
        first = report is not None and self._claims("reporter")
        self._meet("checked")
        if not self.store.check(["reporter"]):
            return True
        if first and report is not None:
            report()
        self._meet("reported")
        self._leave()
        return False

    def _claims(self, name: str) -> bool:
        """Whether this is the first process to claim a name."""
        assert self.store is not None
        own = str(self.rank)
        return self.store.compare_set(name, "", own).decode() == own

    def _meet(self, name: str) -> None:
        """Waits until all processes are here."""
        assert self.store is not None
        if self.store.add(name, 1) == self.processes:
            self.store.set(f"all {name}", "1")
        self.store.wait([f"all {name}"], _TIMEOUT)

    def _leave(self) -> None:
        """Waits in rank 0, which may hold the store, until all others need it no more."""
        assert self.store is not None
        if self.rank == 0:
            self.store.wait(["all left"], _TIMEOUT)
        elif self.store.add("left", 1) == self.processes - 1:
            self.store.set("all left", "1")


def expected_group(device: str = "auto", tensor: int = 1) -> Group:
    """Returns this process's place in the group that `process_group` forms.

    Raises:
        InputError: there is no GPU, or `tensor` does not divide the number of processes.
    """
    cuda = torch.cuda.is_available() if device == "auto" else device == "cuda"
    if cuda and not torch.cuda.is_available():
        raise InputError("run.device is cuda, but torch finds no GPU; use run.device=cpu")
    rank, processes = (int(os.environ.get(k, v)) for k, v in (("RANK", "0"), ("WORLD_SIZE", "1")))
    if processes % tensor:
        raise InputError(f"parallel.tensor {tensor} does not divide the {processes} processes")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    return Group(
        rank=rank // tensor,
        ranks=processes // tensor,
        tensor_rank=rank % tensor,
        processes=processes,
        device=torch.device("cuda", local) if cuda else torch.device("cpu"),
        fair_threads=max(1, available_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))),
        is_main=rank == 0,
    )


@contextmanager
def process_group(
    device: str = "auto", tensor: int = 1, store: Store | None = None
) -> Iterator[Group]:
    """Joins the group that torchrun set up, or makes a group of one process.

    Args:
        device: `cpu`, `cuda`, or `auto` for a GPU if there is one.
        tensor: number of processes that share each layer.
        store: the processes' `Launch.store`; None to connect to it here.

    Raises:
        InputError: there is no GPU, or `tensor` does not divide the number of processes.
    """
    group = expected_group(device, tensor)
    cuda = group.device.type == "cuda"
    if cuda:
        torch.cuda.set_device(group.device)
    backend = "nccl" if cuda else "gloo"
    if group.processes == 1:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    elif store is None:
        dist.init_process_group(backend, timeout=_TIMEOUT)
    else:
        dist.init_process_group(
            backend,
            timeout=_TIMEOUT,
            store=PrefixStore("group", store),
            rank=group.rank * tensor + group.tensor_rank,
            world_size=group.processes,
        )
    try:
        control = dist.new_group(backend="gloo", timeout=_TIMEOUT) if cuda else None
        yield replace(group, control=control)
    finally:
        dist.destroy_process_group()


def build_mesh(config: ParallelConfig, group: Group) -> DeviceMesh:
    """Arranges the processes as a grid with the dimensions `replicate`, `shard` and `tensor`.

    Dimensions of size 1 are left out, except `shard`. Neighbouring processes share layers, then
    weights.

    Raises:
        InputError: the number of processes does not fit the recipe.
    """
    shard = shard_size(config, group)
    sizes = {"replicate": group.ranks // shard, "shard": shard, "tensor": config.tensor}
    sizes = {name: size for name, size in sizes.items() if size > 1 or name == "shard"}
    return init_device_mesh(group.device.type, tuple(sizes.values()), mesh_dim_names=tuple(sizes))


def shard_size(config: ParallelConfig, group: Group) -> int:
    """Returns the number of ranks that share the weights; InputError if it does not fit."""
    shard = {"replicate": 1, "shard": group.ranks, "hybrid": config.shard_ranks}[config.mode]
    if group.ranks % shard:
        raise InputError(
            f"parallel.shard_ranks {shard} does not divide the {group.ranks} ranks that data is "
            "spread over"
        )
    return shard


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
