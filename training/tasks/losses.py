"""Contrastive losses over a batch that is spread over ranks.

Each rank scores its own rows against those of all ranks. Averaging these losses and their gradients
over ranks gives the values of one process with the whole batch. Losses are computed in float32.

Legend: n rows of this rank, N rows of all ranks, D channels.
"""

from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


class _GatherRows(torch.autograd.Function):
    """Concatenates all ranks' rows. A row's gradient is the sum over all ranks that read it."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, rows: Tensor) -> Tensor:
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        total = grads[0].contiguous()
        dist.all_reduce(total)
        return total.chunk(dist.get_world_size())[dist.get_rank()]


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenates (n, D) of all ranks to (N, D) in rank order, differentiably; all have one n."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return rows
    gathered: Tensor = _GatherRows.apply(rows)  # type: ignore[no-untyped-call]
    return gathered


def contrastive_loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    """Symmetric cross entropy of matching row i of `image` with row i of `text` (CLIP).

    Args:
        image: unit features (n, D) of this rank.
        text: unit features (n, D) of this rank.
        scale: factor on cosines, a scalar.

    Returns:
        This rank's scalar loss, to be averaged over ranks like its gradients.
    """

    def loss(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
        target = _own_rows(image)
        by_image = scale * image @ gather_rows(text).T
        by_text = scale * text @ gather_rows(image).T
        return (F.cross_entropy(by_image, target) + F.cross_entropy(by_text, target)) / 2

    return _in_float32(loss, image, text, scale)


def sigmoid_loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Binary cross entropy of every pair, where row i matches row i only (SigLIP).

    Args:
        image: unit features (n, D) of this rank.
        text: unit features (n, D) of this rank.
        scale: factor on cosines, a scalar.
        bias: constant added to scaled cosines, a scalar.

    Returns:
        This rank's scalar loss, summed over texts, to be averaged over ranks like its gradients.
    """

    def loss(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
        logits = scale * image @ gather_rows(text).T + bias  # (n, N)
        signs = torch.full_like(logits, -1.0)
        signs.scatter_(1, _own_rows(image)[:, None], 1.0)
        return -F.logsigmoid(signs * logits).sum() / len(image)

    return _in_float32(loss, image, text, scale, bias)


def _own_rows(rows: Tensor) -> Tensor:
    """Indices of this rank's rows among all ranks' rows, int64 (n,)."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    return torch.arange(len(rows), device=rows.device) + rank * len(rows)


def _in_float32(loss: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """Computes a loss in float32, even under bfloat16 autocast."""
    with torch.autocast(values[0].device.type, enabled=False):
        return loss(*[value.float() for value in values])
