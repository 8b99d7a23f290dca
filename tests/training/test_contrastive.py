"""Contrastive and sigmoid loss by their formulas, on one and two ranks; resolutions; videos."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jobs
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from perception_rt.archs import get_config
from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.errors import InputError
from perception_rt.models.pe import PerceptionEncoder
from training import parallel
from training.data.pair_batch import Pair, collate_pairs, pool_frames
from training.distributed import Group, process_group
from training.recipe.schema import ContrastiveConfig, load_config
from training.tasks.contrastive import ContrastiveLearner, ContrastiveTask, SigmoidEncoder
from training.tasks.losses import contrastive_loss, sigmoid_loss
from training.trainer import Trainer

TINY = Path(__file__).parents[2] / "training" / "configs" / "pe_tiny.yaml"

Tiny = Callable[..., ContrastiveConfig]
Outcome = tuple[float, list[Tensor]]


def parameters() -> list[Tensor]:
    """Returns image rows, text rows, scale and bias, before normalisation."""
    generator = torch.Generator().manual_seed(0)
    image, text = torch.randn(2, 6, 5, generator=generator, dtype=torch.float64).float()
    return [image, text, torch.tensor(3.0), torch.tensor(-2.0)]


def loss_of(name: str, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    image, text = (torch.nn.functional.normalize(rows, dim=-1) for rows in (image, text))
    if name == "softmax":
        return contrastive_loss(image, text, scale) + 0 * bias
    return sigmoid_loss(image, text, scale, bias)


def outcome(name: str, rank: int, ranks: int) -> Outcome:
    """Returns loss and gradients of this rank's rows, averaged over ranks."""
    values = [value.requires_grad_() for value in parameters()]
    share = 6 // ranks
    rows = [value[rank * share : (rank + 1) * share] for value in values[:2]]
    loss = loss_of(name, *rows, *values[2:])
    loss.backward()
    found = [loss.detach(), *[value.grad for value in values if value.grad is not None]]
    for tensor in found:
        if ranks > 1:
            dist.all_reduce(tensor)
        tensor /= ranks
    return found[0].item(), found[1:]


def on_rank(folder: Path) -> None:
    with process_group("cpu") as group:
        found = {name: outcome(name, group.rank, 2) for name in ("softmax", "sigmoid")}
    if group.is_main:
        torch.save(found, folder / "found.pt")


def test_two_ranks_give_the_loss_and_gradient_of_one(tmp_path: Path) -> None:
    job = jobs.fork(on_rank, [(tmp_path,)] * 2, tmp_path / "job")
    assert job.wait() == [0, 0], job.stderr()
    together = torch.load(tmp_path / "found.pt")
    for name, (loss, gradients) in together.items():
        expected_loss, expected = outcome(name, 0, 1)
        assert loss == pytest.approx(expected_loss, rel=1e-6), name
        for found, alone in zip(gradients, expected, strict=True):
            assert torch.allclose(found, alone, rtol=1e-5, atol=1e-7), name


def test_the_sigmoid_loss_is_that_of_every_pair() -> None:
    image, text, scale, bias = parameters()
    expected = 0.0
    for i in range(6):
        for j in range(6):
            cosine = torch.nn.functional.cosine_similarity(image[i], text[j], dim=0).item()
            sign = 1 if i == j else -1
            expected += math.log1p(math.exp(-sign * (scale.item() * cosine + bias.item()))) / 6
    assert loss_of("sigmoid", image, text, scale, bias).item() == pytest.approx(expected, rel=1e-6)


def test_losses_are_float32_where_the_rest_is_not() -> None:
    image, text, scale, bias = parameters()
    with torch.autocast("cpu", torch.bfloat16):
        for name in ("softmax", "sigmoid"):
            inside = loss_of(name, image, text, scale, bias)
            assert inside.dtype == torch.float32
    assert inside.item() == pytest.approx(loss_of(name, image, text, scale, bias).item(), rel=1e-6)


def train(config: ContrastiveConfig) -> tuple[Trainer, list[float]]:
    """Runs all steps, without metrics and export."""
    with process_group("cpu") as group:
        trainer = Trainer(config, ContrastiveTask(config), group)
        losses = [trainer.step(trainer.stream.next()).loss for _ in range(config.schedule.steps)]
        trainer.stream.close()
        trainer.checkpoints.close()
    return trainer, losses


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_the_tiny_recipe_learns(tiny: Tiny, loss: str) -> None:
    _, losses = train(tiny(f"loss={loss}"))
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])


def test_the_sigmoid_loss_has_its_own_start_and_leaves_no_bias(tiny: Tiny, tmp_path: Path) -> None:
    config = tiny("loss=sigmoid", "schedule.steps=2")
    task = ContrastiveTask(config)
    assert task.initial("logit_bias", torch.Size()) == -10.0
    assert task.initial("logit_scale", torch.Size()).item() == pytest.approx(math.log(10))
    trainer, _ = train(config)
    assert isinstance(trainer.model, SigmoidEncoder)
    assert trainer.model.logit_bias != -10.0
    task.export(trainer.model.state_dict(), tmp_path)
    file = tmp_path / "model.safetensors"
    source = open_checkpoint(file, config.model)
    assert torch.equal(source.load("logit_scale"), trainer.model.logit_scale)
    # Weights come from the checkpoint, but scale and bias start anew.
    task = ContrastiveTask(tiny("loss=sigmoid", f"init.checkpoint={file}"))
    projection = trainer.model.state_dict()["visual.proj"]
    assert torch.equal(task.initial("visual.proj", projection.shape), projection)
    assert task.initial("logit_bias", torch.Size()) == -10.0


