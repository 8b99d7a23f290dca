"""How a learner is spread over ranks and computed: sharding, precision, recomputation, compiling.

A learner comes on the meta device and leaves with storage, so that no rank ever holds more than
its share. Each block of a tower or a decoder is a unit: what is sharded is gathered for a block at
a time, what is computed again is a block, and what is compiled is a block.

In float32, mode `replicate` is plain tensors, whose gradients are averaged in one message per
step. All else is FSDP2, bf16 in mode `replicate` too, as shards in groups of one: weights, sums
of gradients and moments stay float32, and a block is computed in a bf16 copy of its weights.
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
from training.distributed import Group, average_gradients, build_mesh
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
    """Readies a learner that is on the meta device, in place; its storage is uninitialised.

    Raises:
        InputError: the ranks, or the model's heads, cannot be divided as the recipe says.
    """
    sharded = config.mode != "replicate" or config.precision == "bf16" or config.tensor > 1
    mesh = build_mesh(config, group) if sharded else None
    blocks = [m for m in learner.modules() if isinstance(m, Block | DecoderLayer)]
    if mesh is not None and config.tensor > 1:
        _split_layers(learner.model, mesh["tensor"])
    for block in blocks:
        if config.checkpointing != "none":
            _recompute(block, selective=config.checkpointing == "selective")
        if config.compile:
            # The forward alone: what FSDP does around it must stay outside.
            block.forward = torch.compile(block.forward)  # type: ignore[method-assign]
    if mesh is not None:
        _shard(learner, blocks, config, mesh)
    learner.to_empty(device=group.device)


def _split_layers(model: nn.Module, mesh: DeviceMesh) -> None:
    """Gives each rank some heads and some hidden channels of every decoder layer."""
    ranks = mesh.size()
    assert isinstance(model, Decoder)  # other recipes have parallel.tensor 1
    config = model.decoder_config
    for name in ("kv_heads", "ffn_dim"):
        if getattr(config, name) % ranks:
            raise InputError(
                f"parallel.tensor {ranks} does not divide the decoder's {name} "
                f"{getattr(config, name)}"
            )
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
    """Computes a block's activations again in the backward pass, all or all but the products."""
    settings: dict[str, Any] = {"use_reentrant": False}
    if selective:
        settings["context_fn"] = partial(create_selective_checkpoint_contexts, _keep)
    # No wrapper, so that names of parameters stay.
    block.forward = partial(checkpoint, block.forward, **settings)  # type: ignore[method-assign]


def _keep(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    kept = operation in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE


def _shard(
    learner: Learner, blocks: Sequence[nn.Module], config: ParallelConfig, mesh: DeviceMesh
) -> None:
    """Blocks one by one, then what is left with the learner, whose call gathers it."""
    names = mesh.mesh_dim_names or ()
    # Inputs are not cast: rotary tables stay float32, and what comes in meets bf16 weights first.
    policy = MixedPrecisionPolicy(cast_forward_inputs=False)
    if config.precision == "bf16":
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16, reduce_dtype=torch.float32, cast_forward_inputs=False
        )
    settings: dict[str, Any] = {
        "mesh": mesh["replicate", "shard"] if "replicate" in names else mesh["shard"],
        "mp_policy": policy,
        # A scalar cannot be sharded: every rank has it, and `clip_gradients` averages its gradient.
        "ignored_params": {p for p in learner.parameters() if p.ndim == 0},
    }
    for block in blocks:
        fully_shard(block, **settings)
    model = learner.model
    if isinstance(model, Decoder) and not model.decoder_config.weight_tying:
        fully_shard(model.tok_embeddings, **settings)  # a tied one is wanted at the end as well
    fully_shard(learner, **settings)


@torch.no_grad()
def fill(model: nn.Module, initial: Callable[[str, torch.Size], Tensor]) -> None:
    """Sets every parameter to its first value; one is in memory at a time.

    Every rank makes all of it and keeps its share, so nothing is sent.
    """
    for name, parameter in model.named_parameters():
        value = initial(name, parameter.shape)
        if isinstance(parameter, DTensor):
            mesh, placements = parameter.device_mesh, parameter.placements
            value = value.to(parameter.device)
            value = distribute_tensor(value, mesh, placements, src_data_rank=None).to_local()
        _local(parameter).copy_(value)


@contextmanager
def last_part(learner: Learner, last: bool) -> Iterator[None]:
    """Gradients are exchanged between ranks after the last part of a batch only.

    Until then, ranks of mode `shard` have a gradient of the whole model in float32; groups of
    shards that are replicated have their sum, in shards.
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
def whole(learner: Learner) -> Iterator[None]:
    """Within it, parts of a learner's model can be called as well as the learner itself."""
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
    """Averages gradients over ranks where sharding has not done it; clips; the norm before that."""
    average_gradients((p for p in trained if not isinstance(p, DTensor)), group)
    grads = [p.grad for p in trained if p.grad is not None]
    norm = _global_norm(grads, group)
    factor = min(1.0, config.optim.clip / (norm + 1e-6))
    if factor < 1.0:
        torch._foreach_mul_([_local(grad) for grad in grads], factor)
    return norm


def _global_norm(grads: Sequence[Tensor], group: Group) -> float:
    """The 2-norm of all gradients together, the same on every rank."""
    norms = torch.stack(torch._foreach_norm([_local(grad) for grad in grads]))
    # What several processes have alike counts once.
    shares = [_shards(grad) / group.processes for grad in grads]
    squares = (norms**2 * norms.new_tensor(shares)).sum()
    if group.processes > 1:
        dist.all_reduce(squares)
    return float(squares.sqrt())


def _shards(tensor: Tensor) -> int:
    """How many processes have different parts of a tensor; 1 for one that all have."""
    if not isinstance(tensor, DTensor):
        return 1
    sizes = zip(tensor.device_mesh.shape, tensor.placements, strict=True)
    return math.prod(size for size, placement in sizes if not placement.is_replicate())


def _local(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
