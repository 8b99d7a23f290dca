"""Attention kernels of training, each with the mask that keeps packed documents apart.

All are `perception_rt.models.layers.Attention`, and what has no mask is torch's own attention in
all of them. A mask is made once per batch, for all layers.

Legend: N sequences, T tokens, G query heads of a key and value head, D channels per head.
"""

import functools
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from perception_rt.errors import InputError
from perception_rt.models.layers import (
    Attention,
    Rope,
    merge_heads,
    rotated_heads,
    sdpa_attention,
)

MakeMask = Callable[[Tensor], Any]


@dataclass(frozen=True, slots=True)
class Kernel:
    """An attention, and what it takes for a mask of documents int64 (N, T)."""

    attention: Attention
    document_mask: MakeMask


def get_kernel(name: str, device: str) -> Kernel:
    """The kernel of that name, for `run.device`.

    Raises:
        InputError: it cannot train on that device, or its package is missing.
    """
    if name == "sdpa":
        return Kernel(sdpa_attention, sdpa_document_mask)
    if device == "cpu" or not torch.cuda.is_available():
        raise InputError(f"parallel.attention {name} trains on a GPU only; on a CPU use sdpa")
    if name == "flex":
        return Kernel(flex_document_attention, flex_document_mask)
    if importlib.util.find_spec("xformers") is None:
        raise InputError("parallel.attention xformers needs `pip install xformers`")
    return Kernel(xformers_document_attention, xformers_document_mask)


def sdpa_document_mask(documents: Tensor) -> Tensor:
    """bool (N, 1, T, T): a token sees itself and what comes before it in its document."""
    same = documents[:, :, None] == documents[:, None, :]
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (same & causal)[:, None]


def flex_document_mask(documents: Tensor) -> BlockMask:
    """The same for flex attention, which skips blocks where no token sees another."""

    def sees(n: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[n, query] == documents[n, key])

    n, length = documents.shape
    return create_block_mask(sees, n, None, length, length, device=documents.device)


@functools.cache
def _compiled_flex() -> Callable[..., Tensor]:
    """Flex attention as one kernel; without compilation it would hold all T * T scores."""
    compiled: Callable[..., Tensor] = torch.compile(flex_attention)
    return compiled


def flex_document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    mask: BlockMask | None = None,
) -> Tensor:
    """An `Attention` whose masks are those of `flex_document_mask`."""
    if mask is None:
        return sdpa_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, rope=rope, causal=causal
        )
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
    return merge_heads(_compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True))


def document_lengths(documents: Tensor) -> list[int]:
    """The tokens of each document of (N, T), all rows in order; padding is a document."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero().flatten()
    end = edges.new_tensor([documents.numel()])
    lengths: list[int] = torch.cat([edges, end]).diff().tolist()
    return lengths


def xformers_document_mask(documents: Tensor) -> Any:
    """The same for xformers, to which all rows are one sequence of documents."""
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask  # type: ignore[import-not-found]

    return BlockDiagonalCausalMask.from_seqlens(document_lengths(documents))


def xformers_document_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    mask: Any = None,
) -> Tensor:
    """An `Attention` whose masks are those of `xformers_document_mask`."""
    if mask is None:
        return sdpa_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, rope=rope, causal=causal
        )
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    groups = kv_heads or heads
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=groups, rope=rope)
    # To (1, N * T, key and value heads, G, D); keys and values are the same for a whole group.
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[None] for x in (q, k, v))
    q = q.unflatten(2, (groups, heads // groups))
    k, v = (x[:, :, :, None].expand_as(q) for x in (k, v))
    y: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask)
    return y.reshape(query.shape)
