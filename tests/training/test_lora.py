"""LoRA trains the updates only, adds their cost only, and merges them exactly."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from perception_rt.checkpoint.adapter import AdaptedWeights
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.config import PeConfig, TextConfig, VisionConfig
from perception_rt.errors import InputError
from perception_rt.models.plm import PerceptionLM
from perception_rt.plm_config import DecoderConfig, PlmConfig
from training import parallel
from training.distributed import process_group
from training.model.adapter import export_adapter
from training.model.init import initial_value
from training.model.lora import add_updates, is_update, merged
from training.recipe.schema import LoraConfig, ParallelConfig
from training.tasks.task import Learner

ALL = (
    "wq", "wk", "wv", "wo", "w1", "w2", "w3", "projector.0", "projector.2",
    "in_proj", "out_proj", "c_fc", "c_proj",
)  # fmt: skip
MODEL = PlmConfig(
    decoder=DecoderConfig(
        dim=32, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=60, max_seqlen=64, multiple_of=16
    ),
    vision=VisionConfig(
        patch_size=8, width=32, layers=2, heads=2, mlp_ratio=2.0, image_size=16, use_cls_token=True,
        pool_type="none", use_ln_post=False, ls_init_value=0.1,
    ),
    pooling_ratio=2,
    image_token_id=59,
)  # fmt: skip


class Plain(Learner):
    """A model whose loss is the summed cross entropy of the next token."""

    def __init__(self, config: LoraConfig | None) -> None:
        super().__init__()
        self.model = PerceptionLM(MODEL)
        if config is not None:
            add_updates(self.model, config)

    def forward(self, micro: torch.Tensor) -> torch.Tensor:
        logits = self.model(micro, torch.ones(len(micro), 3, 16, 16))
        return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), micro[:, 1:].flatten())


def initial(name: str, shape: torch.Size) -> torch.Tensor:
    return initial_value(name, shape, seed=1, layers=2, gain=0.1)


def build(config: LoraConfig | None, mode: str = "replicate") -> Plain:
    """Builds a model like the trainer does: on the meta device, with storage, with values."""
    with torch.device("meta"):
        learner = Plain(config)
    for name, parameter in learner.model.named_parameters():
        parameter.requires_grad_(config is None or is_update(name))
    with process_group("cpu") as group:
        parallel.prepare(learner, ParallelConfig(mode=mode), group)  # type: ignore[arg-type]
        parallel.fill(learner.model, initial)
        if mode != "replicate":
            _train(learner, 3)
    return learner


def tokens() -> torch.Tensor:
    ids = torch.randint(0, 59, (2, 12), generator=torch.Generator().manual_seed(0))
    ids[:, 3] = MODEL.image_token_id
    return ids


def _train(learner: Plain, steps: int) -> None:
    trained = [p for p in learner.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=0.02)
    for _ in range(steps):
        optimizer.zero_grad()
        learner(tokens()).backward()
        optimizer.step()


def test_an_update_starts_at_nothing() -> None:
    plain, updated = build(None), build(LoraConfig(targets=ALL))
    with torch.no_grad():
        assert torch.equal(plain(tokens()), updated(tokens()))


@pytest.mark.parametrize("targets", [LoraConfig().targets, ALL], ids=["decoder", "all"])
def test_merged_and_unmerged_logits_agree(targets: tuple[str, ...]) -> None:
    config = LoraConfig(rank=4, alpha=8.0, targets=targets)
    learner = build(config)
    before = {name: p.detach().clone() for name, p in learner.model.named_parameters()}
    first = learner(tokens()).item()
    _train(learner, 8)
    assert learner(tokens()).item() < 0.9 * first
    plain = PerceptionLM(MODEL)
    weights = merged(learner.model.state_dict(), config)
    assert {n: t.shape for n, t in weights.items()} == expected_tensors(MODEL)
    plain.load_state_dict(weights)
    pixels = torch.ones(2, 3, 16, 16)
    with torch.no_grad():
        difference = plain(tokens(), pixels) - learner.model(tokens(), pixels)
    assert difference.abs().max() < 1e-5
    for name, parameter in learner.model.named_parameters():
        moved = not torch.equal(parameter, before[name])
        assert moved == is_update(name), name


def test_only_the_named_matrices_have_updates() -> None:
    rank = 3
    learner = build(LoraConfig(rank=rank, targets=("wq", "feed_forward.w1", "attn.in_proj")))
    updates = {n: p.numel() for n, p in learner.model.named_parameters() if is_update(n)}
    layers = {name.rpartition(".")[0] for name in updates}
    assert layers == {
        f"{stem.format(i)}"
        for i in range(2)
        for stem in (
            "layers.{}.attention.wq",
            "layers.{}.feed_forward.w1",
            "vision_model.transformer.resblocks.{}.attn",
        )
    }
    hidden = MODEL.decoder.ffn_dim
    assert sum(updates.values()) == 2 * rank * ((32 + 32) + (32 + hidden) + (96 + 32))


def test_the_plain_weights_keep_their_names() -> None:
    learner = build(LoraConfig(targets=ALL))
    names = {name for name, _ in learner.model.named_parameters() if not is_update(name)}
    assert names == set(expected_tensors(MODEL))
    assert set(learner.model.state_dict()) >= names


def test_updates_are_sharded_like_weights() -> None:
    """In mode `shard` with one rank, steps move the updates as in mode `replicate`."""
    config = LoraConfig(targets=ALL)
    whole, sharded = build(config), build(config, "shard")
    _train(whole, 3)
    expected = dict(whole.model.named_parameters())
    for name, parameter in sharded.model.named_parameters():
        local = parameter.to_local() if hasattr(parameter, "to_local") else parameter
        torch.testing.assert_close(local, expected[name].data, rtol=1e-5, atol=1e-6, msg=name)


def test_merging_keeps_the_dtype() -> None:
    config = LoraConfig(targets=("wq",))
    weights = {
        "wq.weight": torch.ones(2, 2, dtype=torch.bfloat16),
        "wq.lora_a": torch.ones(1, 2),
        "wq.lora_b": torch.full((2, 1), 0.5),
    }
    assert merged(weights, config)["wq.weight"].tolist() == [[2.0, 2.0]] * 2
    assert merged(weights, config)["wq.weight"].dtype == torch.bfloat16


def test_a_target_that_no_layer_has_is_named() -> None:
    with pytest.raises(InputError, match="no layer's name ends with 'qkv'"):
        with torch.device("meta"):
            add_updates(PerceptionLM(MODEL), LoraConfig(targets=("wq", "qkv")))


class Frozen:
    """A `WeightSource` of the weights before training."""

    def __init__(self, weights: dict[str, torch.Tensor]) -> None:
        self.weights = weights
        self.provenance: dict[str, str | int] = {}

    def load(self, name: str) -> torch.Tensor:
        return self.weights[name]

    def load_rows(self, name: str, start: int, stop: int) -> torch.Tensor:
        return self.weights[name][start:stop]


def test_the_adapter_of_a_run_merges_into_the_base_weights(tmp_path: Path) -> None:
    config = LoraConfig(rank=4, alpha=6.0, targets=ALL)
    learner = build(config)
    _train(learner, 2)
    weights = dict(learner.model.state_dict())
    export_adapter(weights, MODEL, config, tmp_path / "adapter", base="plm")
    base = Frozen({name: tensor for name, tensor in weights.items() if not is_update(name)})
    adapted = AdaptedWeights(base, tmp_path / "adapter", MODEL)
    changed = set()
    for name, tensor in merged(weights, config).items():
        torch.testing.assert_close(adapted.load(name), tensor, rtol=0, atol=1e-6)
        if not torch.equal(tensor, base.load(name)):
            changed.add(name)
    assert len(changed) == 2 * 7 + 2 * 4 + 2
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 6.0)
    assert "model.language_model.layers.1.mlp.gate_proj" in settings["target_modules"]
    assert "model.vision_tower.timm_model.blocks.0.attn.qkv" in settings["target_modules"]


def test_an_adapter_of_the_text_tower_is_not_taken_for_one_of_the_other(tmp_path: Path) -> None:
    text = TextConfig(context_length=4, width=32, heads=2, layers=2, output_dim=32, vocab_size=9)
    vision = replace(MODEL.vision, pool_type="attn", attn_pooler_heads=2, output_dim=32)
    model = PeConfig(vision=vision, text=text)
    weights = {name: torch.randn(shape) for name, shape in expected_tensors(model).items()}
    base = Frozen(dict(weights))
    layer = "text.transformer.resblocks.1.attn"
    weights |= {f"{layer}.lora_a": torch.randn(2, 32), f"{layer}.lora_b": torch.randn(96, 2)}
    config = LoraConfig(rank=2)
    export_adapter(weights, model, config, tmp_path)
    adapted = AdaptedWeights(base, tmp_path, model)
    for name, tensor in merged(weights, config).items():
        torch.testing.assert_close(adapted.load(name), tensor, rtol=1e-5, atol=1e-5)
