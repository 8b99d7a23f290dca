"""The configuration of a training run: frozen dataclasses, read from YAML and `--set` overrides.

Every setting is declared here, except the architectures, which are `PeConfig` and `PlmConfig`. The
top-level key `task` selects the class of a recipe.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from perception_rt.config import PeConfig
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.tiles import TileMode
from perception_rt.records import require
from training.recipe.pairs import (
    DistillationLossConfig,
    PairDataConfig,
    ResolutionConfig,
    TeacherConfig,
)
from training.recipe.tree import build, read_recipe


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimConfig:
    """AdamW.

    Attributes:
        lr: peak learning rate.
        lr_scales: learning rate factors by prefix of parameter names; the longest match counts.
        beta1: decay rate of the gradient's running mean.
        beta2: decay rate of the squared gradient's running mean.
        eps: constant added to the denominator.
        weight_decay: weight decay of matrices; other parameters have none.
        clip: upper bound of the global gradient norm.
        accumulation: parts that each rank's share of a batch is split into for gradient
            accumulation.
        stop_above: gradient norm before clipping that stops the run; null for none.
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
    """Linear warm-up, then cosine decay from the peak to `final_fraction` times the peak."""

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
    """Distribution over ranks, and precision and kernels of the computation.

    Attributes:
        mode: `replicate` keeps the whole model on every rank, `shard` splits it over all ranks
            (FSDP2), `hybrid` splits it within groups of `shard_ranks` and replicates it over groups
            (HSDP).
        shard_ranks: ranks per group in mode `hybrid`.
        tensor: ranks that share each decoder layer (tensor parallelism).
        precision: dtype of the computation; weights, gradient sums and moments are always float32.
        checkpointing: activations to recompute in the backward pass: `full` for all of every block,
            `selective` for all but matrix products, or `none`.
        attention: attention kernel of the decoder; `flex` and `xformers` need a GPU.
        compile: compile each block with `torch.compile`.
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
    """Settings that do not change what a run computes, besides `seed`.

    Attributes:
        out_dir: folder for metrics, resolved recipe, checkpoints and weights.
        seed: RNG seed of weights, data order, scenes and stochastic depth.
        device: `auto` uses a GPU if there is one.
        threads: torch threads per process; 0 divides the machine's cores among its processes.
        workers: threads per process that read data ahead.
        log_every: steps between progress lines.
        eval_every: steps between evaluations; 0 for none.
        save_every: steps between checkpoints; 0 saves only at the end.
        keep: number of checkpoints to keep; 0 keeps all.
        resume: continue from the newest intact checkpoint in `out_dir`, or start if there is none.
        tensorboard: also write TensorBoard events.
        peak_tflops: the device's peak in TFLOP/s at the run's precision; enables the metric `mfu`.
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
    """Initial weights. Parts that are not named start at random.

    Attributes:
        checkpoint: checkpoint of a whole model, as `perception-export --checkpoint` takes it.
        vision: checkpoint of a Perception Encoder, for a language model's vision tower.
        decoder: checkpoint of a language model, for the decoder.
    """

    checkpoint: str | None = None
    vision: str | None = None
    decoder: str | None = None

    def __post_init__(self) -> None:
        require(
            self.checkpoint is None or self.vision is self.decoder is None,
            "init.checkpoint is the whole model; remove init.vision and init.decoder",
        )

    def require_whole(self) -> None:
        """Raises an InputError if parts of a language model are named."""
        require(
            self.vision is self.decoder is None,
            "init.vision and init.decoder are for language models; use init.checkpoint",
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraConfig:
    """Low-rank updates beside frozen linear layers; only the updates are trained.

    Attributes:
        rank: rank of the updates.
        alpha: updates are scaled by alpha / rank.
        targets: ends of layer names, such as `wq` or `projector.0`, and in the vision tower
            `in_proj`, `out_proj`, `c_fc` or `c_proj`; `*` stands for any characters.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: tuple[str, ...] = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")

    def __post_init__(self) -> None:
        require(self.rank >= 1, f"lora.rank must be at least 1, not {self.rank}")
        require(self.alpha > 0, f"lora.alpha must be positive, not {self.alpha}")
        require(len(self.targets) > 0, "lora.targets must name at least one layer")


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderLoraConfig(LoraConfig):
    """Low-rank updates of a Perception Encoder, by default of every matrix in both towers."""

    targets: tuple[str, ...] = ("in_proj", "out_proj", "c_fc", "c_proj")


@dataclass(frozen=True, slots=True, kw_only=True)
class DatasetConfig:
    """One dataset of conversations.

    Attributes:
        annotation: a jsonl file, a directory with `*.jsonl`, or `scenes:SET` for questions about
            synthetic scenes (`training/demo/questions.py`).
        root: folder that image and video paths are relative to; empty for the jsonl file's.
    """

    annotation: str
    root: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class LanguageDataConfig:
    """Conversations about images and videos.

    Attributes:
        datasets: datasets by name.
        mix: sampling weights, `name:weight,name:weight`; normalised to shares of the samples.
        tokenizer: tokenizer file, as `perception-export --tokenizer` takes it.
        conversation: `plm_sft` for the chat format, `warmup` for image tokens and a caption.
        batch_size: sequences per step over all ranks; each rank takes an equal share.
        seq_len: tokens per sequence.
        packing: pack several samples into a sequence; none attends to another.
        mode: how images become tiles.
        max_tiles: most tiles of an image, not counting the thumbnail.
        max_frames: most frames of a video.
        bad_fraction: share of samples that may be unusable before the run stops, from 0 to 1.
        validation: samples per dataset that are kept for evaluation.
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
    """Sections that all recipes have."""

    run: RunConfig
    optim: OptimConfig = OptimConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    parallel: ParallelConfig = ParallelConfig()

    def to_dict(self) -> dict[str, Any]:
        """Returns the resolved recipe as plain values."""
        tree = asdict(self)
        if isinstance(architecture := getattr(self, "model", None), PlmConfig):
            tree["model"] = architecture.to_dict()
        return tree

    def to_yaml(self) -> str:
        """Returns the resolved recipe as YAML."""
        return yaml.safe_dump(_plain(self.to_dict()), sort_keys=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class ContrastiveConfig(TrainConfig):
    """Recipe of a Perception Encoder trained on image-text pairs.

    Attributes:
        model: architecture, with a text tower.
        data: image-text pairs.
        loss: `softmax` over the batch (CLIP), or `sigmoid` of each pair by itself (SigLIP).
        resolutions: image sizes by step, ascending; empty for `model.vision.image_size` throughout.
        init: initial weights.
        lora: train low-rank updates instead.
    """

    task: Literal["contrastive"] = "contrastive"
    model: PeConfig
    data: PairDataConfig = field(default_factory=PairDataConfig)
    loss: Literal["softmax", "sigmoid"] = "softmax"
    resolutions: tuple[ResolutionConfig, ...] = ()
    init: InitConfig = InitConfig()
    lora: EncoderLoraConfig | None = None

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
            self.run.eval_every == 0 or self.data.has_validation,
            "run.eval_every needs a validation split: data.validation of data.dataset digits, else "
            "data.validation_path or data.validation_fraction",
        )
        require(
            self.optim.accumulation == 1,
            "optim.accumulation must be 1: a contrastive loss is of the whole batch at once",
        )

    def image_size(self, step: int) -> int:
        """Returns the side of images in pixels at a step, counted from 0."""
        begun = [entry.size for entry in self.resolutions if entry.step <= step]
        return begun[-1] if begun else self.model.vision.image_size


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillationConfig(TrainConfig):
    """Recipe of a vision tower trained to reproduce a larger one's features; captions are not used.

    Attributes:
        model: the student's architecture, without a text tower.
        teacher: the teacher.
        data: images or videos; every frame is an image.
        loss: weights of the loss terms.
        init: the student's initial weights.
    """

    task: Literal["distill"] = "distill"
    model: PeConfig
    teacher: TeacherConfig
    data: PairDataConfig = field(default_factory=PairDataConfig)
    loss: DistillationLossConfig = field(default_factory=DistillationLossConfig)
    init: InitConfig = InitConfig()

    def __post_init__(self) -> None:
        require(
            self.model.text is None, "distillation trains a vision tower only; remove model.text"
        )
        self.init.require_whole()
        require(self.parallel.tensor == 1, "parallel.tensor is for language models; it must be 1")
        require(
            self.run.eval_every == 0, "run.eval_every must be 0: distillation evaluates nothing"
        )
        require(
            not (self.data.validation_path or self.data.validation_fraction),
            "distillation evaluates nothing; remove data.validation_path and "
            "data.validation_fraction",
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
    """Recipe of a Perception Language Model trained on conversations.

    Attributes:
        model: architecture.
        data: conversations.
        init: initial weights.
        train: `all` parameters, or only the `projector` (stage 1 of the released models).
        lora: train low-rank updates instead.
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
    """Reads a recipe and applies `key.path=value` overrides in order.

    Returns:
        The recipe, an instance of one of the classes in `TASKS`.

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
    """Converts tuples to lists, for YAML."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    return [_plain(entry) for entry in value] if isinstance(value, list | tuple) else value
