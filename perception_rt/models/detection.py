"""A PE vision tower as a detection backbone: windowed blocks and a feature pyramid (ViTDet).

Most blocks attend within windows, a few to the whole image. The tower's position table is tiled
over the patch grid, and rotary positions are scaled to the grid of its pretraining. The pyramid is
made from the last block alone, without final norm.

Parameter names equal those of the reference's checkpoints, except for the prefixes.

Legend: N batch, H W pixels, h w patch grid, C width, K channels of a level, E channels per head.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.config import DetectionConfig, VisionConfig
from perception_rt.models.layers import Rope, Windows, rope_2d
from perception_rt.models.vision import VisionTower

_PYRAMID_EPS = 1e-6


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of images."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=_PYRAMID_EPS)

    def forward(self, x: Tensor) -> Tensor:
        """(N, C, h, w) -> (N, C, h, w)."""
        # (N, C, h, w) -> (N, h, w, C) -> (N, C, h, w)
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class NormedConv(nn.Conv2d):
    """A convolution without bias that keeps the image's size, and a norm."""

    def __init__(self, inputs: int, outputs: int, side: int) -> None:
        super().__init__(inputs, outputs, side, padding=side // 2, bias=False)
        self.norm = ChannelNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, h, w) -> (N, outputs, h, w)."""
        return self.norm(super().forward(x))


class FeaturePyramid(nn.Module):
    """The simple feature pyramid of ViTDet: levels p2 to p6, of strides 4 to 64 pixels.

    Args:
        width: channels of the tower.
        channels: channels of each level.
    """

    def __init__(self, width: int, channels: int) -> None:
        super().__init__()
        half, quarter = width // 2, width // 4
        self.simfp_2 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, stride=2),
            ChannelNorm(half),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2),
            *_projection(quarter, channels),
        )
        self.simfp_3 = nn.Sequential(
            nn.ConvTranspose2d(width, half, 2, stride=2), *_projection(half, channels)
        )
        self.simfp_4 = nn.Sequential(*_projection(width, channels))
        self.simfp_5 = nn.Sequential(nn.MaxPool2d(2), *_projection(width, channels))

    def forward(self, x: Tensor) -> list[Tensor]:
        """(N, C, h, w) -> (N, K, 4h, 4w), (N, K, 2h, 2w), (N, K, h, w), and two smaller ones.

        Each of these halves the sizes: p5 rounds down, p6 up.
        """
        stages = (self.simfp_2, self.simfp_3, self.simfp_4, self.simfp_5)
        levels = [stage(x) for stage in stages]
        return [*levels, F.max_pool2d(levels[-1], 1, stride=2)]


def _projection(inputs: int, outputs: int) -> tuple[NormedConv, NormedConv]:
    return NormedConv(inputs, outputs, 1), NormedConv(outputs, outputs, 3)


class BackboneTables(NamedTuple):
    """Position tables of a backbone on one patch grid.

    Attributes:
        positions: learned positions (h*w, C); None for a tower without them.
        whole: rotary tables (h*w, E/2) of blocks that attend to the image; None without RoPE.
        window: rotary tables (window**2, E/2) of blocks that attend within windows.
    """

    positions: Tensor | None
    whole: Rope | None
    window: Rope | None


def tiled_positions(table: Tensor, native: int, grid: tuple[int, int]) -> Tensor:
    """Repeats a position table (native**2, C) over a grid -> (h*w, C); nothing is interpolated."""
    rows, columns = (torch.arange(size, device=table.device) % native for size in grid)
    square = table.reshape(native, native, -1)
    return square[rows[:, None], columns].flatten(0, 1)  # (h, w, C) -> (h*w, C)


def backbone_ropes(
    config: VisionConfig,
    window: int,
    grid: tuple[int, int],
    device: torch.device | None = None,
) -> tuple[Rope, Rope]:
    """Rotary tables (h*w, E/2) of the grid, and (window**2, E/2) of a window.

    Window and image span the positions of the tower's own grid. The reference pads images to
    squares, so a grid that is not square has the positions of a square's top left.
    """

    def table(side: int) -> Rope:
        size = (side, side)
        return rope_2d(size, config.head_dim, class_token=False, native=config.grid, device=device)

    side = max(grid)
    # (side**2, E/2) -> (side, side, E/2) -> (h, w, E/2) -> (h*w, E/2)
    whole = (x.unflatten(0, (side, side))[: grid[0], : grid[1]] for x in table(side))
    return Rope(*(x.flatten(0, 1) for x in whole)), table(window)


def backbone_tables(
    tower: VisionTower, detection: DetectionConfig, grid: tuple[int, int]
) -> BackboneTables:
    """The tables of a tower with its weights."""
    config, positions = tower.config, None
    if config.use_abs_posemb:
        positions = tiled_positions(tower.positional_embedding, config.grid, grid)
    if not config.use_rope2d:
        return BackboneTables(positions, None, None)
    ropes = backbone_ropes(config, detection.window, grid, tower.conv1.weight.device)
    return BackboneTables(positions, *ropes)


def backbone_tokens(
    tower: VisionTower,
    pixels: Tensor,
    tables: BackboneTables,
    detection: DetectionConfig,
) -> Tensor:
    """Normalised float pixels (N, 3, H, W) -> output of the last block (N, h*w, C)."""
    windows = Windows(*tower.config.grid_of(*pixels.shape[-2:]), detection.window)
    x = tower.embed(pixels, tables.positions)
    for index, block in enumerate(tower.transformer.resblocks):
        if index in detection.global_blocks:
            x = block(x, rope=tables.whole)
        else:
            x = block(x, rope=tables.window, windows=windows)
    return x


def pyramid_levels(
    tower: VisionTower,
    pyramid: FeaturePyramid,
    pixels: Tensor,
    detection: DetectionConfig,
    tables: BackboneTables | None = None,
) -> list[Tensor]:
    """Normalised float pixels (N, 3, H, W) -> the levels p2 to p6; see `FeaturePyramid`.

    `tables` are the backbone's on this grid; None computes them.
    """
    grid = tower.config.grid_of(*pixels.shape[-2:])
    if tables is None:
        tables = backbone_tables(tower, detection, grid)
    x = backbone_tokens(tower, pixels, tables, detection)
    # (N, h*w, C) -> (N, C, h*w) -> (N, C, h, w)
    levels: list[Tensor] = pyramid(x.transpose(1, 2).unflatten(2, grid))
    return levels
