"""Modules that are traced: the model's own parts, with their tables as parameters.

No arithmetic of the model is repeated here. Parts are built on the meta device, with the traced
attention and without layer scale, whose gains are folded into the weights (`parameters.py`).
`forward` takes one list of inputs, as `trace` passes them.

Legend: N images or sequences, H W pixels, T tokens, C channels, D embedding channels;
L logit positions, V vocabulary, K key and value heads, S cache slots, E channels per head.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.config import DetectionConfig, TextConfig, VisionConfig
from perception_rt.export.graph.trace import CachedAttention, traced_attention
from perception_rt.models.decoder import DecoderLayer, RmsNorm
from perception_rt.models.detection import BackboneTables, FeaturePyramid, pyramid_levels
from perception_rt.models.layers import Rope
from perception_rt.models.plm import VisionProjector
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.processing.image import ImageSpec


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


def _traced_tower(config: VisionConfig) -> VisionTower:
    with torch.device("meta"):
        folded = replace(config, ls_init_value=None, drop_path=0.0)
        return VisionTower(folded, attention=traced_attention).requires_grad_(False)


class _GridGraph(nn.Module):
    """A vision tower on one patch grid.

    Its own parameters are tables for that grid, which `parameters.py` computes: `table` (T, C) of
    positions and class token, `rope_cos` and `rope_sin` (T, head channels / 2).
    """

    def __init__(self, config: VisionConfig, grid: tuple[int, int]) -> None:
        super().__init__()
        self.tower = _traced_tower(config)
        tokens = grid[0] * grid[1] + self.tower.num_prefix
        self.has_table = config.use_abs_posemb or config.use_cls_token
        if self.has_table:
            self.table = _meta(tokens, config.width)
        if config.use_rope2d:
            self.rope_cos = _meta(tokens, config.head_dim // 2)
            self.rope_sin = _meta(tokens, config.head_dim // 2)

    def blocks(self, pixels: Tensor, taps: Sequence[int]) -> list[Tensor]:
        """float (N, 3, H, W) -> (N, T, C) per tapped block."""
        rope = Rope(self.rope_cos, self.rope_sin) if self.tower.config.use_rope2d else None
        x = self.tower.embed(pixels, self.table if self.has_table else None)
        return self.tower.run_blocks(x, rope, taps)


class VisionGraph(_GridGraph):
    """A vision tower with its head, block taps and the attention of its pooling probe, if any.

    A further parameter is `probe_keys` (heads, C), which `parameters.py` computes too.
    """

    def __init__(self, config: VisionConfig, grid: tuple[int, int], taps: Sequence[int]) -> None:
        super().__init__(config, grid)
        self.taps = tuple(taps)
        if config.pool_type == "attn":
            self.probe_keys = _meta(config.attn_pooler_heads, config.width)

    @property
    def output_names(self) -> list[str]:
        """Names of the results of `forward`."""
        names = [contract.EMBEDDING, *map(contract.tap_name, self.taps)]
        is_pooled = self.tower.config.pool_type == "attn"
        return [*names, contract.ATTENTION_MAPS] if is_pooled else names

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Normalised float (N, 3, H, W) -> embedding (N, D), (N, T, C) per tap, (N, heads, T)."""
        last = self.tower.config.layers - 1
        *taps, tokens = self.blocks(inputs[0], [*self.taps, last])
        results = (self.tower.head(tokens), *taps)
        if self.tower.config.pool_type != "attn":
            return results
        return (*results, self.tower.attention_maps(tokens, self.probe_keys))


class TileGraph(_GridGraph):
    """A language model's vision tower and projector."""

    def __init__(self, config: PlmConfig) -> None:
        super().__init__(config.vision, (config.vision.grid, config.vision.grid))
        with torch.device("meta"):
            self.vision_projector = VisionProjector(config).requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """Normalised float tiles (N, 3, H, H) -> image features (N, T, C of the decoder)."""
        (tokens,) = self.blocks(inputs[0], [self.tower.config.layers - 1])
        tokens = self.tower.ln_post(tokens)[:, self.tower.num_prefix :]
        features: Tensor = self.vision_projector(tokens)
        return features


