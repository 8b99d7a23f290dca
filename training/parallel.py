"""Distributes a learner over ranks and sets its precision, recomputation and compilation.

A learner arrives on the meta device and leaves with storage, so that no rank ever holds more than
its share. Every block of a tower or decoder is one unit of sharding, recomputation and compilation.

In float32, mode `replicate` uses plain tensors, whose gradients are averaged in one message per
step. Everything else uses FSDP2, also bf16 in mode `replicate`, with shard groups of one rank:
weights, gradient sums and moments stay float32, and a block computes with a bf16 copy of its
weights.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    parallelize_module,
)
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from perception_rt.errors import InputError
from perception_rt.models.decoder import Decoder, DecoderLayer
from perception_rt.models.layers import Block
from training.distributed import Group, average_gradients, build_mesh, shard_size
from training.recipe.schema import ParallelConfig, TrainConfig
from training.tasks.task import Learner

_PRODUCTS = frozenset(
    {
        torch.ops.aten.mm.default,
        torch.ops.aten.addmm.default,
        torch.ops.aten._scaled_dot_product_cudnn_attention.default,
        torch.ops.aten._scaled_dot_product_efficient_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention.default,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    }
)


def prepare(learner: Learner, config: ParallelConfig, group: Group) -> None:
    """Prepares a learner on the meta device for training, in place; its storage is uninitialised.

    Raises:
        InputError: the number of ranks, or of the model's heads, does not fit the recipe.
    """
    sharded = config.mode != "replicate" or config.precision == "bf16" or config.tensor > 1
    mesh = build_mesh(config, group) if sharded else None
    blocks = [m for m in learner.modules() if isinstance(m, Block | DecoderLayer)]
    if mesh is not None and config.tensor > 1:
        split_layers(learner.model, mesh["tensor"])
    for block in blocks:
        if config.checkpointing != "none":
            _recompute(block, selective=config.checkpointing == "selective")
        if config.compile:
            # Only the forward: FSDP's hooks must stay outside the compiled code.
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    if mesh is not None:
        _shard(learner, blocks, config, mesh)
    learner.to_empty(device=group.device)


def require_fit(model: nn.Module, config: ParallelConfig, group: Group) -> None:
    """Raises an InputError if the number of ranks, or of the model's heads, does not fit."""
    shard_size(config, group)
    if config.tensor > 1:
        _require_divisible(model, config.tensor)


def _require_divisible(model: nn.Module, ranks: int) -> None:
    assert isinstance(model, Decoder)  # other recipes require parallel.tensor 1
    config = model.decoder_config
    for name in ("kv_heads", "ffn_dim"):
        if getattr(config, name) % ranks:
            raise InputError(
                f"parallel.tensor {ranks} does not divide the decoder's {name} "
                f"{getattr(config, name)}"
            )


def split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each rank some heads and some hidden channels of every decoder layer."""
    ranks = mesh.size()
    _require_divisible(model, ranks)
    assert isinstance(model, Decoder)
    whole = PrepareModuleInput(
        input_layouts=(Replicate(), None, None), desired_input_layouts=(Replicate(), None, None)
    )
    plan = {
        "attention": whole,
        **{f"attention.{name}": ColwiseParallel() for name in ("wq", "wk", "wv")},
        "attention.wo": RowwiseParallel(),
        **{f"feed_forward.{name}": ColwiseParallel() for name in ("w1", "w3")},
        "feed_forward.w2": RowwiseParallel(),
    }
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        parallelize_module(layer, mesh, plan)
        layer.attention.heads //= ranks
        layer.attention.kv_heads //= ranks


def _recompute(block: nn.Module, *, selective: bool) -> None:
    """Recomputes a block's activations in the backward pass; `selective` keeps matrix products."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    # Not a wrapper module, which would rename the parameters.
    block.forward = partial(checkpoint, block.forward, **settings)  # type: ignore[method-assign]


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(
    learner: Learner, blocks: Sequence[nn.Module], config: ParallelConfig, mesh: DeviceMesh
) -> None:
    """Shards the blocks one by one, then the remaining parameters with the learner."""
    names = mesh.mesh_dim_names or ()
    # Inputs are not cast: rotary tables must stay float32; other inputs meet bf16 weights first.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    settings: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if "replicate" in names else mesh["shard"],
        "mp_policy": policy,
        # A scalar cannot be sharded; every rank has it, and `clip_gradients` averages its gradient.
        "ignored_params": {p for p in learner.parameters() if p.ndim == 0},
    }
    for block in blocks:
        fully_shard(block, **settings)
    model = learner.model
    if isinstance(model, Decoder) and not model.decoder_config.weight_tying:
        fully_shard(model.tok_embeddings, **settings)  # tied ones are also needed by the head
    fully_shard(learner, **settings)


@torch.no_grad()
def fill(model: nn.Module, initial: Callable[[str, torch.Size], Tensor]) -> None:
    """Sets every parameter to its initial value, one at a time.

    Every rank computes the whole value and keeps its share, so nothing is sent.
    """
    for name, parameter in model.named_parameters():
        value = initial(name, parameter.shape)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            value = value.to(parameter.device)
            value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        local_part(parameter).copy_(value)


@contextmanager
def last_part(learner: Learner, last: bool) -> Iterator[None]:
    """Exchanges gradients between ranks only after the last part of a batch.

    Until then, a rank in mode `shard` holds the whole model's gradient in float32; replicated shard
    groups hold their own sum, sharded.
    """
    if isinstance(learner, FSDPModule):
        learner.set_is_last_backward(last)
        if _is_replicated(learner):
            learner.set_requires_all_reduce(last)
        else:
            learner.set_requires_gradient_sync(last)
    yield


def _is_replicated(learner: nn.Module) -> bool:
    sharded = (p for p in learner.parameters() if isinstance(p, DTensor))
    return any("replicate" in (p.device_mesh.mesh_dim_names or ()) for p in sharded)


@contextmanager
def unsharded(learner: Learner) -> Iterator[None]:
    """Gathers the weights, so that parts of the model can be called within the block."""
    if not isinstance(learner, FSDPModule):
        yield
        return
    learner.unshard()
    try:
        yield
    finally:
        learner.reshard()


@torch.no_grad()
def clip_gradients(
    learner: Learner, trained: Sequence[nn.Parameter], config: TrainConfig, group: Group
) -> float:
    """Averages gradients that sharding has not averaged, then clips them.

    Returns:
        The global gradient norm before clipping, equal on all ranks.
    """
    average_gradients((p for p in trained if not isinstance(p, DTensor)), group)
    grads = [p.grad for p in trained if p.grad is not None]
    norm = _global_norm(grads, group)
    factor = min(1.0, config.optim.clip / (norm + 1e-6))
    if factor < 1.0:
        torch._foreach_mul_([local_part(grad) for grad in grads], factor)
    return norm


def _global_norm(grads: Sequence[Tensor], group: Group) -> float:
    """The 2-norm of all gradients together, the same on every rank."""
    norms = torch.stack(torch._foreach_norm([local_part(grad) for grad in grads]))
    # A gradient that several processes hold counts once.
    shares = [_shards(grad) / group.processes for grad in grads]
    squares = (norms**2 * norms.new_tensor(shares)).sum()
    if group.processes > 1:
        dist.all_reduce(squares)
    return float(squares.sqrt())


def _shards(tensor: Tensor) -> int:
    """Number of processes that hold different parts of a tensor; 1 if all hold the same."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def local_part(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
