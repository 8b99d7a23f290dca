"""A Perception Encoder: both towers and the logit scale, under the reference's names.

Legend: N images, M texts, F frames, H W pixels, T tokens, D output.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.config import PeConfig
from perception_rt.errors import InputError
from perception_rt.models.detection import FeaturePyramid, pyramid_levels
from perception_rt.models.layers import Attention, sdpa_attention
from perception_rt.models.text import TextTower
from perception_rt.models.vision import VisionTower

INIT_LOGIT_SCALE = math.log(1 / 0.07)


class PerceptionEncoder(nn.Module):
    """A Perception Encoder with the parameter names of the checkpoints.

    Args:
        config: the architecture; without `text`, only the vision methods work.
        attention: attention kernel of all blocks.
    """

    def __init__(self, config: PeConfig, *, attention: Attention = sdpa_attention) -> None:
        super().__init__()
        self.config = config
        self.visual = VisionTower(config.vision, attention=attention)
        if config.detection is not None:
            self.pyramid = FeaturePyramid(config.vision.width, config.detection.channels)
        if config.text is not None:
            self.text = TextTower(config.text, attention=attention)
            self.logit_scale = nn.Parameter(torch.tensor(INIT_LOGIT_SCALE))

    def encode_image(self, pixels: Tensor, *, normalize: bool = False) -> Tensor:
        """Normalised float pixels (N, 3, H, W) -> (N, D)."""
        x = self.visual(pixels)
        return F.normalize(x, dim=-1) if normalize else x

    def encode_pyramid(self, pixels: Tensor) -> list[Tensor]:
        """Normalised float pixels (N, 3, H, W) -> the levels p2 to p6 of a detection backbone."""
        if self.config.detection is None:
            raise InputError("this Perception Encoder is no detection backbone")
        return pyramid_levels(self.visual, self.pyramid, pixels, self.config.detection)

    def encode_video(self, frames: Tensor, *, normalize: bool = False) -> Tensor:
        """Float frames (N, F, 3, H, W) -> the mean (N, D) of the frames' features.

        As in the reference, `normalize` applies to each frame and not to the mean.
        """
        n, f = frames.shape[:2]
        # (N, F, 3, H, W) -> (N * F, 3, H, W)
        features = self.encode_image(frames.flatten(0, 1), normalize=normalize)
        return features.unflatten(0, (n, f)).mean(dim=1)  # (N * F, D) -> (N, F, D) -> (N, D)

    def encode_text(self, tokens: Tensor, *, normalize: bool = False) -> Tensor:
        """int64 token ids (N, T) -> (N, D)."""
        if self.config.text is None:
            raise InputError("this Perception Encoder has no text tower")
        x = self.text(tokens)
        return F.normalize(x, dim=-1) if normalize else x

    def forward(self, pixels: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pixels (N, 3, H, W) and ids (M, T) -> unit features (N, D), (M, D), exp(logit_scale)."""
        image = self.encode_image(pixels, normalize=True)
        text = self.encode_text(tokens, normalize=True)
        return image, text, self.logit_scale.exp()
