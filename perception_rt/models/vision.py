"""The PE vision tower: patches, position tables, blocks, pooling, at any grid.

Legend: N batch, H W pixels, h w grid, T tokens (h*w, and one more with a class token), C width,
D output.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.config import VisionConfig
from perception_rt.models.layers import (
    LN_EPS,
    Attention,
    Block,
    Mlp,
    PackedAttention,
    Rope,
    Transformer,
    rope_2d,
    sdpa_attention,
)


class CrossAttention(PackedAttention):
    """Attention of a few queries over all tokens."""

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """(1, Q, C) over (N, T, C) -> (N, Q, C); the same queries for every sample."""
        width = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = F.linear(query, weight[:width], bias[:width]).expand(tokens.shape[0], -1, -1)
        k, v = F.linear(tokens, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.out_proj(self.attention(q, k, v, heads=self.heads))


class AttentionPooling(nn.Module):
    """One learned probe reads all tokens, then an MLP with its own norm."""

    def __init__(self, width: int, heads: int, mlp_dim: int, attention: Attention) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attn = CrossAttention(width, heads, attention)
        self.layernorm = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = Mlp(width, mlp_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, C) -> (N, C)."""
        x = self.attn(self.probe, tokens)
        return (x + self.mlp(self.layernorm(x))).squeeze(1)


def resize_positions(table: Tensor, native: int, grid: tuple[int, int], prefix: int) -> Tensor:
    """Interpolates a learned (prefix + native**2, C) table to (prefix + h*w, C), bilinearly.

    The first `prefix` rows, the class token's, stay. No antialiasing and no corner alignment: what
    the checkpoints were used with.
    """
    if grid == (native, native):
        return table
    head, body = table.split([prefix, native * native])
    square = body.float().reshape(1, native, native, -1).permute(0, 3, 1, 2)  # (1, C, h, w)
    resized = F.interpolate(square, size=grid, mode="bilinear", align_corners=False)
    body = resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
    return torch.cat([head, body])


def token_table(
    positions: Tensor | None, class_embedding: Tensor | None, native: int, grid: tuple[int, int]
) -> Tensor | None:
    """What is added to the tokens of a grid, (T, C): positions, and the class token itself.

    The class token enters the tower as a row of zeros, so that its value is one more constant
    here. None if the tower has neither.
    """
    prefix = 0 if class_embedding is None else 1
    table = None if positions is None else resize_positions(positions, native, grid, prefix)
    if class_embedding is None:
        return table
    head = F.pad(class_embedding[None], (0, 0, 0, grid[0] * grid[1]))
    return head if table is None else head + table


class VisionTower(nn.Module):
    """A Perception Encoder vision tower.

    Args:
        config: the architecture.
        attention: the kernel behind every attention; torch's own by default.
    """

    def __init__(self, config: VisionConfig, *, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.conv1 = nn.Conv2d(3, width, config.patch_size, stride=config.patch_size, bias=False)
        if config.use_cls_token:
            self.class_embedding = nn.Parameter(torch.empty(width))
        if config.use_abs_posemb:
            tokens = config.grid**2 + self.num_prefix
            self.positional_embedding = nn.Parameter(torch.empty(tokens, width))
        self.ln_pre = nn.LayerNorm(width, eps=LN_EPS) if config.use_ln_pre else nn.Identity()
        self.transformer = Transformer(
            [
                Block(
                    width,
                    config.heads,
                    config.mlp_dim,
                    attention,
                    ls_init=config.ls_init_value,
                    drop_path_rate=config.drop_path,
                )
                for _ in range(config.layers)
            ]
        )
        self.ln_post = nn.LayerNorm(width, eps=LN_EPS) if config.use_ln_post else nn.Identity()
        if config.pool_type == "attn":
            self.attn_pool = AttentionPooling(width, config.attn_pooler_heads, 4 * width, attention)
        if config.output_dim is not None:
            self.proj = nn.Parameter(torch.empty(width, config.output_dim))

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.config.use_cls_token)

    def patchify(self, pixels: Tensor) -> Tensor:
        """float (N, 3, H, W) -> (N, h*w, C): the patch convolution as one product."""
        n, channels, height, width = pixels.shape
        p = self.config.patch_size
        h, w = self.config.grid_of(height, width)
        x = pixels.reshape(n, channels, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        weight = self.conv1.weight.flatten(1)
        return F.linear(x.reshape(n, h * w, channels * p * p).to(weight.dtype), weight)

    def token_table(self, grid: tuple[int, int]) -> Tensor | None:
        """The (T, C) table that is added to the tokens of a grid."""
        config = self.config
        positions = self.positional_embedding if config.use_abs_posemb else None
        class_embedding = self.class_embedding if config.use_cls_token else None
        return token_table(positions, class_embedding, config.grid, grid)

    def rope_table(self, grid: tuple[int, int]) -> Rope | None:
        """Rotary tables of a grid, or None for a tower without them."""
        if not self.config.use_rope2d:
            return None
        return rope_2d(
            grid,
            self.config.head_dim,
            class_token=self.config.use_cls_token,
            device=self.conv1.weight.device,
        )

    def embed(self, pixels: Tensor, table: Tensor | None) -> Tensor:
        """Normalised float pixels (N, 3, H, W) -> the blocks' input (N, T, C)."""
        x = F.pad(self.patchify(pixels), (0, 0, self.num_prefix, 0))
        return self.ln_pre(x if table is None else x + table)

    def run_blocks(self, x: Tensor, rope: Rope | None, taps: Sequence[int]) -> list[Tensor]:
        """Runs blocks up to the deepest tap; returns the output of each tapped block, in order."""
        outputs: dict[int, Tensor] = {}
        for index, block in enumerate(self.transformer.resblocks[: max(taps) + 1]):
            x = block(x, rope=rope)
            if index in taps:
                outputs[index] = x
        return [outputs[i] for i in taps]

    def forward_taps(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Outputs (N, T, C) of the blocks `layers`, class token included, no final norm."""
        height, width = pixels.shape[-2:]
        grid = self.config.grid_of(height, width)
        indices = [self.config.block_index(i) for i in layers]
        x = self.embed(pixels, self.token_table(grid))
        return self.run_blocks(x, self.rope_table(grid), indices)

    def forward_features(
        self,
        pixels: Tensor,
        *,
        norm: bool = False,
        layer: int = -1,
        strip_class_token: bool = False,
    ) -> Tensor:
        """One block's tokens (N, T, C), with the final norm and without class token on demand."""
        (x,) = self.forward_taps(pixels, [layer])
        if norm:
            x = self.ln_post(x)
        return x[:, self.num_prefix :] if strip_class_token else x

    def pool(self, tokens: Tensor) -> Tensor:
        """Normed tokens (N, T, C) -> (N, C), or the tokens themselves for a tower without pool."""
        match self.config.pool_type:
            case "attn":
                return self.attn_pool(tokens)
            case "tok":
                return tokens[:, 0]
            case "avg":
                return tokens.mean(dim=1)
            case _:
                return tokens

    def head(self, tokens: Tensor) -> Tensor:
        """The last block's tokens (N, T, C) -> what `forward` returns."""
        x = self.pool(self.ln_post(tokens))
        return x if self.config.output_dim is None else F.linear(x, self.proj.T)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float pixels (N, 3, H, W) -> (N, D), or (N, T, D) for a tower without pool."""
        return self.head(self.forward_features(pixels))
