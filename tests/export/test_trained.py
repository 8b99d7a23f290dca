"""TRN-09: an engine exported from a training run computes what the trained model does."""

from pathlib import Path

import numpy as np
import pytest
import torch

import perception_rt as prt
from perception_rt.checkpoint.source import expected_tensors, open_checkpoint, state_dict
from perception_rt.cli import export_main, main
from perception_rt.config import PeConfig
from perception_rt.models.plm import PerceptionLM
from perception_rt.package.reader import read_manifest
from perception_rt.processing.image import normalize
from perception_rt.processing.prompt import Tiles, Turn, encode_prompt
from perception_rt.processing.tiles import TileSpec, load_tiles
from training.demo.questions import record
from training.distributed import process_group
from training.model.export import export_encoder
from training.recipe.schema import load_config
from training.tasks.language import LanguageTask
from training.trainer import Trainer

RECIPE = Path(__file__).parents[2] / "training" / "configs" / "plm_demo_stage2.yaml"
NEW = 12


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageTask, Path]:
    """A few steps of the demo's second stage, from random weights."""
    out_dir = tmp_path_factory.mktemp("run") / "out"
    settings = [
        "init.checkpoint=null", "schedule.steps=6", "schedule.warmup=1", "data.batch_size=2",
        "data.seq_len=256", "run.threads=1", "run.eval_every=0", "run.save_every=0",
        f"run.out_dir={out_dir}",
    ]  # fmt: skip
    config = load_config(RECIPE, settings)
    task = LanguageTask(config)
    with process_group("cpu") as group:
        Trainer(config, task, group).run()
    return task, out_dir


def test_trained_weights_give_the_same_answers_in_an_engine(
    run: tuple[LanguageTask, Path], tmp_path: Path
) -> None:
    """PAR-01 for trained weights: logits within 1e-3, equal greedy tokens and tiles."""
    task, out_dir = run
    package = tmp_path / "package"
    assert export_main(["--checkpoint", str(out_dir), "--out", str(package)]) == 0
    config = task.config.model
    with torch.device("meta"):
        model = PerceptionLM(config)
    weights = state_dict(open_checkpoint(out_dir, config), model.state_dict())
    model.load_state_dict(weights, assign=True)
    image = record("read", 3, 0)["image"]
    tiles = load_tiles(image, task.tiles)
    turns = [Turn("user", (Tiles(len(tiles)), "Read the digits."))]
    ids = encode_prompt(task.tokenizer, turns, config.tokens_per_tile).ids
    pixels = normalize(tiles, task.tiles.tile)
    tokens = torch.from_numpy(ids)[None]
    with torch.inference_mode():
        for _ in range(NEW):
            logits = model(tokens, torch.from_numpy(pixels))[0, -1]
            if tokens.shape[1] == len(ids):
                first = logits.numpy()
            if int(logits.argmax()) in task.tokenizer.end_ids:
                break
            tokens = torch.cat([tokens, logits.argmax()[None, None]], dim=1)
    with prt.load(package) as plm:
        assert isinstance(plm, prt.Generator)
        assert plm.tile_spec == task.tiles == TileSpec(tile_size=64, mode="vanilla", max_tiles=1)
        assert np.abs(plm.prefill_logits(ids, pixels) - first).max() <= 1e-3
        expected = tokens[0, len(ids) :].tolist()
        assert plm.generate_tokens(ids, pixels, max_new_tokens=NEW) == expected
        result = plm.generate("Read the digits.", images=[image], max_new_tokens=NEW)
        assert list(result.tokens) == expected


def test_an_encoder_s_run_is_exported_by_its_folder(
    tiny_config: PeConfig, tuned: Path, tmp_path: Path
) -> None:
    run, package = tmp_path / "run", tmp_path / "package"
    run.mkdir()
    source = open_checkpoint(tuned, tiny_config)
    weights = {name: source.load(name) for name in expected_tensors(tiny_config)}
    export_encoder(weights, tiny_config, run)
    assert export_main(["--checkpoint", str(run), "--out", str(package)]) == 0
    content = read_manifest(package).content
    assert content.name == "run" and content.architecture == tiny_config.to_dict()
    again = ["refit", str(package), "--weights", str(run), "--out", str(tmp_path / "again")]
    assert main(again) == 0