STEPS = ((0, 16), (3, 24), (5, 32))


@pytest.fixture
def growing(tiny: Tiny, tmp_path: Path) -> Tiny:
    """The tiny recipe with growing resolutions."""

    def build(*overrides: str, steps: Any = STEPS) -> ContrastiveConfig:
        text = tiny(*overrides).to_yaml().replace("resolutions: []\n", "")
        entries = ", ".join(f"{{step: {step}, size: {size}}}" for step, size in steps)
        recipe = tmp_path / "growing.yaml"
        recipe.write_text(f"{text}resolutions: [{entries}]\n")
        config = load_config(recipe)
        assert isinstance(config, ContrastiveConfig)
        return config

    return build


def test_images_grow_with_the_step(growing: Tiny) -> None:
    config = growing()
    assert [config.image_size(step) for step in (0, 2, 3, 4, 5, 99)] == [16, 16, 24, 24, 32, 32]
    stream = ContrastiveTask(config).stream(Group())
    sizes = [stream.next()[0].pixels.shape[-1] for _ in range(6)]
    stream.close()
    assert sizes == [16, 16, 16, 24, 24, 32]


def test_a_model_trains_through_a_change_of_resolution(growing: Tiny) -> None:
    trainer, losses = train(growing("schedule.steps=12", "optim.lr=0.01"))
    assert all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert trainer.model.get_parameter("visual.positional_embedding").shape == (5, 32)


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        ([(1, 16)], r"must start at 0 and ascend, not \[1\]"),
        ([(0, 16), (0, 24)], r"must start at 0 and ascend, not \[0, 0\]"),
        ([(0, 20)], "size 20 is not a multiple of the patch size 8"),
        ([(0, 0)], "size 0 is not a multiple"),
    ],
)
def test_wrong_resolutions_are_refused(growing: Tiny, steps: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        growing(steps=steps)


def test_wrong_settings_are_refused(tiny: Tiny) -> None:
    for settings, message in (
        (("run.eval_every=1", "data.dataset=jsonl", "data.path=x"), r"run\.eval_every needs"),
        (("run.eval_every=1", "data.validation=0"), r"run\.eval_every needs"),
        (("parallel.tensor=2",), r"parallel\.tensor"),
        (("optim.accumulation=2",), r"optim\.accumulation must be 1"),
        (("data.crop_min=0",), r"data\.crop_min"),
        (("data.frames=0",), r"data\.frames"),
        (("init.vision=x",), r"use init\.checkpoint"),
        (("loss=hinge",), "loss must be one of"),
    ):
        with pytest.raises(InputError, match=message):
            tiny(*settings)


def encoder(config: ContrastiveConfig) -> PerceptionEncoder:
    task = ContrastiveTask(config)
    model = PerceptionEncoder(config.model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(task.initial(name, parameter.shape))
    return model.eval()


def test_a_video_is_the_mean_of_its_frames_as_the_runtime_takes_it(tiny: Tiny) -> None:
    model = encoder(tiny())
    rows = []
    for index, frames in enumerate((3, 1, 3)):
        pixels = torch.randint(0, 256, (frames, 16, 16, 3), dtype=torch.uint8).numpy()
        tokens = torch.tensor([49406, 320 + index, 49407, 0])
        rows.append(Pair(views=(pixels,), tokens=tokens, name=str(index)))
    batch = collate_pairs(rows)
    videos = batch.pixels[[0, 1, 2, 4, 5, 6]].unflatten(0, (2, 3))
    pooled = pool_frames(model.encode_image(batch.pixels, normalize=True), batch.frames)
    assert torch.allclose(pooled[[0, 2]], model.encode_video(videos, normalize=True), atol=1e-6)
    image = model.encode_image(batch.pixels[3:4], normalize=True)
    assert torch.allclose(pooled[1:2], image, atol=1e-6)
    text = model.encode_text(batch.tokens, normalize=True)
    expected = 3 * contrastive_loss(pooled, text, model.logit_scale.exp())
    assert torch.allclose(ContrastiveLearner(model)(batch), expected)


def test_bfloat16_trains_and_is_evaluated(tiny: Tiny) -> None:
    settings = ("model.vision.drop_path=0", "data.validation=4", "schedule.steps=4")
    config = tiny("parallel.precision=bf16", *settings)
    task = ContrastiveTask(config)
    with process_group("cpu") as group:
        trainer = Trainer(config, task, group)
        losses = [trainer.step(trainer.stream.next()).loss for _ in range(4)]
        with parallel.unsharded(trainer.learner):
            figures = task.evaluate(trainer.learner)
        trainer.stream.close()
        trainer.checkpoints.close()
    _, exact = train(tiny(*settings))
    assert losses == pytest.approx(exact, rel=0.02)
    assert set(figures) == {"plain", "scene", "ink"}


def test_the_released_architecture_has_a_recipe() -> None:
    config = load_config(TINY.with_name("pe_core_b16.yaml"))
    assert isinstance(config, ContrastiveConfig)
    assert config.model == get_config("PE-Core-B16-224")
    assert [entry.size for entry in config.resolutions] == [96, 160, 224]
    with pytest.raises(InputError, match=r"pairs-00000\.tar' is not a file"):
        ContrastiveTask(config).stream(Group())
