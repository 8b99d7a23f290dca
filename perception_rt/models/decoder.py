"""The Llama decoder, under the reference's parameter names.

A sequence starts at position 0 unless positions are given. The decoder has no key-value cache: the
attention kernel of an exporter adds one, and gets the rotary tables of the cached positions.

Legend: N batch, T tokens, C width, H query heads, K key and value heads, E channels per head,
V vocabulary.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.models.layers import Attention, Rope, sdpa_attention
from perception_rt.plm_config import DecoderConfig


def rope_frequencies(config: DecoderConfig, device: torch.device | None = None) -> Tensor:
    """Returns rotary angles per position, float32 (E/2,), with llama3 scaling if configured.

    Frequencies with fewer than `low_freq_factor` turns in the old context are divided by the scale
    factor; those with more than `high_freq_factor` turns stay; those between are interpolated.
    """
    size = config.head_dim
    steps = torch.arange(0, size, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / config.rope_theta ** (steps / size)
    if config.rope_scale_factor == 1:
        return freqs
    turns = config.old_context_len * freqs / (2 * math.pi)
    span = config.high_freq_factor - config.low_freq_factor
    kept = ((turns - config.low_freq_factor) / span).clamp(0, 1)
    return (1 - kept) * freqs / config.rope_scale_factor + kept * freqs


def rope_1d(config: DecoderConfig, length: int, device: torch.device | None = None) -> Rope:
    """Returns rotary tables (length, E/2) of positions 0 to `length` - 1, for adjacent channels."""
    positions = torch.arange(length, dtype=torch.float32, device=device)
    angles = torch.outer(positions, rope_frequencies(config, device))  # (T, E/2)
    return Rope(angles.cos(), angles.sin())


class RmsNorm(nn.Module):
    """Divides by the root mean square in float32, then scales each channel."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C), in x's dtype."""
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


class GroupedAttention(nn.Module):
    """Causal self-attention in which each key and value head serves a group of query heads."""

    def __init__(self, config: DecoderConfig, attention: Attention) -> None:
        super().__init__()
        self.heads, self.kv_heads = config.n_heads, config.kv_heads
        self.attention = attention
        dim, kv_dim = config.dim, config.kv_heads * config.head_dim
        q_dim = config.n_heads * config.head_dim
        self.wq = nn.Linear(dim, q_dim, bias=False)
        self.wk = nn.Linear(dim, kv_dim, bias=False)
        self.wv = nn.Linear(dim, kv_dim, bias=False)
        self.wo = nn.Linear(q_dim, dim, bias=False)

    def forward(self, x: Tensor, rope: Rope, mask: Any = None) -> Tensor:
        """(N, T, C) -> (N, T, C); `mask` in the form of the attention kernel."""
        y = self.attention(
            self.wq(x),  # (N, T, H * E)
            self.wk(x),  # (N, T, K * E)
            self.wv(x),
            heads=self.heads,
            kv_heads=self.kv_heads,
            rope=rope,
            causal=True,
            mask=mask,
        )
        return self.wo(y)


class FeedForward(nn.Module):
    """A SwiGLU feed-forward layer."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        self.w1 = nn.Linear(config.dim, config.ffn_dim, bias=False)
        self.w2 = nn.Linear(config.ffn_dim, config.dim, bias=False)
        self.w3 = nn.Linear(config.dim, config.ffn_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class DecoderLayer(nn.Module):
    """A pre-norm residual block: attention, then feed-forward."""

    def __init__(self, config: DecoderConfig, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.attention_norm = RmsNorm(config.dim, config.norm_eps)
        self.attention = GroupedAttention(config, attention)
        self.ffn_norm = RmsNorm(config.dim, config.norm_eps)
        self.feed_forward = FeedForward(config)

    def forward(self, x: Tensor, rope: Rope, mask: Any = None) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        x = x + self.attention(self.attention_norm(x), rope, mask)
        return x + self.feed_forward(self.ffn_norm(x))


class Decoder(nn.Module):
    """Embedding, blocks, norm and head. A tied head uses the embedding and has no parameter.

    Args:
        config: the architecture.
        attention: attention kernel of all blocks.
    """

    def __init__(self, config: DecoderConfig, *, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.decoder_config = config
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(DecoderLayer(config, attention) for _ in range(config.n_layers))
        self.norm = RmsNorm(config.dim, config.norm_eps)
        if not config.weight_tying:
            self.output = nn.Linear(config.dim, config.vocab_size, bias=False)

    def hidden_states(
        self, hidden: Tensor, *, positions: Tensor | None = None, mask: Any = None
    ) -> Tensor:
        """Input embeddings (N, T, C) -> normed hidden states (N, T, C).

        Args:
            hidden: input of the first layer.
            positions: int64 (N, T), position of each token in its document; None for 0 to T - 1.
            mask: attention mask in the form of the kernel; None for causal attention.
        """
        rope = rope_1d(self.decoder_config, hidden.shape[1], hidden.device)
        if positions is not None:
            # (T, E/2) indexed by (N, T) -> (N, 1, T, E/2); the 1 is for heads.
            rope = Rope(rope.cos[positions][:, None], rope.sin[positions][:, None])
        for layer in self.layers:
            hidden = layer(hidden, rope, mask)
        return self.norm(hidden)

    def decode(self, hidden: Tensor) -> Tensor:
        """Input embeddings (N, T, C) -> logits (N, T, V)."""
        return self.head(self.hidden_states(hidden))

    def head(self, hidden: Tensor) -> Tensor:
        """Normed hidden states (..., C) -> logits (..., V)."""
        tied = self.decoder_config.weight_tying
        weight = self.tok_embeddings.weight if tied else self.output.weight
        return F.linear(hidden, weight)
