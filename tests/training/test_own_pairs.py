"""Own image-text pairs: a validation split, retrieval metrics, LoRA in both towers."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import run_here
from PIL import Image
from safetensors.torch import load_file

from perception_rt.checkpoint.adapter import AdaptedWeights
from perception_rt.checkpoint.source import open_checkpoint, state_dict
from perception_rt.errors import InputError, PerceptionError
from perception_rt.models.pe import PerceptionEncoder
from training.consolidate import main as consolidate
from training.data.pairs import PairSource
from training.data.shards import Index, Jsonl, divide
from training.data.validation import ValidationPairs
from training.model import lora
from training.recipe.schema import ContrastiveConfig, TrainConfig
from training.tasks.contrastive import ContrastiveTask
from training.tasks.retrieval import image_ranks, retrieval, text_ranks
from training.trainer import Trainer

Tiny = Callable[..., ContrastiveConfig]
COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "white": (255, 255, 255)}


@pytest.fixture
def pairs(tmp_path: Path) -> Path:
    """40 noisy images in four colours with their colours as captions."""
    rng = np.random.default_rng(0)
    lines = []
    for number in range(40):
        name, color = list(COLORS.items())[number % 4]
        noise = rng.integers(-30, 31, size=(16, 16, 3))
        pixels = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
        lines.append(json.dumps({"image": f"{number}.png", "caption": f"{name}"}))
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(lines))
    return path


def own(tiny: Tiny, path: Path, *settings: str) -> ContrastiveConfig:
    data = (f"data.path={path}", "data.dataset=jsonl", "data.batch_size=8")
    return tiny(*data, "model.vision.drop_path=0", *settings)


def events(config: TrainConfig, kind: str) -> list[dict[str, float]]:
    lines = (Path(config.run.out_dir) / "metrics.jsonl").read_text().splitlines()
    return [event for event in map(json.loads, lines) if event.pop("kind") == kind]


def names_of(source: PairSource, steps: int) -> set[str]:
    return {source.read(lane, p).row.name for p in range(steps) for lane in range(8)}


# The validation split


def test_kept_pairs_are_never_trained_on(tiny: Tiny, pairs: Path) -> None:
    found = []
    for seed in (0, 1):
        config = own(tiny, pairs, "data.validation_fraction=0.2", f"run.seed={seed}")
        reader = PairSource(config.data, config.model, seed=seed, sizes=lambda _: (16,))
        trained = names_of(reader, 12)
        validation = ValidationPairs(config.data, config.model, workers=2)
        kept = {pair.name for chunk in validation.chunks() for pair in chunk}
        assert (len(trained), len(kept), len(validation)) == (32, 8, 8)
        assert not trained & kept
        found.append(kept)
    assert found[0] == found[1]


class Numbers(Jsonl):
    """Ten rows, two of each image."""

    def index(self, shard: Path) -> Index:
        return np.arange(30).reshape(10, 3)

    def images(self, shard: Path, index: Index) -> list[str]:
        return [str(entry[0] // 6) for entry in index]


def test_a_shard_is_divided_by_images_in_an_order_of_its_name() -> None:
    rows = Numbers("")
    index = rows.index(Path())
    for fraction, kept in ((0.0, 0), (0.01, 2), (0.2, 2), (0.3, 4), (0.99, 8)):
        train, validation = divide(rows, Path("a/x.jsonl"), fraction)
        assert (len(train), len(validation)) == (10 - kept, kept)
        assert sorted([*train[:, 0], *validation[:, 0]]) == index[:, 0].tolist()
        assert not set(rows.images(Path(), train)) & set(rows.images(Path(), validation))
        assert np.array_equal(divide(rows, Path("b/x.jsonl"), fraction)[1], validation)


def test_lines_of_an_image_stay_together(tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    lines = [json.dumps({"image": f"{i % 20}.png", "caption": f"{i}"}) for i in range(100)]
    path.write_text("\n".join([*lines, "{broken"]))
    found = [set(Jsonl("").images(path, part)) for part in divide(Jsonl(""), path, 0.25)]
    assert len(found[0] | found[1]) == 21
    assert not found[0] & found[1]
    assert len(found[1]) in (5, 6)


def test_a_run_reports_retrieval_of_a_fraction(tiny: Tiny, pairs: Path) -> None:
    settings = ("schedule.steps=40", "run.eval_every=40", "optim.lr=0.01", "run.log_every=20")
    config = own(tiny, pairs, *settings, "data.validation_fraction=0.3")
    run_here(config)
    (event,) = events(config, "eval")
    assert event["step"] == 40
    assert event["pairs"] == 12
    # Four captions, so this is the accuracy of zero-shot classification.
    assert event["image_to_text_r1"] > 0.8
    assert event["text_to_image_r1"] > 0.7
    assert "image_to_text_r5" not in event


def test_a_run_reports_retrieval_of_a_file(tiny: Tiny, pairs: Path) -> None:
    settings = ("schedule.steps=2", "run.eval_every=1", f"data.validation_path={pairs}")
    config = own(tiny, pairs, *settings)
    run_here(config)
    assert [(event["step"], event["pairs"]) for event in events(config, "eval")] == [
        (1, 40),
        (2, 40),
    ]


def test_unusable_validation_pairs_are_left_out(tiny: Tiny, pairs: Path) -> None:
    path = pairs.with_name("validation.jsonl")
    path.write_text('{"image": "0.png", "caption": "red"}\n{"image": "none.png", "caption": "x"}\n')
    config = own(tiny, pairs, f"data.validation_path={path}")
    validation = ValidationPairs(config.data, config.model, workers=1)
    assert [[pair.name for pair in chunk] for chunk in validation.chunks()] == [
        ["validation.jsonl line 1"]
    ]
    path.write_text('{"image": "none.png", "caption": "x"}\n')
    broken = ValidationPairs(config.data, config.model, workers=1)
    with pytest.raises(PerceptionError, match=r"1 samples in a row are unusable.*none\.png"):
        list(broken.chunks())
    path.write_text("")
    with pytest.raises(InputError, match=r"validation\.jsonl' leaves no pair for validation"):
        ValidationPairs(config.data, config.model, workers=1)


def test_wrong_splits_are_refused(tiny: Tiny, pairs: Path) -> None:
    for settings, message in (
        (("data.validation_fraction=1",), "must be from 0 to below 1, not 1.0"),
        (("data.validation_fraction=0.1", "data.validation_path=x"), "exclude each other"),
        (("data.dataset=digits", "data.validation_path=x"), "are for jsonl and webdataset"),
        (("run.eval_every=1",), "run.eval_every needs a validation split"),
    ):
        with pytest.raises(InputError, match=message):
            own(tiny, pairs, *settings)


# Retrieval


def test_ranks_are_those_of_the_definition() -> None:
    similarity = torch.tensor([[0.9, 0.1, 0.2], [0.5, 0.6, 0.7], [0.8, 0.3, 0.1]])
    owner = torch.tensor([0, 1, 0])
    assert image_ranks(similarity, owner).tolist() == [0, 1, 0]
    # Caption 2 has no image here; its rank is the last.
    assert text_ranks(similarity, owner).tolist()[:2] == [0, 0]
    assert image_ranks(torch.zeros(2, 3), torch.tensor([0, 2])).tolist() == [2, 2]
    assert text_ranks(torch.zeros(3, 2), torch.tensor([0, 1, 1])).tolist() == [2, 1]


def test_a_model_that_knows_nothing_scores_nothing(tiny: Tiny, pairs: Path) -> None:
    config = own(tiny, pairs, f"data.validation_path={pairs}")
    model = PerceptionEncoder(config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    chunks = ValidationPairs(config.data, config.model, workers=1).chunks()
    figures = retrieval(model.train(), chunks)
    assert model.training
    assert set(figures.values()) == {0.0, 40}


# LoRA

ADAPTED = ("lora.rank=4", "schedule.steps=6", "optim.lr=0.02", "run.save_every=3")


def adapted(tiny: Tiny, pairs: Path, *settings: str) -> tuple[ContrastiveConfig, Path]:
    """Trains a base, and the recipe that adapts it."""
    base = own(tiny, pairs, "schedule.steps=2", f"run.out_dir={pairs.parent / 'base'}")
    run_here(base)
    file = Path(base.run.out_dir) / "model.safetensors"
    return own(tiny, pairs, f"init.checkpoint={file}", *ADAPTED, *settings), file


@pytest.mark.parametrize("loss", ["softmax", "sigmoid"])
def test_updates_of_both_towers_are_trained_and_merged(
    tiny: Tiny, pairs: Path, loss: str, tmp_path: Path
) -> None:
    config, file = adapted(tiny, pairs, f"loss={loss}")
    trainer = run_here(config)
    base = load_file(file)
    trained = {name for name, p in trainer.model.named_parameters() if p.requires_grad}
    free = {"logit_scale", "logit_bias"} if loss == "sigmoid" else set()
    assert {name for name in trained if not lora.is_update(name)} == free
    layers = {name.rpartition(".")[0] for name in trained} - {""}
    assert {"visual.attn_pool.attn", "visual.transformer.resblocks.1.mlp.c_fc"} <= layers
    assert "text.transformer.resblocks.0.attn" in layers
    for name, parameter in trainer.model.named_parameters():
        if not lora.is_update(name) and name not in free:
            stored = base[name.removeprefix("text.")]
            assert torch.equal(parameter, stored), name
    # The exported model computes what the trained one does.
    source = open_checkpoint(Path(config.run.out_dir) / "model.safetensors", config.model)
    plain = PerceptionEncoder(config.model)
    plain.load_state_dict(state_dict(source, plain.state_dict()))
    pixels = torch.rand(2, 3, 16, 16)
    tokens = torch.tensor([[49406, 320, 49407]])
    model = trainer.model.eval()
    with torch.no_grad():
        assert torch.allclose(plain.encode_image(pixels), model.encode_image(pixels), atol=1e-4)
        assert torch.allclose(plain.encode_text(tokens), model.encode_text(tokens), atol=1e-4)
        assert not torch.allclose(plain.visual.proj, torch.zeros(()))
    adapter = Path(config.run.out_dir) / "adapter"
    adapted_base = AdaptedWeights(open_checkpoint(file, config.model), adapter, config.model)
    for name in plain.state_dict().keys() - free:
        assert torch.allclose(adapted_base.load(name), source.load(name), atol=1e-6), name
    moved = [n for n, t in load_file(source_file(config)).items() if not torch.equal(t, base[n])]
    assert len(moved) >= len(layers)
    assert consolidate([config.run.out_dir, str(tmp_path / "weights")]) == 0
    again = load_file(tmp_path / "weights" / "model.safetensors")
    assert all(torch.equal(again[n], t) for n, t in load_file(source_file(config)).items())


def source_file(config: ContrastiveConfig) -> Path:
    return Path(config.run.out_dir) / "model.safetensors"


@pytest.mark.parametrize(
    ("targets", "tower"),
    [("visual.*", "visual."), ("text.*", "text."), ("text.*.in_proj", "text.")],
)
def test_targets_may_name_a_tower(tiny: Tiny, pairs: Path, targets: str, tower: str) -> None:
    config = own(tiny, pairs, "lora.rank=2", f"lora.targets={targets}")
    with torch.device("meta"):
        model = ContrastiveTask(config).learner().model
    found = [name for name, _ in model.named_parameters() if lora.is_update(name)]
    assert found
    assert all(name.startswith(tower) for name in found)


def test_an_adapted_run_resumes_with_the_same_bits(tiny: Tiny, pairs: Path) -> None:
    config, file = adapted(tiny, pairs)
    run_here(config)
    folder = Path(config.run.out_dir) / "checkpoints"
    assert sorted(p.name for p in folder.glob("step_*")) == ["step_0000000003", "step_0000000006"]
    expected = load_file(source_file(config))
    for path in (folder / "step_0000000006").iterdir():
        path.unlink()  # damaged, so that the run goes on from step 3
    run_here(own(tiny, pairs, f"init.checkpoint={file}", *ADAPTED, "run.resume=true"))
    found = load_file(source_file(config))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


# More steps


def test_a_finished_run_is_extended(tiny: Tiny, capsys: pytest.CaptureFixture[str]) -> None:
    settings = ("schedule.steps=4", "run.log_every=1")
    run_here(tiny(*settings))
    first = load_file(source_file(tiny()))
    assert run_here(tiny(*settings, "run.resume=true")).done == 4
    assert "all 4 steps are done; raise schedule.steps to train on" in capsys.readouterr().out
    longer = tiny("schedule.steps=7", "run.log_every=1", "run.resume=true")
    assert run_here(longer).done == 7
    assert capsys.readouterr().err.count("schedule.steps rises from 4 to 7") == 1
    assert [event["step"] for event in events(longer, "train")] == list(range(1, 8))
    assert events(longer, "train")[-1]["lr"] > 0
    second = load_file(source_file(longer))
    assert any(not torch.equal(second[name], tensor) for name, tensor in first.items())
    with pytest.raises(PerceptionError, match=r"saved with schedule\.steps = 7, not 5"):
        run_here(tiny("schedule.steps=5", "run.resume=true"))


def interrupted(*_: object) -> None:
    raise PerceptionError("interrupted")


def test_an_extended_run_takes_the_steps_of_a_longer_one(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    constant = ("schedule.final_fraction=1", "model.vision.drop_path=0")
    whole = tiny("schedule.steps=6", *constant, f"run.out_dir={tmp_path / 'whole'}")
    run_here(whole)
    run_here(tiny("schedule.steps=3", *constant))
    longer = tiny("schedule.steps=6", *constant, "run.resume=true")
    with monkeypatch.context() as patch, pytest.raises(PerceptionError):
        patch.setattr(Trainer, "step", interrupted)
        run_here(longer)
    assert not source_file(longer).exists()  # the weights of step 3 are not those of this run
    run_here(longer)
    found, expected = load_file(source_file(longer)), load_file(source_file(whole))
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
