"""A student approaches its teacher, which stays unchanged and is not saved."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from perception_rt.checkpoint.source import open_checkpoint, state_dict
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError, InputError
from perception_rt.models.pe import PerceptionEncoder
from training.data.pair_batch import Pair, collate_pairs
from training.distributed import Group, process_group
from training.model.init import initial_value
from training.recipe.schema import DistillationConfig, load_config
from training.tasks.distillation import DistillationTask, cosines, load_teacher, see
from training.trainer import Trainer

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
Build = Callable[..., DistillationConfig]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """The tiny recipe with a random teacher."""

    def made(*overrides: str) -> DistillationConfig:
        file = tmp_path / "teacher.safetensors"
        settings = [f"run.out_dir={tmp_path / 'run'}", f"teacher.checkpoint={file}"]
        settings += ["data.batch_size=16", "schedule.steps=20", "optim.lr=0.006", *overrides]
        config = load_config(CONFIGS / "pe_distill_tiny.yaml", settings)
        assert isinstance(config, DistillationConfig)
        model = PerceptionEncoder(config.teacher.model)
        shapes = {name: p.shape for name, p in model.named_parameters()}
        weights = {
            n: initial_value(n, shape, seed=5, layers=2, gain=None) for n, shape in shapes.items()
        }
        save_checkpoint(weights, file)
        return config

    return made


def train(config: DistillationConfig) -> tuple[Trainer, DistillationTask, list[float]]:
    task = DistillationTask(config)
    with process_group("cpu") as group:
        trainer = Trainer(config, task, group)
        losses = [trainer.step(trainer.stream.next()).loss for _ in range(config.schedule.steps)]
        trainer.stream.close()
        trainer.checkpoints.close()
    return trainer, task, losses


PARTS = {
    "embedding": ("loss.tokens=0", "loss.pairwise=0"),
    "embedding of another width": ("loss.tokens=0", "loss.pairwise=0", "model.vision.output_dim=8"),
    "tokens": ("loss.embedding=0", "loss.pairwise=0"),
    "pairwise": ("loss.embedding=0", "loss.tokens=0"),
    "spatial": (
        "loss.embedding=0",
        *[
            f"{model}.vision.{setting}"
            for model in ("model", "teacher.model")
            for setting in ("pool_type=none", "use_ln_post=false", "output_dim=null")
        ],
    ),
    "in bfloat16": ("teacher.precision=bf16", "parallel.precision=bf16"),
    "in two parts": ("optim.accumulation=2",),
}


@pytest.mark.parametrize("case", PARTS)
def test_a_student_comes_nearer_to_its_teacher(build: Build, case: str) -> None:
    config = build(*PARTS[case])
    trainer, task, losses = train(config)
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    stored = load_teacher(config.teacher).state_dict()
    for name, weight in task.teacher.state_dict().items():
        assert torch.equal(weight, stored[name]), name
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())
    student = dict(trainer.model.named_parameters())
    assert not any(p is q for p in task.teacher.parameters() for q in trainer.learner.parameters())
    assert any(name.startswith("visual.") for name in student)


def test_accumulation_changes_nothing(build: Build) -> None:
    """TRN-10."""
    whole = train(build("schedule.steps=5"))[2]
    parts = train(build("schedule.steps=5", "optim.accumulation=4"))[2]
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_distilled_student_is_a_checkpoint_like_any_other(build: Build, tmp_path: Path) -> None:
    config = build("schedule.steps=3", "model.vision.output_dim=8")
    task = DistillationTask(config)
    with process_group("cpu") as group:
        trainer = Trainer(config, task, group)
        trainer.run()
    names = dict(trainer.model.named_parameters())
    assert {"embedding_head.weight", "token_head.weight"} < set(names)
    source = open_checkpoint(Path(config.run.out_dir) / "model.safetensors", config.model)
    student = PerceptionEncoder(config.model)
    student.load_state_dict(state_dict(source, student.state_dict()))
    for name, weight in student.named_parameters():
        assert torch.equal(weight, names[name]), name
    assert student.encode_image(torch.zeros(1, 3, 16, 16)).shape == (1, 8)
    # A checkpoint contains the heads, but nothing of the teacher.
    resumed = build("run.resume=true", "schedule.steps=3", "model.vision.output_dim=8")
    with process_group("cpu") as group:
        again = Trainer(resumed, DistillationTask(resumed), group)
        again.stream.close()
        again.checkpoints.close()
    assert again.done == 3
    assert torch.equal(again.model.get_parameter("token_head.weight"), names["token_head.weight"])


def test_the_loss_is_what_it_says(build: Build) -> None:
    config = build("loss.embedding=2", "loss.tokens=3", "loss.pairwise=5", "model.vision.width=32")
    task = DistillationTask(config)
    learner = task.learner()
    with torch.no_grad():
        for name, parameter in learner.model.named_parameters():
            parameter.copy_(task.initial(name, parameter.shape))
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8).numpy()
    empty = torch.zeros(0, dtype=torch.int64)
    rows = [Pair(views=(images[i : i + n],), tokens=empty, name="") for i, n in ((0, 1), (1, 2))]
    batch = collate_pairs(rows)
    assert batch.tokens.shape == (2, 0)

    def cosine(a: Tensor, b: Tensor) -> float:
        return float(torch.nn.functional.cosine_similarity(a, b, dim=0).detach())

    losses = []
    for pixels in batch.pixels[:, None]:
        (own, patches), (goal, goals) = (
            see(tower, pixels, pooled=True) for tower in (learner.model.visual, task.teacher.visual)
        )
        loss = 2 * (1 - cosine(own[0], goal[0]))
        loss += 3 * sum(1 - cosine(patches[0, i], goals[0, i]) for i in range(4)) / 4
        for i in range(4):
            for j in range(4):
                apart = cosine(patches[0, i], patches[0, j]) - cosine(goals[0, i], goals[0, j])
                loss += 5 * apart**2 / 16
        losses.append(loss)
    expected = losses[0] + (losses[1] + losses[2]) / 2  # a video's loss is its frames' mean
    assert learner(batch).item() == pytest.approx(expected, rel=1e-5)
    assert cosines(torch.ones(1, 2, 3)).tolist() == [[pytest.approx([1, 1])] * 2]


def test_the_teacher_sees_images_at_its_own_size(build: Build) -> None:
    config = build("model.vision.image_size=32", "model.vision.patch_size=16", "schedule.steps=2")
    stream = DistillationTask(config).stream(Group())
    batch = stream.next()[0]
    stream.close()
    assert batch.pixels.shape[2:] == (32, 32)
    assert [pixels.shape[2:] for pixels in batch.others] == [(16, 16)]
    small = torch.nn.functional.interpolate(batch.pixels, size=(16, 16), mode="area")
    assert (small - batch.others[0]).abs().mean() < 0.1  # the same images
    train(config)


def test_wrong_settings_are_refused(build: Build) -> None:
    for settings, message in (
        (("loss.embedding=0", "loss.tokens=0", "loss.pairwise=0"), "nor all 0"),
        (("loss.tokens=-1",), "must not be negative"),
        (("model.vision.pool_type=none", "model.vision.output_dim=null"), r"loss\.embedding needs"),
        (("model.vision.image_size=32",), "equal patch grids, not 4 and 2"),
        (("init.vision=x",), r"use init\.checkpoint"),
        (("run.eval_every=1",), r"run\.eval_every must be 0"),
        (("parallel.tensor=2",), r"parallel\.tensor"),
    ):
        with pytest.raises(InputError, match=message):
            build(*settings)
    with pytest.raises(CheckpointError, match="does not fit the architecture"):
        wrong = build()
        vision = replace(wrong.teacher.model.vision, width=64)
        load_teacher(replace(wrong.teacher, model=PeConfig(vision=vision)))
