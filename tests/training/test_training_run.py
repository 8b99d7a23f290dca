"""A run learns, resumes to the same bits, gives the same on two ranks, and leaves good files."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from perception_rt.errors import CheckpointError, InputError, PerceptionError
from training.config import TrainConfig
from training.data import DigitStream
from training.digits import training_digits
from training.distributed import Group
from training.evaluation import evaluate
from training.losses import contrastive_loss
from training.metrics import MetricsLog
from training.optim import build_optimizer, decays, learning_rate, set_learning_rate
from training.state import load_weights
from training.train import main
from training.trainer import StepResult, Trainer

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., TrainConfig]


def train(config: TrainConfig) -> dict[str, torch.Tensor]:
    Trainer(config, Group()).run()
    return load_file(Path(config.run.out_dir) / "model.safetensors")


def events(config: TrainConfig, kind: str = "train") -> list[dict[str, float]]:
    lines = (Path(config.run.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event.pop("kind") == kind]


def test_the_tiny_recipe_learns(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("run.eval_every=10")
    train(config)
    losses = [event["loss"] for event in events(config)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [event["step"] for event in events(config, "eval")] == [10, 20]
    assert set(events(config, "eval")[0]) == {"step", "plain", "scene", "ink"}
    assert capsys.readouterr().out.count("train step") == 20


def test_an_interrupted_run_resumes_to_the_same_bits(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tiny(f"run.out_dir={tmp_path / 'whole'}")
    expected = train(whole)
    step = Trainer.step

    def interrupted(self: Trainer) -> StepResult:
        if self.done == 13:
            raise KeyboardInterrupt
        return step(self)

    parts = tiny("run.save_every=10")
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Trainer, "step", interrupted)
        train(parts)
    resumed = train(tiny("run.save_every=10", "run.resume=true"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    clock = "images_per_s"
    for event in (both := (events(parts), events(whole)))[0] + both[1]:
        del event[clock]
    assert both[0] == both[1]


def test_a_finished_run_is_not_overwritten(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("schedule.steps=2")
    train(config)
    recipe = Path(config.run.out_dir) / "recipe.yaml"
    assert main([str(recipe)]) == 2
    assert "holds a run" in capsys.readouterr().err
    assert main([str(recipe), "--set", "run.resume=true"]) == 0


def test_a_state_of_another_run_is_refused(tiny: Tiny) -> None:
    config = tiny("schedule.steps=2", "run.save_every=1")
    train(config)
    for override, message in (
        ("optim.lr=0.5", "optim.lr = 0.003, not 0.5"),
        ("model.text.width=32", "model.text.width = 16, not 32"),
        ("run.seed=1", "run.seed = 0, not 1"),
    ):
        wanted = tiny("schedule.steps=2", "run.save_every=1", "run.resume=true", override)
        with pytest.raises(CheckpointError, match=message):
            Trainer(wanted, Group())


def test_a_damaged_state_is_an_error_without_traceback(tiny: Tiny) -> None:
    config = tiny("schedule.steps=2", "run.save_every=1", "run.resume=true")
    train(config)
    state = Path(config.run.out_dir) / "state.pt"
    whole = state.read_bytes()
    for content in (b"", b"junk", whole[: len(whole) // 2]):
        state.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"state\.pt is damaged"):
            Trainer(config, Group())


def test_two_ranks_give_the_loss_and_gradient_of_one(tiny: Tiny, tmp_path: Path) -> None:
    # AdamW's first step moves a weight by g / (|g| + 1) with these settings, so the difference
    # that one step makes to the weights shows the gradient.
    settings = [
        "schedule.steps=1", "schedule.warmup=0", "optim.lr=1", "optim.eps=1", "optim.clip=1e9",
        "optim.weight_decay=0", "model.vision.drop_path=0",
    ]  # fmt: skip
    one = tiny(*settings)
    start = {k: v.clone() for k, v in Trainer(one, Group()).model.state_dict().items()}
    alone = train(one)
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone",
        "--nproc-per-node", "2", "training/train.py", "training/configs/pe_tiny.yaml",
    ]  # fmt: skip
    both = tiny(*settings, f"run.out_dir={tmp_path / 'both'}")
    for setting in [*settings, f"run.out_dir={both.run.out_dir}"]:
        command += ["--set", setting]
    subprocess.run(command, cwd=ROOT, env=script_environment(), check=True, timeout=120)
    together = load_file(Path(both.run.out_dir) / "model.safetensors")
    for name, before in start.items():
        stored = name.removeprefix("text.")
        expected, found = alone[stored] - before, together[stored] - before
        # One unit in the last place of a weight, besides the relative bound.
        rounding = 1e-7 * before.norm() + 1e-9
        assert (found - expected).norm() <= 1e-5 * expected.norm() + rounding, name
    (single,), (double,) = events(one), events(both)
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)


def script_environment() -> dict[str, str]:
    """As after `pip install -e .`: the repository root is importable."""
    return {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_without_an_install_the_script_says_what_to_do() -> None:
    # -I -S: an interpreter that sees the standard library only.
    command = [sys.executable, "-I", "-S", "training/train.py", "x.yaml"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: no module ")
    assert 'run `pip install -e ".[train]"` first' in found.stderr
    assert found.stderr.count("\n") == 1


def test_a_loss_that_is_not_finite_stops_the_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("schedule.steps=5")
    trainer = Trainer(config, Group())
    trainer.step()
    with torch.no_grad():
        trainer.model.visual.proj.fill_(float("nan"))
    before = trainer.model.text.text_projection.clone()
    with pytest.raises(PerceptionError, match="step 2: the loss is nan"):
        trainer.step()
    assert torch.equal(trainer.model.text.text_projection, before)
    monkeypatch.setattr("training.trainer.contrastive_loss", lambda *_: torch.tensor(float("inf")))
    recipe = Path(config.run.out_dir).with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    assert main([str(recipe)]) == 1
    assert capsys.readouterr().err == "error: step 1: the loss is inf; training stopped\n"


def test_a_gradient_that_is_not_finite_changes_no_weight(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = Trainer(tiny(), Group())
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    # A finite loss whose gradient is infinite: the root of zero.
    monkeypatch.setattr(
        "training.trainer.contrastive_loss", lambda image, *_: (image * 0).sum().sqrt()
    )
    with pytest.raises(PerceptionError, match="step 1: the gradient norm is nan"):
        trainer.step()
    after = trainer.model.state_dict()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_the_loss_is_the_mean_of_both_directions() -> None:
    rows = torch.eye(3, 4)
    text = rows[[0, 1, 1]]  # row 2's caption is row 1's
    image_way = -torch.log_softmax(torch.tensor([[2.0, 0, 0], [0, 2, 2], [0, 0, 0]]), 1).diag()
    text_way = -torch.log_softmax(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0]]), 1).diag()
    expected = (image_way.mean() + text_way.mean()) / 2
    found = contrastive_loss(rows, text, torch.tensor(2.0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_batches_do_not_depend_on_the_number_of_ranks(tiny: Tiny) -> None:
    config = tiny()
    stream = DigitStream(config.data, config.model, seed=3)
    whole = stream.batch(4, rank=0, ranks=1)
    halves = [stream.batch(4, rank=rank, ranks=2) for rank in (0, 1)]
    assert torch.equal(whole.pixels, torch.cat([half.pixels for half in halves]))
    other = DigitStream(config.data, config.model, seed=4).batch(4, rank=0, ranks=1)
    assert not torch.equal(whole.pixels, other.pixels)
    with pytest.raises(InputError, match="32 is not divisible by 3"):
        Trainer(config, Group(ranks=3))


def test_exported_names_and_architecture_are_the_references(tiny: Tiny) -> None:
    golden = load_file(ROOT / "tests" / "golden" / "clip_core.safetensors")
    prefix = "weights."
    reference = {name.removeprefix(prefix) for name in golden if name.startswith(prefix)}
    # The golden model has the same depth and options as the tiny recipe.
    config = tiny("schedule.steps=1", "schedule.warmup=0", "model.text.layers=2")
    assert set(train(config)) == reference
    architecture = json.loads((Path(config.run.out_dir) / "model.json").read_text())
    assert architecture == config.model.to_dict()


def test_exported_weights_load_as_the_trained_model(tiny: Tiny) -> None:
    config = tiny("schedule.steps=2")
    trainer = Trainer(config, Group())
    trainer.run()
    loaded = load_weights(Path(config.run.out_dir) / "model.safetensors")
    assert not loaded.training
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    part = training_digits().part(slice(0, 64))
    assert evaluate(trainer.model, part) == evaluate(loaded, part)
    assert trainer.model.training


def test_weight_decay_spares_vectors_and_scalars(tiny: Tiny) -> None:
    model = Trainer(tiny("model.vision.ls_init_value=0.1"), Group()).model
    spared = {name for name, parameter in model.named_parameters() if not decays(parameter)}
    assert "logit_scale" in spared
    for leaf in ("bias", "gamma", "ln_1.weight", "ln_post.weight"):
        assert any(name.endswith(leaf) for name in spared)
    assert not any(name.endswith(("c_fc.weight", "in_proj_weight")) for name in spared)
    optimizer = build_optimizer(
        model, tiny("optim.weight_decay=0.3", "optim.text_lr_scale=0.5").optim
    )
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0] * 2
    set_learning_rate(optimizer, 2.0)
    assert [group["lr"] for group in optimizer.param_groups] == [2.0, 2.0, 1.0, 1.0]


def test_learning_rate_warms_up_and_falls_along_a_cosine(tiny: Tiny) -> None:
    schedule = tiny("schedule.steps=110", "schedule.warmup=10").schedule
    rates = [learning_rate(step, 2.0, schedule) for step in range(110)]
    assert rates[0] == pytest.approx(0.2)
    assert rates[9] == rates[10] == 2.0
    assert rates[60] == pytest.approx(2.0 * (0.01 + 0.99 / 2))
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(0.02, rel=0.05)


def test_metrics_after_the_resumed_step_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with (tmp_path / "screen").open("w") as screen:
        log = MetricsLog(path, step=0, screen=screen)
        for step in (1, 2, 3):
            log.write("train", step, {"loss": 1.0})
        MetricsLog(path, step=2, screen=screen)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]
