"""The PE vision tower: patches, position tables, blocks and pooling, at any image size.

Legend: N batch, H W pixels, h w grid, p patch size, T tokens (h*w, and one more with a class
token), C width, D output.
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
    """Attention of a few learned queries over all tokens."""

    def forward(self, query: Tensor, tokens: Tensor) -> Tensor:
        """Queries (1, Q, C) over tokens (N, T, C) -> (N, Q, C)."""
        width = query.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        # (1, Q, C) -> (N, Q, C)
        q = F.linear(query, weight[:width], bias[:width]).expand(tokens.shape[0], -1, -1)
        # (N, T, 2 * C) -> two of (N, T, C)
        k, v = F.linear(tokens, weight[width:], bias[width:]).chunk(2, dim=-1)
        return self.out_proj(self.attention(q, k, v, heads=self.heads))


class AttentionPooling(nn.Module):
    """Pools tokens: one learned query attends to every token, then a residual MLP."""

    def __init__(self, width: int, heads: int, mlp_dim: int, attention: Attention) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, width))
        self.attn = CrossAttention(width, heads, attention)
        self.layernorm = nn.LayerNorm(width, eps=LN_EPS)
        self.mlp = Mlp(width, mlp_dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """(N, T, C) -> (N, C)."""
        x = self.attn(self.probe, tokens)  # (N, 1, C)
        return (x + self.mlp(self.layernorm(x))).squeeze(1)  # (N, 1, C) -> (N, C)


def probe_keys(probe: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Returns (heads, C): a normed token's product with a row is its logit for the probe.

    It leaves out the key's bias, which adds the same to every token and so nothing to a softmax.

    Args:
        probe: the learned query of `AttentionPooling`, (1, 1, C).
        weight: `in_proj_weight` of its attention, (3 * C, C).
        bias: `in_proj_bias`, (3 * C,).
        heads: number of heads, D = C / heads.
    """
    width = probe.shape[-1]
    query = F.linear(probe[0], weight[:width], bias[:width])  # (1, C)
    query = query.reshape(heads, 1, -1) * (width // heads) ** -0.5  # (heads, 1, D)
    keys = weight[width : 2 * width].reshape(heads, -1, width)  # (C, C) -> (heads, D, C)
    return (query @ keys).squeeze(1)  # (heads, 1, C) -> (heads, C)


def resize_positions(
    table: Tensor, native: int, grid: tuple[int, int], prefix: int, *, as_timm: bool = False
) -> Tensor:
    """Interpolates a learned position table (prefix + native**2, C) to (prefix + h*w, C).

    Keeps the first `prefix` rows, the class token's. Bilinear without antialiasing and without
    aligned corners, as in the reference; or bicubic and antialiased, as in timm.
    """
    if grid == (native, native):
        return table
    head, body = table.split([prefix, native * native])
    # (native**2, C) -> (1, native, native, C) -> (1, C, native, native)
    square = body.float().reshape(1, native, native, -1).permute(0, 3, 1, 2)
    mode = "bicubic" if as_timm else "bilinear"
    resized = F.interpolate(square, size=grid, mode=mode, align_corners=False, antialias=as_timm)
    # (1, C, h, w) -> (1, h, w, C) -> (h*w, C)
    body = resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)
    return torch.cat([head, body])


def token_table(
    positions: Tensor | None,
    class_embedding: Tensor | None,
    config: VisionConfig,
    grid: tuple[int, int],
) -> Tensor | None:
    """Returns the table (T, C) that is added to the tokens: positions and the class token.

    The class token enters the tower as a row of zeros, so its value is added here. None if the
    tower has neither.
    """
    prefix = 0 if class_embedding is None else 1
    table = None
    if positions is not None:
        as_timm = config.timm_grid is not None
        table = resize_positions(positions, config.grid, grid, prefix, as_timm=as_timm)
    if class_embedding is None:
        return table
    head = F.pad(class_embedding[None], (0, 0, 0, grid[0] * grid[1]))  # (1, C) -> (T, C)
    return head if table is None else head + table


