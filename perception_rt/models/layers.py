"""Layers shared by the PE towers, and the attention interface of all models.

Parameter names equal those of the reference's checkpoints. `forward` changes no state and all
tables are functions of integers, so threads and image sizes never interfere.

Legend: N batch, T tokens, C width, h w grid rows and columns, D channels per head.
"""

from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LN_EPS = 1e-5
ROPE_THETA = 10000.0


class Rope(NamedTuple):
    """Rotation tables, float32 (T, D/2) or (N, 1, T, D/2): one angle per adjacent channel pair."""

    cos: Tensor
    sin: Tensor


class Attention(Protocol):
    """An attention kernel. Exporters and training pass their own."""

    def __call__(
        self,
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
        """Multi-head attention of (N, Tq, C) over (N, Tk, C); returns (N, Tq, C).

        With fewer `kv_heads` than `heads`, keys and values are (N, Tk, kv_heads * D), and each of
        their heads serves a group of consecutive query heads. A `mask`, in the kernel's own form,
        replaces `causal`; training uses it to pack documents.
        """


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, T, C) -> (N, heads, T, D)."""
    n, t, c = x.shape
    # (N, T, C) -> (N, T, heads, D) -> (N, heads, T, D)
    return x.reshape(n, t, heads, c // heads).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(N, heads, T, D) -> (N, T, C)."""
    n, heads, t, d = x.shape
    # (N, heads, T, D) -> (N, T, heads, D) -> (N, T, C)
    return x.transpose(1, 2).reshape(n, t, heads * d)


def rotate(x: Tensor, rope: Rope) -> Tensor:
    """Rotates adjacent channel pairs of (N, heads, T, D) in float32, then returns to x's dtype."""
    pairs = x.float().unflatten(-1, (-1, 2))  # (N, heads, T, D/2, 2)
    a, b = pairs.unbind(-1)  # (N, heads, T, D/2)
    turned = (a * rope.cos - b * rope.sin, b * rope.cos + a * rope.sin)
    # (N, heads, T, D/2, 2) -> (N, heads, T, D)
    return torch.stack(turned, dim=-1).flatten(-2).to(x.dtype)


def rotated_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None,
    rope: Rope | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Converts the arguments of an `Attention` for a kernel on (N, heads, T, D), and rotates."""
    q = split_heads(query, heads)
    k, v = (split_heads(x, kv_heads or heads) for x in (key, value))
    if rope is not None:
        q, k = rotate(q, rope), rotate(k, rope)
    return q, k, v


def sdpa_attention(
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
    """The default `Attention`: torch's scaled dot product attention with scale D ** -0.5.

    Masks are bool, true where a query sees a key, as in `scaled_dot_product_attention`.
    """
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
    grouped = kv_heads is not None and kv_heads != heads
    y = F.scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=causal and mask is None, enable_gqa=grouped
    )
    return merge_heads(y)


def rope_2d(
    grid: tuple[int, int],
    head_dim: int,
    *,
    class_token: bool,
    native: int | None = None,
    device: torch.device | None = None,
) -> Rope:
    """Returns 2-D rotary tables (T, D/2) of a grid, tokens in row-major order.

    The first half of a head's channels rotates with the column, the second with the row, with D/4
    frequencies each. With a class token, patches count from 1 and the class token has angle 0.
    With `native`, rows and columns are scaled to a grid of that side, as in timm.
    """
    half = head_dim // 2
    steps = torch.arange(0, half, 2, dtype=torch.float32, device=device)
    freqs = 1.0 / ROPE_THETA ** (steps / half)  # (D/4,)
    offset = 1 if class_token else 0
    rows = torch.arange(grid[0], dtype=torch.float32, device=device) + offset
    cols = torch.arange(grid[1], dtype=torch.float32, device=device) + offset
    if native is not None:
        rows, cols = rows / grid[0] * native, cols / grid[1] * native
    by_col = (cols[:, None] * freqs).expand(grid[0], -1, -1)  # (h, w, D/4)
    by_row = (rows[:, None] * freqs)[:, None].expand(-1, grid[1], -1)  # (h, w, D/4)
    angles = torch.cat([by_col, by_row], dim=-1).flatten(0, 1)  # (h*w, D/2)
    if class_token:
        angles = torch.cat([angles.new_zeros(1, half), angles])  # (1 + h*w, D/2)
    return Rope(angles.cos(), angles.sin())


class Windows(NamedTuple):
    """Square windows over a patch grid, which is filled with zeros at the bottom and the right."""

    rows: int
    columns: int
    side: int

    @property
    def counts(self) -> tuple[int, int]:
        """Windows down and across."""
        return -(-self.rows // self.side), -(-self.columns // self.side)

    def split(self, x: Tensor) -> Tensor:
        """(N, h*w, C) -> (N * windows, side**2, C)."""
        n, _, c = x.shape
        (down, across), side = self.counts, self.side
        grid = x.reshape(n, self.rows, self.columns, c)
        below, right = down * side - self.rows, across * side - self.columns
        if below or right:
            grid = F.pad(grid, (0, 0, 0, right, 0, below))
        # (N, down * side, across * side, C) -> (N, down, side, across, side, C)
        cut = grid.reshape(n, down, side, across, side, c)
        # (N, down, across, side, side, C) -> (N * windows, side**2, C)
        return cut.transpose(2, 3).reshape(n * down * across, side * side, c)

    def join(self, x: Tensor) -> Tensor:
        """(N * windows, side**2, C) -> (N, h*w, C); the inverse of `split`."""
        (down, across), side, c = self.counts, self.side, x.shape[-1]
        cut = x.reshape(-1, down, across, side, side, c)
        # (N, down, side, across, side, C) -> (N, down * side, across * side, C)
        grid = cut.transpose(2, 3).reshape(-1, down * side, across * side, c)
        # -> (N, h, w, C) -> (N, h*w, C)
        return grid[:, : self.rows, : self.columns].flatten(1, 2)


def drop_path(x: Tensor, rate: float, *, training: bool) -> Tensor:
    """Stochastic depth: while training, drops samples of a residual branch at `rate`."""
    if not training or rate == 0.0:
        return x
    # (N, 1, ...): one draw per sample.
    keep = torch.rand(x.shape[0], *([1] * (x.ndim - 1)), device=x.device) >= rate
    return x * keep.to(x.dtype) / (1.0 - rate)


class PackedAttention(nn.Module):
    """Attention parameters, packed like those of torch's MultiheadAttention."""

    def __init__(self, width: int, heads: int, attention: Attention) -> None:
        super().__init__()
        self.heads = heads
        self.attention = attention
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)


