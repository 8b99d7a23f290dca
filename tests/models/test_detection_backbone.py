"""The detection backbone against a plain implementation of the reference's description.

The plain implementation shares nothing with the model but the weights: it pads and cuts windows
with loops, rotates channel by channel with complex numbers, and writes out attention.

Legend: N batch, h w patch grid, C width, K channels of a level.
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import DetectionConfig, PeConfig, VisionConfig
from perception_rt.errors import InputError
from perception_rt.models.pe import PerceptionEncoder

PATCH = 16


def backbone(window: int = 3, global_blocks: tuple[int, ...] = (1, 3), **more: object) -> PeConfig:
    values = {
        "patch_size": PATCH,
        "width": 32,
        "layers": 4,
        "heads": 2,
        "mlp_ratio": 4.0,
        "image_size": 4 * PATCH,
        "pool_type": "none",
        "use_ln_post": False,
        "ls_init_value": 0.1,
    }
    vision = VisionConfig(**{**values, **more})
    detection = DetectionConfig(window=window, global_blocks=global_blocks, channels=8)
    return PeConfig(vision=vision, detection=detection)


def loaded(config: PeConfig) -> tuple[PerceptionEncoder, dict[str, Tensor]]:
    model = PerceptionEncoder(config).eval()
    source = RandomWeights(config, seed=3)
    state = {name: source.load(name) for name in model.state_dict()}
    model.load_state_dict(state)
    return model, state


class Plain:
    """The backbone, written from the description with explicit loops."""

    def __init__(self, config: PeConfig, weights: dict[str, Tensor]) -> None:
        assert config.detection is not None
        self.vision, self.detection, self.weights = config.vision, config.detection, weights

    def __call__(self, pixels: Tensor) -> list[Tensor]:
        w = self.weights
        x = F.conv2d(pixels, w["visual.conv1.weight"], stride=PATCH).permute(0, 2, 3, 1)
        x = x.clone()
        _, h, width, _ = x.shape
        native = self.vision.image_size // PATCH
        for row in range(h):
            for column in range(width):
                index = (row % native) * native + column % native
                x[:, row, column] += w["visual.positional_embedding"][index]
        x = self.norm(x, "visual.ln_pre", 1e-5)
        for index in range(self.vision.layers):
            x = self.block(x, index)
        return self.pyramid(x.permute(0, 3, 1, 2))

    def norm(self, x: Tensor, name: str, eps: float) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        scaled = (x - mean) / torch.sqrt(variance + eps)
        return scaled * self.weights[f"{name}.weight"] + self.weights[f"{name}.bias"]

    def block(self, x: Tensor, index: int) -> Tensor:
        """(N, h, w, C) -> (N, h, w, C)."""
        w, prefix = self.weights, f"visual.transformer.resblocks.{index}"
        normed = self.norm(x, f"{prefix}.ln_1", 1e-5)
        h, width = x.shape[1:3]
        # The rotary positions of the image are those of the square that it is padded to.
        native = self.vision.image_size / PATCH
        if index in self.detection.global_blocks:
            mixed = self.attention(normed, prefix, native / max(h, width))
        else:
            side = self.detection.window
            mixed = torch.zeros_like(normed)
            for top in range(0, h, side):
                for left in range(0, width, side):
                    part = normed[:, top : top + side, left : left + side]
                    filled = normed.new_zeros(len(x), side, side, x.shape[-1])
                    filled[:, : part.shape[1], : part.shape[2]] = part
                    result = self.attention(filled, prefix, native / side)
                    kept = result[:, : part.shape[1], : part.shape[2]]
                    mixed[:, top : top + side, left : left + side] = kept
        x = x + mixed * w.get(f"{prefix}.ls_1.gamma", 1.0)
        y = self.linear(self.norm(x, f"{prefix}.ln_2", 1e-5), f"{prefix}.mlp.c_fc")
        y = 0.5 * y * (1 + torch.erf(y / math.sqrt(2)))
        return x + self.linear(y, f"{prefix}.mlp.c_proj") * w.get(f"{prefix}.ls_2.gamma", 1.0)

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights[f"{name}.bias"]

    def attention(self, x: Tensor, prefix: str, step: float) -> Tensor:
        """Attention of all positions of (N, h, w, C), which are `step` apart."""
        n, h, width, channels = x.shape
        weight = self.weights[f"{prefix}.attn.in_proj_weight"]
        bias = self.weights[f"{prefix}.attn.in_proj_bias"]
        q, k, v = (x.reshape(n, -1, channels) @ weight.T + bias).split(channels, dim=-1)
        size = channels // self.vision.heads
        heads = []
        for head in range(self.vision.heads):
            part = slice(head * size, (head + 1) * size)
            turned = [self.turned(t[..., part], h, width, step) for t in (q, k)]
            scores = turned[0] @ turned[1].transpose(1, 2) / math.sqrt(size)
            odds = torch.exp(scores - scores.amax(-1, keepdim=True))
            heads.append(odds / odds.sum(-1, keepdim=True) @ v[..., part])
        result = self.linear(torch.cat(heads, -1), f"{prefix}.attn.out_proj")
        return result.reshape(n, h, width, channels)

    def turned(self, x: Tensor, h: int, width: int, step: float) -> Tensor:
        """Rotates adjacent channels of (N, h*w, size), the first half by column, then by row.

        The reference counts from 1, which changes no score.
        """
        numbers = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)).contiguous())
        quarter = x.shape[-1] // 4
        angles = torch.zeros(h * width, 2 * quarter, dtype=torch.float64)
        for token in range(h * width):
            row, column = divmod(token, width)
            for index in range(quarter):
                frequency = 10000 ** (-index / quarter)
                angles[token, index] = (1 + column * step) * frequency
                angles[token, quarter + index] = (1 + row * step) * frequency
        turned = numbers * torch.polar(torch.ones_like(angles), angles)
        return torch.view_as_real(turned).flatten(-2).float()

    def pyramid(self, x: Tensor) -> list[Tensor]:
        p2 = self.doubled(x, "simfp_2.0")
        p2 = F.gelu(self.channel_norm(p2, "simfp_2.1"))
        p2 = self.level(self.doubled(p2, "simfp_2.3"), "simfp_2", 4)
        p3 = self.level(self.doubled(x, "simfp_3.0"), "simfp_3", 1)
        p4 = self.level(x, "simfp_4", 0)
        h, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
        corners = [x[:, :, i:h:2, j:width:2] for i in (0, 1) for j in (0, 1)]
        p5 = self.level(torch.stack(corners).amax(0), "simfp_5", 1)
        return [p2, p3, p4, p5, p5[:, :, ::2, ::2]]

    def doubled(self, x: Tensor, name: str) -> Tensor:
        """Each pixel becomes 2 x 2: (N, C, h, w) -> (N, D, 2h, 2w)."""
        weight, bias = (self.weights[f"pyramid.{name}.{kind}"] for kind in ("weight", "bias"))
        result = x.new_zeros(len(x), weight.shape[1], 2 * x.shape[2], 2 * x.shape[3])
        for i in (0, 1):
            for j in (0, 1):
                pixel = torch.einsum("nchw,cd->ndhw", x, weight[:, :, i, j])
                result[:, :, i::2, j::2] = pixel + bias[:, None, None]
        return result

    def channel_norm(self, x: Tensor, name: str) -> Tensor:
        return self.norm(x.movedim(1, -1), f"pyramid.{name}", 1e-6).movedim(-1, 1)

    def level(self, x: Tensor, name: str, first: int) -> Tensor:
        weights = [self.weights[f"pyramid.{name}.{first + i}.weight"] for i in (0, 1)]
        x = self.channel_norm(
            torch.einsum("nchw,dc->ndhw", x, weights[0][..., 0, 0]), f"{name}.{first}.norm"
        )
        filled = F.pad(x, (1, 1, 1, 1))
        h, width = x.shape[2:]
        x = sum(
            torch.einsum(
                "nchw,dc->ndhw", filled[:, :, i : i + h, j : j + width], weights[1][:, :, i, j]
            )
            for i in range(3)
            for j in range(3)
        )
        return self.channel_norm(x, f"{name}.{first + 1}.norm")


@pytest.mark.parametrize(
    ("rows", "columns", "window"),
    [
        (4, 4, 4),  # the tower's own grid, and one window
        (8, 8, 4),  # as in the reference: twice the grid, and windows of the grid's size
        (5, 7, 3),  # not square, and windows that do not divide the image
        (2, 9, 5),  # windows that are larger than the image
    ],
)
def test_levels_equal_a_plain_implementation(rows: int, columns: int, window: int) -> None:
    model, state = loaded(backbone(window))
    pixels = torch.randn(2, 3, rows * PATCH, columns * PATCH, generator=torch.manual_seed(1))
    with torch.no_grad():
        levels = model.encode_pyramid(pixels)
        expected = Plain(model.config, state)(pixels)
    sizes = [tuple(level.shape[2:]) for level in levels]
    half = (rows // 2, columns // 2)
    assert sizes[:3] == [(4 * rows, 4 * columns), (2 * rows, 2 * columns), (rows, columns)]
    assert sizes[3:] == [half, (-(-half[0] // 2), -(-half[1] // 2))]
    for level, wanted in zip(levels, expected, strict=True):
        torch.testing.assert_close(level, wanted, rtol=0, atol=1e-4)


def test_windows_and_global_blocks_matter() -> None:
    """A change in one corner reaches the other only through a block that sees the whole image."""
    pixels = torch.randn(1, 3, 6 * PATCH, 6 * PATCH, generator=torch.manual_seed(1))
    other = pixels.clone()
    other[..., -PATCH:, -PATCH:] += 1
    changed = {}
    for blocks in ((), (3,)):
        model, _ = loaded(backbone(3, blocks))
        with torch.no_grad():
            a, b = (model.encode_pyramid(x)[0] for x in (pixels, other))
        changed[blocks] = (a - b).abs()[..., 0, 0].max().item()
    assert changed[()] == 0
    assert changed[(3,)] > 1e-5


def test_tower_without_positions_and_rope() -> None:
    model, _ = loaded(backbone(use_abs_posemb=False, use_rope2d=False))
    levels = model.encode_pyramid(torch.zeros(1, 3, 64, 64))
    assert [level.shape[1] for level in levels] == [8] * 5


@pytest.mark.parametrize(
    ("window", "blocks", "more", "message"),
    [
        (3, (1, 4), {}, "global block 4 is out of range: the tower has blocks 0 to 3"),
        (3, (2, 1), {}, "global_blocks must be ascending"),
        (0, (1,), {}, "window must be from 1"),
        (3, (1,), {"use_cls_token": True}, "no class token"),
        (3, (1,), {"width": 34, "use_rope2d": False}, "divisible by 4"),
        (3, (1,), {"patch_size": 8}, "patches of 16 pixels, not 8"),
    ],
)
def test_refused_architectures(
    window: int, blocks: tuple[int, ...], more: dict[str, object], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        backbone(window, blocks, **more)


def test_size_that_is_no_multiple_of_the_patch() -> None:
    model, _ = loaded(backbone())
    with pytest.raises(InputError, match="64x70 is not a multiple of the patch size 16"):
        model.encode_pyramid(torch.zeros(1, 3, 64, 70))


def test_records_without_detection_keep_their_form() -> None:
    config = backbone()
    assert PeConfig.from_dict(config.to_dict()) == config
    assert "detection" not in PeConfig(vision=config.vision).to_dict()
    assert PeConfig.from_dict({"vision": config.vision.to_dict()}).detection is None
