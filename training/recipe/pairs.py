"""Recipe sections of Perception Encoders; `training/recipe/schema.py` has the whole recipes."""

from dataclasses import dataclass
from typing import Literal

from perception_rt.config import PeConfig
from training.recipe.tree import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDataConfig:
    """Images, or videos, and their captions.

    Attributes:
        dataset: `digits` are handwritten digits in synthetic scenes, made as they are needed;
            `jsonl` and `webdataset` are files (`training/data/pairs.py`).
        path: of the files, or a pattern such as `shards-{000..007}.tar` or `part-*.jsonl`.
        root: the folder that paths in jsonl files start from.
        batch_size: samples per step over all ranks; every rank takes an equal share.
        frames: taken of each video, spread over all of it.
        crop_min: least share of an image's area that a random crop keeps; 1 keeps all of it.
        flip: whether half of the images are mirrored; text in images speaks against it.
        bad_fraction: samples that may be unusable before a run stops, from 0 to 1.
        plain_fraction: of `digits`, the share rendered as dark ink on a white page, from 0 to 1.
        validation: digits at the end of the training split that are kept for evaluation.
    """

    dataset: Literal["digits", "jsonl", "webdataset"] = "digits"
    path: str = ""
    root: str = ""
    batch_size: int = 128
    frames: int = 8
    crop_min: float = 1.0
    flip: bool = False
    bad_fraction: float = 0.01
    plain_fraction: float = 0.2
    validation: int = 200

    def __post_init__(self) -> None:
        require(self.batch_size >= 2, f"data.batch_size must be at least 2, not {self.batch_size}")
        require(
            self.dataset == "digits" or self.path != "",
            f"data.path must name the files of data.dataset {self.dataset}",
        )
        require(self.frames >= 1, f"data.frames must be at least 1, not {self.frames}")
        require(
            0 < self.crop_min <= 1, f"data.crop_min must be above 0, at most 1, not {self.crop_min}"
        )
        for name in ("bad_fraction", "plain_fraction"):
            value = getattr(self, name)
            require(0 <= value <= 1, f"data.{name} must be from 0 to 1, not {value}")
        require(
            0 <= self.validation <= 1000,
            f"data.validation must be from 0 to 1000, not {self.validation}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolutionConfig:
    """The side of images in pixels from a step on, counted from 0."""

    step: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A frozen Perception Encoder that a smaller one learns from.

    Attributes:
        checkpoint: its weights, as `perception-export` takes them; a text tower is not read.
        model: its architecture.
        precision: of its weights and its computation.
    """

    checkpoint: str
    model: PeConfig
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationLossConfig:
    """Weights of the parts of the loss; 0 leaves one out.

    Attributes:
        embedding: one minus the cosine of the images' embeddings.
        tokens: one minus the cosine of patch tokens, each with its counterpart.
        pairwise: squared difference of the cosines among the patch tokens of an image.
    """

    embedding: float = 1.0
    tokens: float = 0.0
    pairwise: float = 0.0

    def __post_init__(self) -> None:
        values = [self.embedding, self.tokens, self.pairwise]
        require(
            min(values) >= 0 and max(values) > 0,
            f"loss: weights must not be negative, nor all 0, not {values}",
        )
