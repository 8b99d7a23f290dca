"""A run learns, is reproducible, gives the same result on two ranks, and exports good files."""

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import jobs
import pytest
import torch
from safetensors.torch import load_file

from perception_rt.errors import InputError, PerceptionError
from training.data.pair_batch import PairBatch
from training.demo.digits import training_digits
from training.demo.zero_shot import evaluate
from training.distributed import Group, process_group
from training.metrics import CLOCK, MetricsLog
from training.model.export import load_weights
from training.optim import build_optimizer, decays, learning_rate, set_learning_rate
from training.recipe.schema import TrainConfig, load_config
from training.tasks.contrastive import ContrastiveLearner
from training.tasks.losses import contrastive_loss
from training.tasks.registry import make_task
from training.train import main
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
Tiny = Callable[..., TrainConfig]


@contextmanager
def trainer_of(config: TrainConfig) -> Iterator[Trainer]:
    with process_group("cpu") as group:
        trainer = Trainer(config, make_task(config), group)
        yield trainer
        trainer.stream.close()


def train(config: TrainConfig) -> dict[str, torch.Tensor]:
    with trainer_of(config) as trainer:
        trainer.run()
    return load_file(Path(config.run.out_dir) / "model.safetensors")


def events(config: TrainConfig, kind: str = "train") -> list[dict[str, float]]:
    lines = (Path(config.run.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event.pop("kind") == kind]


def without_clock(found: list[dict[str, float]]) -> list[dict[str, float]]:
    return [
        {k: v for k, v in event.items() if k not in CLOCK and not k.endswith("_per_s")}
        for event in found
    ]


def test_the_tiny_recipe_learns(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny("run.eval_every=10")
    train(config)
    losses = [event["loss"] for event in events(config)]
    assert len(losses) == 20
    assert sum(losses[-5:]) < 0.9 * sum(losses[:5])
    assert [event["step"] for event in events(config, "eval")] == [10, 20]
    assert set(events(config, "eval")[0]) == {"step", "plain", "scene", "ink"}
    assert capsys.readouterr().out.count("train step") == 20


def test_trn_08_the_resolved_recipe_gives_the_same_run_again(tiny: Tiny, tmp_path: Path) -> None:
    settings = ("optim.lr=0.002", "schedule.steps=6", "run.eval_every=3")
    config = tiny(*settings)
    expected = train(config)
    again = tmp_path / "again"
    recipe = Path(config.run.out_dir) / "recipe.yaml"
    assert main([str(recipe), "--set", f"run.out_dir={again}"]) == 0
    found = load_file(again / "model.safetensors")
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    repeated = load_config(again / "recipe.yaml")
    assert repeated == tiny(*settings, f"run.out_dir={again}")
    for kind in ("train", "eval"):
        assert without_clock(events(repeated, kind)) == without_clock(events(config, kind))


def test_two_ranks_give_the_loss_and_gradient_of_one(tiny: Tiny, tmp_path: Path) -> None:
    # With these settings AdamW's first step moves a weight by g / (|g| + 1), so the change of the
    # weights shows the gradient.
    settings = [
        "schedule.steps=1", "schedule.warmup=0", "optim.lr=1", "optim.eps=1", "optim.clip=1e9",
        "optim.weight_decay=0", "model.vision.drop_path=0",
    ]  # fmt: skip
    one = tiny(*settings)
    with trainer_of(one) as trainer:
        start = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    alone = train(one)
    both = tiny(*settings, f"run.out_dir={tmp_path / 'both'}")
    jobs.finish(Path(both.run.out_dir), *settings, ranks=2)
    together = load_file(Path(both.run.out_dir) / "model.safetensors")
    for name, before in start.items():
        stored = name.removeprefix("text.")
        expected, found = alone[stored] - before, together[stored] - before
        # The relative bound, plus the rounding of the weights themselves.
        rounding = 1e-7 * before.norm() + 1e-9
        assert (found - expected).norm() <= 1e-5 * expected.norm() + rounding, name
    (single,), (double,) = events(one), events(both)
    assert double["loss"] == pytest.approx(single["loss"], rel=1e-5)
    assert double["grad_norm"] == pytest.approx(single["grad_norm"], rel=1e-5)


def test_without_an_install_the_script_says_what_to_do() -> None:
    # -I -S: the interpreter finds only the standard library.
    command = [sys.executable, "-I", "-S", "training/train.py", "x.yaml"]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 2
    assert found.stderr.startswith("error: no module ")
    assert 'run `pip install -e ".[train]"` first' in found.stderr
    assert found.stderr.count("\n") == 1


def test_trn_07_a_loss_that_is_not_finite_stops_the_run(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("schedule.steps=5")
    with trainer_of(config) as trainer:
        trainer.step(trainer.stream.next())
        with torch.no_grad():
            trainer.model.visual.proj.fill_(float("nan"))
        before = trainer.model.text.text_projection.clone()
        with pytest.raises(PerceptionError, match="step 2: the loss is nan"):
            trainer.step(trainer.stream.next())
        assert torch.equal(trainer.model.text.text_projection, before)
    failed = json.loads((Path(config.run.out_dir) / "failed_step_2_rank_0.json").read_text())
    assert failed == {"step": 2, "loss": "nan", "samples": [str(n) for n in range(32, 64)]}
    monkeypatch.setattr(ContrastiveLearner, "forward", lambda self, _: endless(self))
    recipe = Path(config.run.out_dir).with_suffix(".yaml")
    recipe.write_text(config.to_yaml())
    assert main([str(recipe)]) == 1
    assert capsys.readouterr().err == (
        "error: step 1: the loss is inf; training stopped, "
        "its samples are in failed_step_1_rank_0.json\n"
    )


def endless(learner: ContrastiveLearner) -> torch.Tensor:
    return learner.model.visual.proj.sum() * float("inf")


def test_trn_07_a_gradient_that_is_not_finite_changes_no_weight(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    with trainer_of(tiny()) as trainer:
        before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
        # The square root of zero is finite, but its gradient is not.
        monkeypatch.setattr(
            ContrastiveLearner, "forward", lambda self, _: (self.model.visual.proj * 0).sum().sqrt()
        )
        with pytest.raises(PerceptionError, match="step 1: the gradient norm is nan"):
            trainer.step(trainer.stream.next())
        after = trainer.model.state_dict()
        assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_trn_07_a_gradient_above_the_limit_stops_within_its_step(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = ("schedule.steps=4", "optim.stop_above=100", "run.save_every=1")
    config = tiny(*settings)
    forward = ContrastiveLearner.forward

    def spiky(self: ContrastiveLearner, micro: PairBatch) -> torch.Tensor:
        return forward(self, micro) * (1000 if micro.names[0] == "64" else 1)

    with monkeypatch.context() as patch, pytest.raises(PerceptionError) as caught:
        patch.setattr(ContrastiveLearner, "forward", spiky)
        train(config)
    message = str(caught.value)
    assert message.startswith("step 3: the gradient norm is ")
    assert message.endswith(
        ", above optim.stop_above 100.0; training stopped, "
        "its samples are in failed_step_3_rank_0.json"
    )
    # The earlier steps are saved, and the failed one changed nothing.
    resumed = train(tiny(*settings, "run.resume=true"))
    expected = train(tiny("schedule.steps=4", f"run.out_dir={tmp_path / 'free'}"))
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)


def test_the_loss_is_the_mean_of_both_directions() -> None:
    rows = torch.eye(3, 4)
    text = rows[[0, 1, 1]]  # rows 1 and 2 have equal captions
    image_way = -torch.log_softmax(torch.tensor([[2.0, 0, 0], [0, 2, 2], [0, 0, 0]]), 1).diag()
    text_way = -torch.log_softmax(torch.tensor([[2.0, 0, 0], [0, 2, 0], [0, 2, 0]]), 1).diag()
    expected = (image_way.mean() + text_way.mean()) / 2
    found = contrastive_loss(rows, text, torch.tensor(2.0))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)


def test_batches_do_not_depend_on_the_number_of_ranks(tiny: Tiny) -> None:
    config = tiny()
    task = make_task(config)

    def third(group: Group) -> PairBatch:
        stream = task.stream(group)
        *_, (batch,) = (stream.next() for _ in range(3))
        stream.close()
        return batch

    whole = third(Group())
    halves = [third(Group(rank=rank, ranks=2)) for rank in (0, 1)]
    assert torch.equal(whole.pixels, torch.cat([half.pixels for half in halves]))
    assert whole.names == halves[0].names + halves[1].names
    task = make_task(tiny("run.seed=4"))
    assert not torch.equal(whole.pixels, third(Group()).pixels)
    with pytest.raises(InputError, match="32 is not divisible by 3"):
        task.stream(Group(ranks=3))


def test_exported_names_and_architecture_are_the_references(tiny: Tiny) -> None:
    golden = load_file(ROOT / "tests" / "golden" / "clip_core.safetensors")
    prefix = "weights."
    reference = {name.removeprefix(prefix) for name in golden if name.startswith(prefix)}
    # The golden model's depth and options are those of the tiny recipe.
    config = tiny("schedule.steps=1", "schedule.warmup=0", "model.text.layers=2")
    assert set(train(config)) == reference
    architecture = json.loads((Path(config.run.out_dir) / "model.json").read_text())
    assert architecture == config.model.to_dict()


def test_exported_weights_load_as_the_trained_model(tiny: Tiny) -> None:
    config = tiny("schedule.steps=2")
    with trainer_of(config) as trainer:
        trainer.run()
    loaded = load_weights(Path(config.run.out_dir) / "model.safetensors")
    assert not loaded.training
    for name, tensor in trainer.model.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name])
    part = training_digits().part(slice(0, 64))
    assert evaluate(trainer.model, part) == evaluate(loaded, part)
    assert trainer.model.training


def test_weight_decay_spares_vectors_and_scalars(tiny: Tiny) -> None:
    with trainer_of(tiny("model.vision.ls_init_value=0.1")) as trainer:
        model = trainer.model
    spared = {name for name, parameter in model.named_parameters() if not decays(parameter)}
    assert "logit_scale" in spared
    for leaf in ("bias", "gamma", "ln_1.weight", "ln_post.weight"):
        assert any(name.endswith(leaf) for name in spared)
    assert not any(name.endswith(("c_fc.weight", "in_proj_weight")) for name in spared)
    config = replace(tiny("optim.weight_decay=0.3").optim, lr_scales={"text.": 0.5})
    optimizer = build_optimizer(model.named_parameters(), config)
    set_learning_rate(optimizer, 2.0)
    found = {(group["lr"], group["weight_decay"]) for group in optimizer.param_groups}
    assert found == {(2.0, 0.3), (2.0, 0.0), (1.0, 0.3), (1.0, 0.0)}
    with pytest.raises(InputError, match="no trained parameter's name starts with 'txt'"):
        build_optimizer(model.named_parameters(), replace(config, lr_scales={"txt": 0.5}))


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
        with path.open("a") as file:
            file.write('{"kind": "train", "st')  # cut off by a kill
        MetricsLog(path, step=2, screen=screen)
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2]


def test_processes_of_a_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("training.distributed.available_cores", lambda: 6)
    for processes, share in ((1, 6), (4, 1), (8, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        with process_group("cpu") as group:
            assert group.fair_threads == share
