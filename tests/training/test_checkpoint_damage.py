"""Damaged or foreign checkpoints are never loaded; intact ones can be consolidated."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import RESUME, checkpoints, finish, run_here
from safetensors.torch import load_file

from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.source import open_checkpoint
from perception_rt.errors import CheckpointError, InputError
from training.checkpoint import files
from training.checkpoint.files import names_of
from training.consolidate import main as consolidate
from training.distributed import process_group
from training.model.export import load_weights
from training.recipe.schema import TrainConfig
from training.tasks.registry import make_task
from training.train import main
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]

Tiny = Callable[..., TrainConfig]


# TRN-03


def truncate(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1])


def flip_a_bit(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 1
    shard.write_bytes(content)


def remove_shard(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    shard.unlink()


def add_shard(folder: Path) -> None:
    (shard,) = folder.glob("*.safetensors")
    (folder / "shard-00009.safetensors").write_bytes(shard.read_bytes())


def remove_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def spoil_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").write_text('{"format": 1, "step": 2, "files": [{"nam')


def point_outside(folder: Path) -> None:
    tree = json.loads((folder / "checkpoint.json").read_text())
    tree["files"][0]["name"] = "../LAST"
    (folder / "checkpoint.json").write_text(json.dumps(tree))


DAMAGES = {
    truncate: "bytes, not",
    flip_a_bit: "has another SHA-256",
    remove_shard: "is missing",
    add_shard: "is not in checkpoint.json",
    remove_manifest: "checkpoint.json is missing",
    spoil_manifest: "checkpoint.json is damaged",
    point_outside: "outside its folder",
}


def test_trn_03_a_damaged_checkpoint_is_skipped_with_a_warning(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("schedule.steps=2", "run.save_every=1")
    run_here(config)
    again = tiny("schedule.steps=2", "run.save_every=1", RESUME)
    folder = checkpoints(config)
    expected = load_file(Path(config.run.out_dir) / "model.safetensors")
    for damage, message in DAMAGES.items():
        damage(folder / "step_0000000002")
        capsys.readouterr()
        assert run_here(again).done == 2
        error = capsys.readouterr().err
        assert error.count("\n") == 1
        assert "WARNING: checkpoint step_0000000002 is damaged and skipped: " in error
        assert message in error
        # Step 2 ran again, and its new checkpoint replaces the damaged one.
        assert (folder / "damaged_step_0000000002").is_dir()
        found = load_file(Path(config.run.out_dir) / "model.safetensors")
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    run_here(again)
    assert capsys.readouterr().err == ""


def test_trn_03_without_an_intact_checkpoint_nothing_starts(tiny: Tiny) -> None:
    config = tiny("schedule.steps=2", "run.save_every=1", RESUME)
    run_here(config)
    for name in names_of(checkpoints(config)):
        flip_a_bit(checkpoints(config) / name)
    with pytest.raises(CheckpointError, match="none of 2 checkpoints is intact"):
        run_here(config)
    assert len(names_of(checkpoints(config))) == 2
    for name in names_of(checkpoints(config)):
        files.discard(checkpoints(config) / name)
    with pytest.raises(CheckpointError, match="had checkpoints and has none"):
        run_here(config)


def test_trn_03_a_checkpoint_of_another_run_is_refused(tiny: Tiny) -> None:
    base = ("schedule.steps=2", "run.save_every=1", RESUME)
    run_here(tiny(*base))
    for override, message in (
        ("optim.lr=0.5", "step_0000000002 was saved with optim.lr = 0.003, not 0.5"),
        ("model.text.width=32", "model.text.width = 16, not 32"),
        ("run.seed=1", "run.seed = 0, not 1"),
    ):
        with pytest.raises(CheckpointError, match=message):
            run_here(tiny(*base, override))
    # Settings that change no result may differ.
    run_here(tiny(*base, "run.keep=1", "parallel.mode=shard", "optim.stop_above=9"))


def test_trn_03_other_tensors_are_named(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny("schedule.steps=2", RESUME)
    run_here(config)
    with process_group("cpu") as group:
        trainer = Trainer(config, make_task(config), group)
        model = trainer.model
        model.visual.proj = torch.nn.Parameter(torch.zeros(3, 5))
        model.extra = torch.nn.Parameter(torch.zeros(2))
        del model.visual.conv1
        with pytest.raises(CheckpointError) as caught:
            trainer.checkpoints.resume(trainer.learner, trainer.optimizer, trainer.stream)
    message = str(caught.value)
    assert "lacks model.extra" in message
    assert "has unknown model.visual.conv1.weight" in message
    assert "model.visual.proj (32, 16), not (3, 5)" in message


# Consolidation


def test_consolidated_weights_are_the_trained_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out_dir = tmp_path / "run"
    finish(out_dir, "schedule.steps=2", "parallel.mode=shard", ranks=2)
    shards = list((out_dir / "checkpoints" / "step_0000000002").glob("*.safetensors"))
    assert len(shards) == 2
    assert consolidate([str(out_dir), str(tmp_path / "weights")]) == 0
    assert capsys.readouterr().out.startswith("step_0000000002 is in ")
    found = load_file(tmp_path / "weights" / "model.safetensors")
    expected = load_file(out_dir / "model.safetensors")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not load_weights(tmp_path / "weights" / "model.safetensors").training
    config = find_config(out_dir)
    assert config is not None and config == find_config(tmp_path / "weights")
    (out_dir / "model.safetensors").unlink()  # as if the run had been interrupted
    command = re.escape(f"unfinished training run: python training/consolidate.py {out_dir} OUT")
    for path in (out_dir, out_dir / "checkpoints"):
        with pytest.raises(InputError, match="unfinished training run: python training/cons"):
            find_config(path)
    with pytest.raises(InputError, match=command):
        open_checkpoint(out_dir, config)
    with pytest.raises(InputError, match="is a checkpoint of a training run: python training/"):
        open_checkpoint(shards[0].parent, config)


def test_what_cannot_be_consolidated_is_named(
    tmp_path: Path, tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("schedule.steps=2")
    run_here(config)
    run = config.run.out_dir
    folder = checkpoints(config) / "step_0000000002"
    used = tmp_path / "used"
    used.mkdir()
    (used / "file").touch()
    capsys.readouterr()
    for path, out, message, status in (
        (tmp_path / "no", tmp_path / "out", "is neither a checkpoint nor a run", 2),
        (folder, used, "is not an empty folder", 2),
    ):
        assert consolidate([str(path), str(out)]) == status
        assert message in capsys.readouterr().err
    truncate(folder)
    assert consolidate([run, str(tmp_path / "out")]) == 1
    assert "bytes, not" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    files.discard(folder)
    assert consolidate([run, str(tmp_path / "out")]) == 2
    assert "names 'step_0000000002', which does not exist" in capsys.readouterr().err


def test_a_run_is_not_overwritten_and_a_finished_one_is_left_as_it_is(
    tiny: Tiny, capsys: pytest.CaptureFixture[str]
) -> None:
    config = tiny("schedule.steps=2")
    run_here(config)
    recipe = Path(config.run.out_dir) / "recipe.yaml"
    assert main([str(recipe)]) == 2
    assert "holds a run" in capsys.readouterr().err
    before = (checkpoints(config) / "step_0000000002").stat().st_mtime_ns
    assert main([str(recipe), "--set", RESUME]) == 0
    assert (checkpoints(config) / "step_0000000002").stat().st_mtime_ns == before
    with pytest.raises(InputError, match="holds a run"):
        run_here(config)


def test_nothing_in_a_checkpoint_is_pickled(tiny: Tiny) -> None:
    config = tiny("schedule.steps=1", "schedule.warmup=0")
    run_here(config)
    (folder,) = checkpoints(config).glob("step_*")
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json", ".yaml"}
