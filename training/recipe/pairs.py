"""Recipe sections of Perception Encoders; `schema.py` has the whole recipes."""

from dataclasses import dataclass
from typing import Literal

from perception_rt.config import PeConfig
from perception_rt.records import require


@dataclass(frozen=True, slots=True, kw_only=True)
class PairDataConfig:
    """Images or videos with captions.

    Attributes:
        dataset: `digits` draws handwritten digits in synthetic scenes; `jsonl` and `webdataset`
            read files (`training/data/shards.py`).
        path: files to read, as a path or a pattern such as `shards-{000..007}.tar` or
            `part-*.jsonl`.
        root: folder that paths in jsonl files are relative to; empty for each file's own.
        batch_size: samples per step over all ranks; each rank takes an equal share.
        frames: frames per video, evenly spaced.
        crop_min: least share of an image's area that a random crop keeps; 1 disables cropping.
        flip: mirror half of the images; unsuitable for images with text.
        bad_fraction: share of samples that may be unusable before the run stops, from 0 to 1.
        plain_fraction: share of `digits` drawn as dark ink on a white page, from 0 to 1.
        validation: digits at the end of the training split that are kept for evaluation.
        validation_path: files to evaluate on, named like `path`.
        validation_fraction: share of the pairs in `path` that are kept for evaluation, below 1.
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
    validation_path: str = ""
    validation_fraction: float = 0.0

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
        require(
            0 <= self.validation_fraction < 1,
            f"data.validation_fraction must be from 0 to below 1, not {self.validation_fraction}",
        )
        require(
            not (self.validation_path and self.validation_fraction),
            "data.validation_path and data.validation_fraction exclude each other; remove one",
        )
        require(
            self.dataset != "digits" or not (self.validation_path or self.validation_fraction),
            "data.validation_path and data.validation_fraction are for jsonl and webdataset; "
            "data.dataset digits has data.validation",
        )

    @property
    def has_validation(self) -> bool:
        """Whether samples are kept for evaluation."""
        if self.dataset == "digits":
            return self.validation > 0
        return self.validation_path != "" or self.validation_fraction > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class ResolutionConfig:
    """Side of images in pixels (`size`) from a step on (`step`, counted from 0)."""

    step: int
    size: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherConfig:
    """A frozen Perception Encoder that a smaller one learns from.

    Attributes:
        checkpoint: weights, as `perception-export --checkpoint` takes them; a text tower is
            ignored.
        model: architecture.
        precision: dtype of weights and computation.
    """

    checkpoint: str
    model: PeConfig
    precision: Literal["fp32", "bf16"] = "fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationLossConfig:
    """Weights of the loss terms; 0 omits a term.

    Attributes:
        embedding: one minus the cosine of image embeddings.
        tokens: one minus the cosine of patch tokens at equal positions.
        pairwise: squared difference between student's and teacher's cosines among an image's patch
            tokens.
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
