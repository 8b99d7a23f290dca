"""The modules that are traced: the model's own towers, with their tables as named constants.

No maths is written again here. A tower is built on the meta device with the traced attention, and
layer scale left out: its gains are folded into the weights (`parameters.py`).
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from perception_rt.config import TextConfig, VisionConfig
from perception_rt.export.trace import traced_attention
from perception_rt.models.layers import Rope
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower


def _meta(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape, device="meta"), requires_grad=False)


class VisionGraph(nn.Module):
    """A vision tower on one grid: normalised pixels -> what `forward` returns, and block taps.

    Its own parameters `table`, `rope_cos`, `rope_sin` are computed by `parameters.py` from the
    tower's functions of the same meaning.
    """

    def __init__(self, config: VisionConfig, grid: tuple[int, int], taps: Sequence[int]) -> None:
        super().__init__()
        with torch.device("meta"):
            folded = replace(config, ls_init_value=None, drop_path=0.0)
            self.tower = VisionTower(folded, attention=traced_attention).requires_grad_(False)
        self.taps = tuple(taps)
        tokens = grid[0] * grid[1] + self.tower.num_prefix
        self.has_table = config.use_abs_posemb or config.use_cls_token
        if self.has_table:
            self.table = _meta(tokens, config.width)
        if config.use_rope2d:
            self.rope_cos = _meta(tokens, config.head_dim // 2)
            self.rope_sin = _meta(tokens, config.head_dim // 2)

    def forward(self, pixels: Tensor) -> tuple[Tensor, ...]:
        """float (N, 3, H, W) -> embedding, then one (N, T, C) per tap."""
        last = self.tower.config.layers - 1
        rope = Rope(self.rope_cos, self.rope_sin) if self.tower.config.use_rope2d else None
        x = self.tower.embed(pixels, self.table if self.has_table else None)
        *taps, tokens = self.tower.run_blocks(x, rope, [*self.taps, last])
        return (self.tower.head(tokens), *taps)


class TextGraph(nn.Module):
    """A text tower: token ids -> features, not normalised."""

    def __init__(self, config: TextConfig) -> None:
        super().__init__()
        with torch.device("meta"):
            self.tower = TextTower(config, attention=traced_attention).requires_grad_(False)

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 (N, T) -> float (N, D)."""
        features: Tensor = self.tower(tokens)
        return features
