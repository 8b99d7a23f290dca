"""Planned parameters, memory and FLOPs agree with torch's own measurements."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import set_checkpoint_early_stop
from torch.utils.flop_counter import FlopCounterMode

from perception_rt.archs import PLM_MODELS
from perception_rt.checkpoint.source import expected_tensors
from perception_rt.config import VisionConfig
from perception_rt.errors import InputError
from perception_rt.models.layers import (
    Attention,
    Rope,
    merge_heads,
    rotate,
    sdpa_attention,
    split_heads,
)
from perception_rt.models.plm import PerceptionLM
from perception_rt.plm_config import DecoderConfig, PlmConfig
from training import parallel
from training.distributed import process_group
from training.model.lora import add_updates
from training.planning.flops import Work, step_flops
from training.planning.memory import (
    GIB,
    Planner,
    full_rows,
    kept_bytes,
    make_plan,
    planned_model,
    report,
)
from training.recipe.schema import (
    DatasetConfig,
    LanguageConfig,
    LanguageDataConfig,
    LoraConfig,
    ParallelConfig,
    RunConfig,
    load_config,
)
from training.tasks.task import Learner
from training.train import main

CONFIGS = Path(__file__).parents[2] / "training" / "configs"
ALL = ("wq", "wk", "wv", "wo", "w1", "w2", "w3", "projector.0", "projector.2", "in_proj", "c_proj")
# Billions of parameters of the released models.
BILLIONS = {"PLM-1B": 1.5335, "PLM-3B": 3.5168, "PLM-8B": 9.7943}


def recipe(**changes: object) -> LanguageConfig:
    model = PlmConfig(
        decoder=DecoderConfig(
            dim=32, n_layers=3, n_heads=4, n_kv_heads=2, vocab_size=60, max_seqlen=64,
            multiple_of=16,
        ),
        vision=VisionConfig(
            patch_size=8, width=16, layers=2, heads=2, mlp_ratio=2.0, image_size=32,
            use_cls_token=True, pool_type="none", use_ln_post=False, ls_init_value=0.1,
        ),
        pooling_ratio=2,
        image_token_id=59,
    )  # fmt: skip
    data = LanguageDataConfig(
        datasets={"a": DatasetConfig(annotation="a.jsonl")},
        mix="a:1",
        tokenizer="none",
        batch_size=16,
        seq_len=15,
    )
    config = LanguageConfig(run=RunConfig(out_dir="none"), model=model, data=data)
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", PLM_MODELS)
def test_parameters_are_those_of_the_model(name: str) -> None:
    config = load_config(CONFIGS / f"plm_{name[-2:].lower()}_stage2.yaml")
    planner = Planner(config)
    expected = sum(shape.numel() for shape in expected_tensors(PLM_MODELS[name]).values())
    assert planner.parameters == planner.trained == expected
    assert round(expected / 1e9, 4) == BILLIONS[name]


def test_memory_of_weights_is_what_torch_allocates() -> None:
    for config in (recipe(), recipe(train="projector"), recipe(lora=LoraConfig(rank=2))):
        shapes = planned_model(config)
        model = PerceptionLM(config.model)
        if config.lora is not None:
            add_updates(model, config.lora)
        for name, parameter in shapes.named_parameters():
            model.get_parameter(name).requires_grad_(parameter.requires_grad)
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained)
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        memory = Planner(config).memory(ranks=1, accumulation=1, rows=1)
        assert memory.weights == sum(p.nbytes for p in model.parameters())
        assert memory.gradients == sum(p.grad.nbytes for p in trained if p.grad is not None)
        states = list(optimizer.state.values())
        assert memory.moments == sum(s[n].nbytes for s in states for n in ("exp_avg", "exp_avg_sq"))
    one, four = (
        Planner(recipe(parallel=ParallelConfig(mode="shard"))).memory(ranks, 1, 1)
        for ranks in (1, 4)
    )
    assert (one.weights // 4, one.moments // 4) == (four.weights, four.moments)


def test_what_autograd_keeps() -> None:
    layer = torch.nn.Linear(8, 16, device="meta")
    x = torch.empty(4, 8, device="meta")
    first, second = 4 * 8 * 4, 4 * 16 * 4  # bytes of input and output
    assert kept_bytes(lambda: layer(x)) == first
    assert kept_bytes(lambda: F.gelu(layer(x))) == first + second
    layer.requires_grad_(False)
    assert kept_bytes(lambda: F.gelu(layer(x))) == 0


@pytest.mark.parametrize("checkpointing", ["none", "full"])
def test_activations_are_what_autograd_keeps(checkpointing: str) -> None:
    settings = ParallelConfig(checkpointing=checkpointing)  # type: ignore[arg-type]
    config = recipe(parallel=settings)
    memory, work = Planner(config).memory(1, 1, 4), full_rows(config, 4)
    learner = Counted(config, sdpa_attention)
    with process_group("cpu") as group:
        parallel.prepare(learner, settings, group)
    parallel.fill(learner.model, lambda name, shape: torch.ones(shape))
    tokens = torch.ones(4, 15, dtype=torch.int64)
    tokens[:, :12] = 59
    pixels = torch.zeros(work.tiles, 3, 32, 32)
    kept = kept_bytes(lambda: learner.model.hidden_states(learner.model.embed(tokens, pixels)))
    assert memory.tower + memory.projector + memory.decoder == pytest.approx(kept, rel=0.05)


def whole_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    mask: object = None,
) -> Tensor:
    """Attention of every token to every token, by plain products that can be counted."""
    groups = kv_heads or heads
    q, k, v = split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)
    assert rope is not None
    q, k = rotate(q, rope), rotate(k, rope)
    k, v = (x.repeat_interleave(heads // groups, dim=1) for x in (k, v))
    return merge_heads((q @ k.transpose(-1, -2)).softmax(-1) @ v)


class Counted(Learner):
    """Two rows of text after two tiles; ten tokens have logits."""

    def __init__(self, config: LanguageConfig, attention: Attention) -> None:
        super().__init__()
        self.model = planned_model(config, attention)

    def forward(self, micro: Tensor) -> Tensor:
        hidden = self.model.hidden_states(self.model.embed(micro, torch.ones(2, 3, 32, 32)))
        return self.model.head(hidden[:, -5:]).sum()


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"train": "projector"}, {"lora": LoraConfig(rank=2)}, {"lora": LoraConfig(targets=ALL)}],
    ids=["all", "projector", "lora", "lora-everywhere"],
)
def test_operations_are_those_that_torch_counts(
    changes: dict[str, object], checkpointing: str, tied: bool
) -> None:
    config = recipe(**changes)
    decoder = replace(config.model.decoder, weight_tying=tied)
    config = replace(config, model=replace(config.model, decoder=decoder))
    learner = Counted(config, whole_attention)
    tokens = torch.ones(2, 12, dtype=torch.int64)
    tokens[:, 1:5] = 59
    with process_group("cpu") as group:
        parallel.prepare(learner, ParallelConfig(checkpointing=checkpointing), group)  # type: ignore[arg-type]
    parallel.fill(learner.model, lambda name, shape: torch.ones(shape))
    # A recomputation that stops early omits the last product of a block.
    with FlopCounterMode(display=False) as counter, set_checkpoint_early_stop(False):
        learner(tokens).backward()
    work = Work(tokens=24, pairs=2 * 12 * 12, tiles=2, labelled=10)
    flops = step_flops(learner.model, work, checkpointing)
    assert flops.model + flops.recomputed == counter.get_total_flops()
    assert (flops.recomputed > 0) == (checkpointing == "full")


def test_rows_are_full() -> None:
    work = full_rows(recipe(), 3)  # 15 tokens: three tiles of 4, and 3 text tokens
    assert work == Work(tokens=45, pairs=3 * 15 * 16 // 2, tiles=9, labelled=9)


def test_a_step_is_cut_into_as_few_parts_as_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = Planner(recipe())
    assert make_plan(planner, 2).accumulation == 1
    two_rows = planner.memory(2, 4, 2).total
    monkeypatch.setattr("training.planning.memory.MEMORY", two_rows / 0.9 + 1)
    plan = make_plan(planner, 2)
    assert (plan.accumulation, plan.rows, plan.fits) == (4, 2, True)
    assert plan.memory.total == two_rows
    monkeypatch.setattr("training.planning.memory.MEMORY", 1)
    plan = make_plan(planner, 2)
    assert (plan.accumulation, plan.rows, plan.fits) == (8, 1, False)


def test_checkpointing_keeps_less() -> None:
    kept = {
        mode: Planner(recipe(parallel=ParallelConfig(checkpointing=mode))).memory(1, 1, 4)  # type: ignore[arg-type]
        for mode in ("none", "selective", "full")
    }
    assert kept["none"].decoder > kept["selective"].decoder > kept["full"].decoder
    assert kept["none"].tower > kept["selective"].tower > kept["full"].tower


def test_a_group_of_shards_keeps_gradients_shared() -> None:
    def gathered(mode: str, accumulation: int) -> int:
        config = recipe(parallel=ParallelConfig(mode=mode, shard_ranks=2))  # type: ignore[arg-type]
        return Planner(config).memory(4, accumulation, 1).gathered

    whole = 4 * Planner(recipe()).trained
    assert gathered("shard", 2) == gathered("shard", 1) + whole
    assert gathered("hybrid", 2) == gathered("hybrid", 1)


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({}, 3, "data.batch_size 16 is not divisible by 3 ranks"),
        ({}, 0, "not divisible by 0 ranks"),
        ({"parallel": ParallelConfig(tensor=2)}, 4, "--plan needs parallel.tensor 1, not 2"),
        ({"parallel": ParallelConfig(mode="hybrid")}, 4, "groups of parallel.shard_ranks 8"),
    ],
)
def test_what_cannot_be_planned(changes: dict[str, object], ranks: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        report(recipe(**changes), [ranks])


def test_the_command_prints_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    recipe_file = CONFIGS / "plm_8b_stage3.yaml"
    assert main([str(recipe_file), "--plan", "--ranks", "64", "512"]) == 0
    table = capsys.readouterr().out
    lines = {line[:34].strip(): line[34:].split() for line in table.splitlines()}
    assert "9,794,260,736, of which 9,794,260,736 are trained" in table
    assert lines["GPUs"] == ["64", "512"]
    shard = 9_794_260_736 * 4 / 8 / GIB
    assert lines["weights (GiB)"] == [f"{shard:.2f}"] * 2
    seconds = [float(value) for value in lines["step (s)"]]
    assert seconds[0] == pytest.approx(8 * seconds[1], rel=0.02)
    assert main([str(CONFIGS / "pe_tiny.yaml"), "--plan"]) == 2
    assert "--plan needs a recipe of task language" in capsys.readouterr().err
