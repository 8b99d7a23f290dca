"""Weights of a detection backbone: those of a detector, or an encoder's with a random pyramid.

An encoder is converted as the reference does before it trains a detector. The patch kernel is
resized to 16 pixels, the class token and its position are dropped, and so is all that follows the
last block.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor

from perception_rt.checkpoint.names import is_detector
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.readers import open_reader
from perception_rt.checkpoint.source import FileWeights, WeightSource, open_checkpoint
from perception_rt.config import DETECTION_PATCH, PeConfig

_KERNEL, _POSITIONS = "visual.conv1.weight", "visual.positional_embedding"
_PYRAMID = "pyramid."
NOTE = (
    "the checkpoint is an encoder without a feature pyramid: the pyramid's weights are random, for "
    "the training of a detector"
)


class BackboneWeights:
    """A `WeightSource` of a detection backbone that is made from an encoder.

    Args:
        encoder: the encoder's weights.
        source_config: the encoder's architecture.
        config: the backbone's architecture.
        seed: RNG seed of the pyramid's weights.
    """

    def __init__(
        self, encoder: FileWeights, source_config: PeConfig, config: PeConfig, seed: int
    ) -> None:
        self.config = config
        self._encoder = encoder
        self._has_class_token = source_config.vision.use_cls_token
        self._pyramid: WeightSource = RandomWeights(config, seed)
        self._seed = seed

    @property
    def provenance(self) -> Mapping[str, str | int]:
        """Facts about the encoder's weights, and the seed of the pyramid's."""
        facts = self._encoder.provenance
        return {**facts, "seed": self._seed, "note": "; ".join(self.notes)}

    @property
    def notes(self) -> Sequence[str]:
        """Sentences for the user."""
        return [*self._encoder.notes, NOTE]

    def load(self, name: str) -> Tensor:
        """Returns a parameter; CheckpointError if it is unreadable."""
        if name.startswith(_PYRAMID):
            return self._pyramid.load(name)
        tensor = self._encoder.load(name)
        if name == _POSITIONS:
            return tensor[int(self._has_class_token) :].contiguous()
        if name == _KERNEL and tensor.shape[-1] != DETECTION_PATCH:
            size = (DETECTION_PATCH, DETECTION_PATCH)
            return F.interpolate(tensor.float(), size=size, mode="bicubic", align_corners=False)
        return tensor

    def load_rows(self, name: str, start: int, stop: int) -> Tensor:
        """Returns `load(name)[start:stop]`."""
        return self.load(name)[start:stop]


def open_backbone(
    path: Path,
    config: PeConfig,
    encoder: PeConfig,
    *,
    license_note: str,
    ema: bool,
    seed: int,
) -> FileWeights | BackboneWeights:
    """Opens the weights of a detection backbone.

    Args:
        path: a checkpoint of a detector or of an encoder, as for `open_checkpoint`.
        config: the backbone's architecture.
        encoder: architecture of the encoder that it comes from.
        license_note: licence of the weights.
        ema: take the averaged copy (EMA) that the checkpoint must hold.
        seed: RNG seed of a missing pyramid.

    Raises:
        CheckpointError: as `open_checkpoint`.
    """
    if is_detector(open_reader(path, ema=ema).headers):
        return open_checkpoint(path, config, license_note=license_note, ema=ema)
    tower = replace(encoder, text=None)
    source = open_checkpoint(path, tower, license_note=license_note, ema=ema, find_biases=True)
    return BackboneWeights(source, tower, config, seed)
