"""Training cases for `test_parallel.py`: one tiny model, distributed and computed in many ways.

Ranks are forked, so their code is in a module of its own.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jobs
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from perception_rt.processing.tiles import TileSpec
from training import parallel
from training.data.loader import LaneStream, Read
from training.data.packing import IGNORED, LanguageBatch, Sample, collate
from training.distributed import Group, process_group
from training.model.init import initial_value
from training.recipe.schema import LanguageConfig, load_config
from training.recipe.tree import build
from training.tasks.language import LanguageLearner
from training.tasks.registry import make_task
from training.tasks.task import Learner, Task
from training.trainer import Trainer

LANES, LENGTH, IMAGE_TOKEN, TILE = 8, 40, 300, 16
STEPS = 3
TREE: dict[str, Any] = {
    "task": "language",
    "model": {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320,
        "multiple_of": 32, "max_seqlen": 64, "pooling_ratio": 2, "image_token_id": IMAGE_TOKEN,
        "vision_model": {
            "patch_size": 4, "image_size": TILE, "width": 32, "layers": 2, "heads": 2,
            "mlp_ratio": 2.0, "use_cls_token": True, "pool_type": "none",
        },
    },
    "data": {
        "datasets": {"made": {"annotation": "none"}}, "mix": "made:1", "tokenizer": "none",
        "batch_size": LANES, "seq_len": LENGTH,
    },
    # With a large eps AdamW's step is proportional to the gradient, so rounding errors stay small.
    "optim": {"lr": 0.01, "eps": 1e-3},
    "schedule": {"steps": 100, "warmup": 2},
    "run": {"out_dir": "unused", "threads": 1, "workers": 1, "device": "cpu"},
}  # fmt: skip

PLAIN, LONG = "plain", "twenty steps"
STEPS_OF = {LONG: 20, "replicate": 20, "shard": 20}
CASES: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    LONG: (),
    "four parts": ("optim.accumulation=4",),
    "replicate": (),
    "replicate, two parts": ("optim.accumulation=2",),
    "shard": ("parallel.mode=shard",),
    "shard, two parts": ("parallel.mode=shard", "optim.accumulation=2"),
    "shard, tied": ("parallel.mode=shard", "model.weight_tying=true"),
    "tied": ("model.weight_tying=true",),
    "projector": ("train=projector",),
    "shard, projector": ("parallel.mode=shard", "train=projector"),
    "shard, full": ("parallel.mode=shard", "parallel.checkpointing=full"),
    "full": ("parallel.checkpointing=full",),
    "selective": ("parallel.checkpointing=selective",),
    "bf16": ("parallel.precision=bf16",),
    "shard, bf16": ("parallel.mode=shard", "parallel.precision=bf16"),
    "tensor": ("parallel.tensor=2",),
    "tensor, shard": ("parallel.tensor=2", "parallel.mode=shard"),
    "hybrid": ("parallel.mode=hybrid", "parallel.shard_ranks=2"),
    "hybrid, two parts": (
        "parallel.mode=hybrid", "parallel.shard_ranks=2", "optim.accumulation=2",
    ),
    "compiled": (
        "parallel.compile=true", "parallel.checkpointing=selective", "parallel.mode=shard",
    ),
    "contrastive": (),
    "contrastive, shard": ("parallel.mode=shard",),
}  # fmt: skip


def config_of(case: str, folder: Path) -> Any:
    settings = [f"run.out_dir={folder / 'run'}", *CASES[case]]
    if not case.startswith("contrastive"):
        return build(LanguageConfig, TREE, settings)
    # Every rank draws its own stochastic depth, so it is disabled.
    return load_config(jobs.TINY, [*settings, "optim.eps=1e-3", "model.vision.drop_path=0"])


class MadeSource:
    """Rows of two samples; in the second half of the lanes, every other row is text only."""

    def read(self, lane: int, position: int) -> Read[Sequence[Sample]]:
        rng = np.random.default_rng((lane, position))
        text_only = lane >= LANES // 2 and position % 2 == 0
        row = [self._sample(rng, tiles) for tiles in ((0, 0) if text_only else (1, 2))]
        return Read(row=row, position=position + 1)

    def _sample(self, rng: np.random.Generator, tiles: int) -> Sample:
        text = rng.integers(0, IMAGE_TOKEN, size=int(rng.integers(5, 12)))
        tokens = np.concatenate([np.full(4 * tiles, IMAGE_TOKEN), text])
        labels = np.where(np.arange(len(tokens)) >= 4 * tiles + 2, tokens, IGNORED)
        pixels = rng.integers(0, 256, size=(tiles, TILE, TILE, 3), dtype=np.uint8)
        return Sample(tokens=tokens, labels=labels, tiles=pixels, name=str(rng.integers(99)))


class MadeTask(Task):
    """Trains a tiny language model on random conversations."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config

    def learner(self) -> Learner:
        return LanguageLearner(self.config, TileSpec(tile_size=TILE))

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        return initial_value(name, shape, seed=1, layers=2, gain=None)

    def trainable(self, name: str) -> bool:
        return self.config.train == "all" or name.startswith("vision_projector.")

    def stream(self, group: Group) -> LaneStream[Any, LanguageBatch]:
        return LaneStream(
            MadeSource(),
            lambda rows: collate(rows, LENGTH),
            lanes=LANES,
            parts=self.config.optim.accumulation,
            group=group,
            workers=1,
        )

    def evaluate(self, learner: Learner) -> dict[str, float]:
        raise NotImplementedError

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        raise NotImplementedError


