"""Attention kernels for training, each with the mask that keeps packed documents apart.

All implement `perception_rt.models.layers.Attention`. Without a mask they fall back to torch's
attention. A mask is computed once per batch and shared by all layers.

Legend: N sequences, T tokens, G query heads per key and value head, D channels per head.
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
    """An attention function, and the function that makes its mask from documents, int64 (N, T)."""

    attention: Attention
    document_mask: MakeMask


def get_kernel(name: str, device: str) -> Kernel:
    """Returns a kernel by name.

    Args:
        name: `sdpa`, `flex` or `xformers`.
        device: the recipe's `run.device`.

    Raises:
        InputError: the kernel needs a GPU and there is none, or its package is missing.
    """
    if name == "sdpa":
        return Kernel(sdpa_attention, sdpa_document_mask)
    if device == "cpu" or not torch.cuda.is_available():
        raise InputError(f"parallel.attention {name} needs a GPU; use sdpa on a CPU")
    if name == "flex":
        return Kernel(flex_document_attention, flex_document_mask)
    if importlib.util.find_spec("xformers") is None:
        raise InputError("parallel.attention xformers needs `pip install xformers`")
    return Kernel(xformers_document_attention, xformers_document_mask)


def sdpa_document_mask(documents: Tensor) -> Tensor:
    """Returns bool (N, 1, T, T): a token sees itself and earlier tokens of its document."""
    same = documents[:, :, None] == documents[:, None, :]
    length = documents.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=documents.device).tril()
    return (same & causal)[:, None]


def flex_document_mask(documents: Tensor) -> BlockMask:
    """Returns the same mask for flex attention, which skips blocks without a visible pair."""

    def sees(n: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (documents[n, query] == documents[n, key])

    n, length = documents.shape
    return create_block_mask(sees, n, None, length, length, device=documents.device)


@functools.cache
def compiled_flex() -> Callable[..., Tensor]:
    """Compiles flex attention once per process."""
    # Without compilation flex attention would hold all T * T scores.
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
    """Flex attention, an `Attention` with masks of `flex_document_mask`."""
    if mask is None:
        return sdpa_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, rope=rope, causal=causal
        )
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
    return merge_heads(compiled_flex()(q, k, v, block_mask=mask, enable_gqa=True))


def document_lengths(documents: Tensor) -> list[int]:
    """Returns the tokens per document of (N, T), row by row; padding counts as a document."""
    starts = torch.ones_like(documents, dtype=torch.bool)
    starts[:, 1:] = documents[:, 1:] != documents[:, :-1]
    edges = starts.flatten().nonzero().flatten()
    end = edges.new_tensor([documents.numel()])
    lengths: list[int] = torch.cat([edges, end]).diff().tolist()
    return lengths


def xformers_document_mask(documents: Tensor) -> Any:
    """Returns the same mask for xformers, which sees all rows as one sequence of documents."""
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
    """Memory-efficient attention, an `Attention` with masks of `xformers_document_mask`."""
    if mask is None:
        return sdpa_attention(
            query, key, value, heads=heads, kv_heads=kv_heads, rope=rope, causal=causal
        )
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    groups = kv_heads or heads
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=groups, rope=rope)
    # (N, heads, T, D) -> (1, N * T, heads, D); `groups` heads in k and v.
    q, k, v = (x.transpose(1, 2).flatten(0, 1)[None] for x in (q, k, v))
    q = q.unflatten(2, (groups, heads // groups))  # (1, N * T, groups, G, D)
    k, v = (x[:, :, :, None].expand_as(q) for x in (k, v))  # (1, N * T, groups, G, D)
    y: Tensor = memory_efficient_attention(q, k, v, attn_bias=mask)
    return y.reshape(query.shape)  # (N, T, heads * D)
