"""A run's configuration: one tree of frozen records, read from YAML and `--set` overrides.

What can be configured is exactly what stands here; the architectures are `PeConfig` and
`PlmConfig`. `task` at the top of a recipe says which tree it is.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from perception_rt.config import PeConfig
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.tiles import TileMode
from training.recipe.pairs import (
    DistillationLossConfig,
    PairDataConfig,
    ResolutionConfig,
    TeacherConfig,
)
from training.recipe.tree import build, read_recipe, require


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        lr_scales: factors on it, by the beginning of parameter names; the longest that fits counts.
        beta1: decay of the gradient's mean.
        beta2: decay of its square's mean.
        eps: added to the root of the latter.
        weight_decay: acts on matrices only.
        clip: bound of the gradient's global norm.
        accumulation: parts that a rank's share of a batch is computed in, one after the other.
        stop_above: a gradient's norm, before clipping, that stops the run; null for none.
    """

    lr: float = 1e-3
    lr_scales: dict[str, float] = field(default_factory=dict)
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-8
    weight_decay: float = 0.05
    clip: float = 1.0
    accumulation: int = 1
    stop_above: float | None = None

    def __post_init__(self) -> None:
        for name in ("lr", "eps", "clip"):
            value = getattr(self, name)
            require(value > 0, f"optim.{name} must be positive, not {value}")
        for name, value in self.lr_scales.items():
            require(value >= 0, f"optim.lr_scales.{name} must not be negative, not {value}")
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optim.{name} must be at least 0 and below 1, not {value}")
        require(
            self.weight_decay >= 0,
            f"optim.weight_decay must not be negative, not {self.weight_decay}",
        )
        require(
            self.accumulation >= 1,
            f"optim.accumulation must be at least 1, not {self.accumulation}",
        )
        require(
            self.stop_above is None or self.stop_above > 0,
            f"optim.stop_above must be positive, not {self.stop_above}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleConfig:
    """Linear warm-up, then a cosine from the peak to `final_fraction` of it at the last step."""

    steps: int = 1000
    warmup: int = 100
    final_fraction: float = 0.01

    def __post_init__(self) -> None:
        require(self.steps >= 1, f"schedule.steps must be at least 1, not {self.steps}")
        require(
            0 <= self.warmup <= self.steps,
            f"schedule.warmup must be from 0 to schedule.steps {self.steps}, not {self.warmup}",
        )
        require(
            0 <= self.final_fraction <= 1,
            f"schedule.final_fraction must be from 0 to 1, not {self.final_fraction}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelConfig:
    """How a model is spread over ranks, and how it is computed.

    Attributes:
        mode: `replicate` keeps all of the model on every rank, `shard` a share of it (FSDP2),
            `hybrid` shards within groups of `shard_ranks` and replicates over the groups (HSDP).
        shard_ranks: ranks of a group in mode `hybrid`.
        tensor: ranks that share each layer of a decoder (tensor parallel).
        precision: of the computation; weights, gradients' sums and moments are float32 in both.
        checkpointing: activations that are computed again in the backward pass: those of every
            block (`full`), of every block but the products (`selective`), or none.
        attention: kernel of the decoder: torch's `sdpa`, `flex` or `xformers`, the last two on GPU.
        compile: each block through `torch.compile`.
    """

    mode: Literal["replicate", "shard", "hybrid"] = "replicate"
    shard_ranks: int = 8
    tensor: int = 1
    precision: Literal["fp32", "bf16"] = "fp32"
    checkpointing: Literal["none", "selective", "full"] = "none"
    attention: Literal["sdpa", "flex", "xformers"] = "sdpa"
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("shard_ranks", "tensor"):
            value = getattr(self, name)
            require(value >= 1, f"parallel.{name} must be at least 1, not {value}")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunConfig:
    """How a run behaves, apart from what it computes.

    Attributes:
        out_dir: where metrics, resolved configuration, checkpoints and weights go.
        seed: of the weights, the order of the data, the scenes and stochastic depth.
        device: `auto` is a GPU if there is one.
        threads: torch's threads per process; 0 divides the machine's cores among its processes.
        workers: threads per process that read data ahead.
        log_every: steps between two progress lines.
        eval_every: steps between two evaluations; 0 for none.
        save_every: steps between two checkpoints, besides the last; 0 for none.
        keep: checkpoints that are kept; 0 for all.
        resume: continue from the newest whole checkpoint in `out_dir`; without any, start anew.
        tensorboard: write TensorBoard events beside the metrics.
        peak_tflops: what a device can do at most in the run's precision, in TFLOP/s; with it, the
            record has the share of it that the model's own arithmetic uses (MFU).
    """

    out_dir: str
    seed: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    threads: int = 0
    workers: int = 2
    log_every: int = 20
    eval_every: int = 0
    save_every: int = 0
    keep: int = 2
    resume: bool = False
    tensorboard: bool = False
    peak_tflops: float | None = None

    def __post_init__(self) -> None:
        require(self.out_dir != "", "run.out_dir must not be empty")
        for name in ("seed", "threads", "eval_every", "save_every", "keep"):
            value = getattr(self, name)
            require(value >= 0, f"run.{name} must not be negative, not {value}")
        for name in ("workers", "log_every"):
            value = getattr(self, name)
            require(value >= 1, f"run.{name} must be at least 1, not {value}")
        require(
            self.peak_tflops is None or self.peak_tflops > 0,
            f"run.peak_tflops must be positive, not {self.peak_tflops}",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class InitConfig:
    """Where weights start from; what is not named starts at random.

    Attributes:
        checkpoint: of a whole model of this architecture, as `perception-export` takes it.
        vision: of a Perception Encoder, whose tower becomes the language model's.
        decoder: of a language model, whose decoder becomes this one's.
    """

    checkpoint: str | None = None
    vision: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        require(
            self.checkpoint is None or self.vision is self.decoder is None,
            "init.checkpoint is the whole model; init.vision and init.decoder are its parts",
        )

    def require_whole(self) -> None:
        """InputError if parts of a language model are named."""
        require(
            self.vision is self.decoder is None,
            "init.vision and init.decoder are for language models; use init.checkpoint",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank updates beside frozen linear layers, which alone are trained.

    Attributes:
        rank: of the updates.
        alpha: the updates are scaled by alpha / rank.
        targets: ends of the layers' names, such as `wq`, `projector.0`, or of the vision tower
            `in_proj`, `out_proj`, `c_fc` and `c_proj`.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank must be at least 1, not {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, not {self.alpha}")
        require(len(self.targets) > 0, "lora.targets must name at least one layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """One set of conversations.

    Attributes:
        annotation: a jsonl file, a directory of `*.jsonl`, or `scenes:NAME` for a set of questions
            about synthetic scenes, made as they are needed (`training/demo/questions.py`).
        root: the folder that paths of images and videos start from.
    """

    annotation: str
    root: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageDataConfig:
    """Conversations about images and videos.

    Attributes:
        datasets: by name.
        mix: names and weights, `name:weight,name:weight`; a weight is a share of the samples.
        tokenizer: a file as `perception-export --tokenizer` takes it.
        conversation: `plm_sft` is the chat format, `warmup` image tokens and a caption.
        batch_size: sequences per step over all ranks; every rank takes an equal share.
        seq_len: tokens per sequence.
        packing: several samples in a sequence, none of which attends to another.
        mode: how images become tiles.
        max_tiles: of one image, the thumbnail not counted.
        max_frames: of one video.
        bad_fraction: samples that may be unusable before a run stops, from 0 to 1.
        validation: samples of each dataset made for evaluation.
    """

    datasets: dict[str, DatasetConfig]
    mix: str
    tokenizer: str
    conversation: Literal["plm_sft", "warmup"] = "plm_sft"
    batch_size: int = 8
    seq_len: int = 1024
    packing: bool = True
    mode: TileMode = "thumb+tile"
    max_tiles: int = 36
    max_frames: int = 32
    bad_fraction: float = 0.01
    validation: int = 100

    def __post_init__(self) -> None:
        require(len(self.datasets) > 0, "data.datasets must not be empty")
        for name in ("batch_size", "seq_len", "max_tiles", "max_frames"):
            value = getattr(self, name)
            require(value >= 1, f"data.{name} must be at least 1, not {value}")
        require(
            0 <= self.bad_fraction <= 1,
            f"data.bad_fraction must be from 0 to 1, not {self.bad_fraction}",
        )
        require(
            self.validation >= 0, f"data.validation must not be negative, not {self.validation}"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainConfig:
    """What all recipes have."""

    run: RunConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()

    def to_dict(self) -> dict[str, Any]:
        """The resolved configuration as plain values, as a recipe file would hold it."""
        tree = asdict(self)
        if isinstance(architecture := getattr(self, "model", None), PlmConfig):
            tree["model"] = architecture.to_dict()
        return tree

    def to_yaml(self) -> str:
        """The resolved configuration as a recipe."""
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveConfig(TrainConfig):
    """A Perception Encoder learns which caption goes with which image.

    Attributes:
        model: the architecture, with a text tower.
        data: pairs.
        loss: `softmax` over the batch (CLIP), or `sigmoid` of each pair by itself (SigLIP).
        resolutions: sizes of images by step, ascending; none for `model.vision.image_size`.
        init: where weights start from.
    """

    task: Literal["contrastive"] = "contrastive"
    model: PeConfig
    data: PairDataConfig = field(default_factory=PairDataConfig)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    resolutions: tuple[ResolutionConfig, ...] = ()
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        require(self.model.text is not None, "contrastive training needs model.text")
        self.init.require_whole()
        require(self.parallel.tensor == 1, "parallel.tensor is for language models; it must be 1")
        steps = [entry.step for entry in self.resolutions]
        require(
            not steps or (steps[0] == 0 and steps == sorted(set(steps))),
            f"resolutions: steps must start at 0 and ascend, not {steps}",
        )
        patch = self.model.vision.patch_size
        for entry in self.resolutions:
            require(
                entry.size > 0 and entry.size % patch == 0,
                f"resolutions: size {entry.size} is not a multiple of the patch size {patch}",
            )
        require(
            self.run.eval_every == 0
            or (self.data.dataset == "digits" and self.data.validation > 0),
            "run.eval_every needs data.dataset digits and a validation split (data.validation)",
        )
        require(
            self.optim.accumulation == 1,
            "optim.accumulation must be 1: a contrastive loss is of the whole batch at once",
        )

    def image_size(self, step: int) -> int:
        """The side of images at a step, counted from 0."""
        begun = [entry.size for entry in self.resolutions if entry.step <= step]
        return begun[-1] if begun else self.model.vision.image_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig(TrainConfig):
    """A vision tower learns to see as a larger one does; captions are not used.

    Attributes:
        model: the student's architecture, without a text tower.
        teacher: whom it learns from.
        data: images, or videos, of which every frame is an image.
        loss: what is compared.
        init: where the student's weights start from.
    """

    task: Literal["distill"] = "distill"
    model: PeConfig
    teacher: TeacherConfig
    data: PairDataConfig = field(default_factory=PairDataConfig)
    loss: DistillationLossConfig = field(default_factory=DistillationLossConfig)
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        require(self.model.text is None, "distillation trains a vision tower; model.text must go")
        self.init.require_whole()
        require(self.parallel.tensor == 1, "parallel.tensor is for language models; it must be 1")
        require(
            self.run.eval_every == 0, "run.eval_every must be 0: distillation evaluates nothing"
        )
        student, teacher = self.model.vision, self.teacher.model.vision
        if self.loss.embedding:
            require(
                "none" not in (student.pool_type, teacher.pool_type),
                "loss.embedding needs pooled towers; set it to 0 where pool_type is none",
            )
        if self.loss.tokens or self.loss.pairwise:
            require(
                student.grid == teacher.grid,
                f"loss.tokens and loss.pairwise need equal patch grids, not {student.grid} "
                f"and {teacher.grid} patches a side",
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageConfig(TrainConfig):
    """A Perception Language Model learns to answer.

    Attributes:
        model: the architecture.
        data: conversations.
        init: where weights start from.
        train: what is trained: the projector alone (stage 1 of the released models), or `all`.
        lora: low-rank updates are trained instead.
    """

    task: Literal["language"] = "language"
    model: PlmConfig
    data: LanguageDataConfig
    init: InitConfig = InitConfig()
    train: Literal["all", "projector"] = "all"
    lora: LoraConfig | None = None

    def __post_init__(self) -> None:
        longest = self.model.decoder.max_seqlen
        require(
            self.data.seq_len <= longest,
            f"data.seq_len must be at most model.max_seqlen {longest}, not {self.data.seq_len}",
        )
        require(
            self.lora is None or self.parallel.tensor == 1,
            f"lora needs parallel.tensor 1, not {self.parallel.tensor}",
        )
        require(
            self.lora is None or self.train == "all",
            f"lora trains its updates alone; train must not be {self.train!r}",
        )


TASKS: Mapping[str, type[TrainConfig]] = {
    "contrastive": ContrastiveConfig,
    "distill": DistillationConfig,
    "language": LanguageConfig,
}


def load_config(recipe: Path, overrides: Sequence[str] = ()) -> Any:
    """Reads a recipe and applies `key.path=value` overrides, in order.

    Returns:
        The record of the recipe's task, one of `TASKS`.

    Raises:
        InputError: the file is missing or not YAML, or a key, a type or a value is wrong.
    """
    tree = read_recipe(recipe)
    task = tree.get("task")
    require(
        isinstance(task, str) and task in TASKS,
        f"task must be one of {list(TASKS)}, not {task!r:.60}",
    )
    return build(TASKS[str(task)], tree, overrides)


def _plain(value: Any) -> Any:
    """Tuples as lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