def task_of(config: Any) -> Task:
    return MadeTask(config) if isinstance(config, LanguageConfig) else make_task(config)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(case: str, folder: Path, group: Group, steps: int) -> None:
    """Trains one case; the main rank writes the results under the case's name."""
    config = config_of(case, folder)
    trainer = Trainer(config, task_of(config), group)
    sharded = isinstance(trainer.learner, FSDPModule)
    before = {name: whole(p) for name, p in trainer.model.named_parameters()}
    share = sum(parallel.local_part(p).numel() for p in trainer.model.parameters())
    results = [trainer.step(trainer.stream.next()) for _ in range(steps)]
    figures = {}
    if case.startswith("contrastive"):
        with parallel.unsharded(trainer.learner):
            figures = trainer.task.evaluate(trainer.learner)
    after = {name: whole(p) for name, p in trainer.model.named_parameters()}
    trainer.stream.close()
    trainer.checkpoints.close()
    if group.is_main:
        size = sum(tensor.numel() for tensor in after.values())
        facts = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}
        facts |= {"share": share / size, "sharded": sharded, "figures": figures}
        (folder / f"{case}.json").write_text(json.dumps(facts))
        save_file({k: v.contiguous() for k, v in before.items()}, folder / f"{case}.before")
        save_file({k: v.contiguous() for k, v in after.items()}, folder / f"{case}.after")


class Runs:
    """Results of cases on one number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def facts(self, case: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{case}.json").read_text())
        return found

    def before(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case}.before")

    def after(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case}.after")


def train_all(
    cases: Sequence[str], folder: Path, steps: int | None = None, tensor: int = 1
) -> Runs:
    """Trains cases on this rank and its group.

    Args:
        cases: names of cases.
        folder: folder for the results.
        steps: number of steps; None for the case's own.
        tensor: ranks that share each layer.
    """
    with process_group("cpu", tensor) as group:
        for case in cases:
            train(case, folder, group, steps or STEPS_OF.get(case, STEPS))
    return Runs(folder)


def train_on_ranks(
    ranks: int, cases: Sequence[str], folder: Path, steps: int | None = None
) -> Runs:
    """Trains cases on forked ranks; tensor parallel ones in a job of their own."""
    for tensor in (1, 2):
        some = [case for case in cases if case.startswith("tensor") == (tensor == 2)]
        arguments = (some, folder, steps, tensor)
        job = jobs.fork(train_all, [arguments] * ranks if some else [], folder / f"job_{tensor}")
        assert set(job.wait(300)) <= {0}, job.stderr()
    return Runs(folder)