class PyramidGraph(nn.Module):
    """A detection backbone on one patch grid.

    Its own parameters are tables, which `components/detection.py` computes: `table` (h*w, C) of
    positions, `rope_cos` and `rope_sin` (h*w, head channels / 2) for the blocks that attend to the
    image, `window_cos` and `window_sin` (window**2, head channels / 2) for the others.
    """

    def __init__(
        self, config: VisionConfig, detection: DetectionConfig, grid: tuple[int, int]
    ) -> None:
        super().__init__()
        self.detection = detection
        self.tower = _traced_tower(config)
        with torch.device("meta"):
            pyramid = FeaturePyramid(config.width, detection.channels)
        self.pyramid = pyramid.requires_grad_(False)
        tokens, in_window, angles = grid[0] * grid[1], detection.window**2, config.head_dim // 2
        if config.use_abs_posemb:
            self.table = _meta(tokens, config.width)
        if config.use_rope2d:
            self.rope_cos, self.rope_sin = _meta(tokens, angles), _meta(tokens, angles)
            self.window_cos, self.window_sin = _meta(in_window, angles), _meta(in_window, angles)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Normalised float (N, 3, H, W) -> the levels p2 to p6, (N, K, rows, columns)."""
        config = self.tower.config
        whole = window = None
        if config.use_rope2d:
            whole = Rope(self.rope_cos, self.rope_sin)
            window = Rope(self.window_cos, self.window_sin)
        tables = BackboneTables(self.table if config.use_abs_posemb else None, whole, window)
        return tuple(pyramid_levels(self.tower, self.pyramid, inputs[0], self.detection, tables))


class TextGraph(nn.Module):
    """A text tower."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            self.tower = TextTower(config, attention=traced_attention).requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """int64 token ids (N, T) -> float (N, D), not normalised."""
        features: Tensor = self.tower(inputs[0])
        return features


class EmbedGraph(nn.Module):
    """A decoder's embedding."""

    def __init__(self, config: DecoderConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.requires_grad_(False)

    def forward(self, inputs: list[Tensor]) -> Tensor:
        """int64 token ids (N, T) -> hidden (N, T, C)."""
        hidden: Tensor = self.tok_embeddings(inputs[0])
        return hidden


class DecoderGraph(nn.Module):
    """Consecutive layers of a decoder with their caches; the last part has norm and head.

    Args:
        config: architecture of the decoder.
        layers: indices of the layers.
    """

    def __init__(self, config: DecoderConfig, layers: range) -> None:
        super().__init__()
        self.attention = CachedAttention()
        self.is_last = layers.stop == config.n_layers
        with torch.device("meta"):
            # Keyed by their own numbers, so that parameter names are the checkpoint's.
            blocks = {str(i): DecoderLayer(config, self.attention) for i in layers}
            self.layers = nn.ModuleDict(blocks).requires_grad_(False)
            if self.is_last:
                self.norm = RmsNorm(config.dim, config.norm_eps).requires_grad_(False)
        self.rope_cos = _meta(config.max_seqlen, config.head_dim // 2)
        self.rope_sin = _meta(config.max_seqlen, config.head_dim // 2)
        if self.is_last:
            self.head = _meta(config.vocab_size, config.dim)
            self.exclusion = _meta(config.vocab_size)

    def forward(self, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        """Hidden (N, T, C), past lengths (N,), caches (N, K, S, E) -> hidden, updated caches.

        The last part takes logit positions (N, L) before the caches. It returns logits (N, L, V)
        instead of hidden and, after the caches, the largest logit and its token, both (N, L).
        """
        hidden, past_lengths, *rest = inputs
        positions = rest.pop(0) if self.is_last else None
        caches = list(zip(rest[::2], rest[1::2], strict=True))
        self.attention.start(past_lengths, caches)
        rope = Rope(self.rope_cos, self.rope_sin)
        for layer in self.layers.values():
            hidden = layer(hidden, rope)
        if positions is not None:
            index = positions[..., None].expand(-1, -1, hidden.shape[-1])  # (N, L, C)
            logits = F.linear(self.norm(torch.gather(hidden, 1, index)), self.head)
            allowed = logits + self.exclusion
            top = allowed.amax(dim=-1), allowed.argmax(dim=-1)
            return (logits, *self.attention.updated, *top)
        return (hidden, *self.attention.updated)


class HalfAttention(nn.Module):
    """The attention of a vision tower's pooling probe in float16, with a float32 output.

    Args:
        tower: the tower with its weights; converted in place.
    """

    def __init__(self, tower: VisionTower) -> None:
        super().__init__()
        self.tower = tower.to(torch.float16)

    def forward(self, tokens: Tensor) -> Tensor:
        """float32 (N, T, C) of the last block -> (N, heads, T)."""
        return self.tower.attention_maps(tokens.to(torch.float16)).to(torch.float32)


class Pixels(nn.Module):
    """uint8 (N, H, W, 3) -> normalised float16 (N, 3, H, W)."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: ImageSpec) -> None:
        super().__init__()
        for name in ("mean", "std"):
            values = np.asarray(getattr(spec, name), np.float32).reshape(1, 3, 1, 1)
            self.register_buffer(name, torch.from_numpy(values))

    def forward(self, images: Tensor) -> Tensor:
        """Does what `processing.image.normalize` does."""
        # The cast comes first: TensorRT can do nothing else with uint8.
        planes = images.to(torch.float32).permute(0, 3, 1, 2)
        return ((planes / 255 - self.mean) / self.std).to(torch.float16)


class HalfTower(nn.Module):
    """A tower in float16, from a graph's input to its float32 embedding.

    Args:
        tower: a vision or text tower with its weights; converted in place.
        entry: converts the graph's input to the tower's; None if they are the same.
    """

    def __init__(self, tower: Any, entry: nn.Module | None = None) -> None:
        super().__init__()
        self.tower = tower.to(torch.float16)
        self.entry = entry

    def forward(self, inputs: Tensor) -> Tensor:
        """uint8 (N, H, W, 3) or int64 (N, T) -> embedding."""
        embedding: Tensor = self.tower(inputs if self.entry is None else self.entry(inputs))
        return embedding.to(torch.float32)


class HalfBlocks(nn.Module):
    """Consecutive blocks of a vision tower in float16, with float32 outputs.

    Args:
        tower: the tower with its weights; converted in place.
        grid: patch rows and columns.
        taps: blocks whose outputs are returned.
        first: the first block to run.
        entry: converts images to the tower's pixels; None if the input is the output of the block
            before `first`.
    """

    def __init__(
        self,
        tower: VisionTower,
        grid: tuple[int, int],
        taps: Sequence[int],
        first: int = 0,
        entry: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.tower = tower.to(torch.float16)
        self.grid = grid
        self.taps = tuple(taps)
        self.first = first
        self.entry = entry

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """uint8 (N, H, W, 3) or float32 (N, T, C) -> (N, T, C) per tapped block."""
        if self.entry is None:
            x = inputs.to(torch.float16)
        else:
            x = self.tower.embed(self.entry(inputs), self.tower.token_table(self.grid))
        rope = self.tower.rope_table(self.grid)
        blocks = self.tower.run_blocks(x, rope, self.taps, self.first)
        return tuple(y.to(torch.float32) for y in blocks)