class SelfAttention(PackedAttention):
    """Self-attention of tokens."""

    def forward(self, x: Tensor, *, rope: Rope | None = None, causal: bool = False) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        # (N, T, 3 * C) -> three of (N, T, C)
        q, k, v = F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        return self.out_proj(self.attention(q, k, v, heads=self.heads, rope=rope, causal=causal))


class LayerScale(nn.Module):
    """A learned scale per channel of a residual branch."""

    def __init__(self, width: int, init: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), init))

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear layers around an exact (erf) GELU."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, hidden)
        self.c_proj = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(N, T, C) -> (N, T, C)."""
        return self.c_proj(F.gelu(self.c_fc(x)))


class Block(nn.Module):
    """A pre-norm residual block: attention, then MLP, each with an optional layer scale."""

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_dim: int,
        attention: Attention,
        *,
        ls_init: float | None = None,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        self.drop_path_rate = drop_path_rate
        self.ln_1 = nn.LayerNorm(width, eps=LN_EPS)
        self.attn = SelfAttention(width, heads, attention)
        self.ls_1 = nn.Identity() if ls_init is None else LayerScale(width, ls_init)
        self.ln_2 = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = Mlp(width, mlp_dim)
        self.ls_2 = nn.Identity() if ls_init is None else LayerScale(width, ls_init)

    def forward(
        self,
        x: Tensor,
        *,
        rope: Rope | None = None,
        causal: bool = False,
        windows: Windows | None = None,
    ) -> Tensor:
        """(N, T, C) -> (N, T, C); with `windows`, tokens attend within their window only."""
        rate, training = self.drop_path_rate, self.training
        normed = self.ln_1(x) if windows is None else windows.split(self.ln_1(x))
        mixed = self.attn(normed, rope=rope, causal=causal)
        mixed = self.ls_1(mixed if windows is None else windows.join(mixed))
        x = x + drop_path(mixed, rate, training=training)
        return x + drop_path(self.ls_2(self.mlp(self.ln_2(x))), rate, training=training)


class Transformer(nn.Module):
    """A stack of blocks, under the parameter name of the checkpoints."""

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.resblocks = nn.ModuleList(blocks)