class VisionTower(nn.Module):
    """A Perception Encoder vision tower.

    Args:
        config: the architecture.
        attention: attention kernel of all blocks.
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
            if config.proj_bias:
                self.proj_bias = nn.Parameter(torch.zeros(config.output_dim))

    @property
    def num_prefix(self) -> int:
        """Tokens before the patches: 1 with a class token, else 0."""
        return int(self.config.use_cls_token)

    def patchify(self, pixels: Tensor) -> Tensor:
        """Float pixels (N, 3, H, W) -> (N, h*w, C): the patch convolution as a matrix product."""
        n, channels, height, width = pixels.shape
        p = self.config.patch_size
        h, w = self.config.grid_of(height, width)
        # (N, 3, H, W) -> (N, 3, h, p, w, p) -> (N, h, w, 3, p, p)
        x = pixels.reshape(n, channels, h, p, w, p).permute(0, 2, 4, 1, 3, 5)
        weight = self.conv1.weight.flatten(1)  # (C, 3, p, p) -> (C, 3 * p * p)
        # (N, h, w, 3, p, p) -> (N, h*w, 3 * p * p)
        return F.linear(x.reshape(n, h * w, channels * p * p).to(weight.dtype), weight)

    def token_table(self, grid: tuple[int, int]) -> Tensor | None:
        """Returns the table (T, C) that is added to the tokens of a grid; None if there is none."""
        config = self.config
        positions = self.positional_embedding if config.use_abs_posemb else None
        class_embedding = self.class_embedding if config.use_cls_token else None
        return token_table(positions, class_embedding, config, grid)

    def rope_table(self, grid: tuple[int, int]) -> Rope | None:
        """Returns rotary tables (T, C/heads/2) of a grid; None for a tower without them."""
        if not self.config.use_rope2d:
            return None
        return rope_2d(
            grid,
            self.config.head_dim,
            class_token=self.config.use_cls_token,
            native=self.config.timm_grid,
            device=self.conv1.weight.device,
        )

    def embed(self, pixels: Tensor, table: Tensor | None) -> Tensor:
        """Normalised float pixels (N, 3, H, W) -> input of the blocks (N, T, C)."""
        # (N, h*w, C) -> (N, T, C)
        x = F.pad(self.patchify(pixels), (0, 0, self.num_prefix, 0))
        return self.ln_pre(x if table is None else x + table)

    def run_blocks(
        self, x: Tensor, rope: Rope | None, taps: Sequence[int], first: int = 0
    ) -> list[Tensor]:
        """Runs the blocks from `first` to the deepest tap; returns the taps' outputs (N, T, C)."""
        outputs: dict[int, Tensor] = {}
        for index in range(first, max(taps) + 1):
            x = self.transformer.resblocks[index](x, rope=rope)
            if index in taps:
                outputs[index] = x
        return [outputs[i] for i in taps]

    def forward_taps(self, pixels: Tensor, layers: Sequence[int]) -> list[Tensor]:
        """Pixels (N, 3, H, W) -> outputs (N, T, C) of the blocks `layers`, without final norm."""
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
        """Pixels (N, 3, H, W) -> tokens (N, T, C) of one block.

        Args:
            pixels: normalised floats.
            norm: apply the final norm.
            layer: block index; negative from the end.
            strip_class_token: return the h*w patch tokens only.
        """
        (x,) = self.forward_taps(pixels, [layer])
        if norm:
            x = self.ln_post(x)
        return x[:, self.num_prefix :] if strip_class_token else x

    def pool(self, tokens: Tensor) -> Tensor:
        """Normed tokens (N, T, C) -> (N, C); the tokens themselves without pooling."""
        match self.config.pool_type:
            case "attn":
                return self.attn_pool(tokens)
            case "tok":
                return tokens[:, 0]
            case "avg":
                return tokens.mean(dim=1)
            case "patch_avg":
                return tokens[:, self.num_prefix :].mean(dim=1)
            case _:
                return tokens

    def head(self, tokens: Tensor) -> Tensor:
        """Tokens (N, T, C) of the last block -> (N, D), or (N, T, D) without pooling."""
        if self.config.norm_after_pool:
            x = self.ln_post(self.pool(tokens))
        else:
            x = self.pool(self.ln_post(tokens))
        if self.config.output_dim is None:
            return x
        return F.linear(x, self.proj.T, self.proj_bias if self.config.proj_bias else None)

    def attention_maps(self, tokens: Tensor, keys: Tensor | None = None) -> Tensor:
        """Tokens (N, T, C) of the last block -> the pooling probe's weights (N, heads, T).

        Args:
            tokens: output of the last block.
            keys: the result of `probe_keys`; None computes it.
        """
        if keys is None:
            pool = self.attn_pool
            weight, bias = pool.attn.in_proj_weight, pool.attn.in_proj_bias
            keys = probe_keys(pool.probe, weight, bias, pool.attn.heads)
        x = tokens if self.config.norm_after_pool else self.ln_post(tokens)
        # (N, T, heads) -> (N, heads, T)
        return F.linear(x, keys).transpose(1, 2).softmax(dim=-1)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised float pixels (N, 3, H, W) -> (N, D), or (N, T, D) without pooling."""
        return self.head(self.forward_features(pixels))
