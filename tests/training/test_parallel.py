"""A learner learns the same however it is distributed over ranks and computed (TRN-10)."""

import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from parallel_cases import (
    LONG,
    PLAIN,
    TILE,
    TREE,
    MadeTask,
    Runs,
    train_all,
    train_on_ranks,
    whole,
)
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from perception_rt.errors import InputError
from perception_rt.models.layers import sdpa_attention
from perception_rt.processing.tiles import TileSpec
from training import parallel
from training.distributed import Group, average_gradients, build_mesh, process_group
from training.model import attention
from training.recipe.schema import LanguageConfig
from training.recipe.tree import build
from training.tasks.language import LanguageLearner


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    cases = (
        PLAIN, LONG, "four parts", "tied", "projector", "full", "selective", "bf16", "contrastive",
    )  # fmt: skip
    runs = train_all(cases, folder)
    torch.set_num_threads(threads)
    return runs


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = (
        "replicate", "replicate, two parts", "shard", "shard, two parts", "shard, tied",
        "shard, projector", "shard, full", "shard, bf16", "tensor", "contrastive, shard",
    )  # fmt: skip
    return train_on_ranks(2, cases, tmp_path_factory.mktemp("two"))


def assert_same(found: Runs, case: str, expected: Runs, like: str) -> None:
    """Losses agree within 1e-5, gradient norms and weight changes within 1e-4."""
    for kind, bound in (("losses", 1e-5), ("norms", 1e-4)):
        assert found.facts(case)[kind] == pytest.approx(expected.facts(like)[kind], rel=bound)
    before, after = expected.before(like), expected.after(like)
    assert found.before(case).keys() == before.keys()
    for name, tensor in found.after(case).items():
        change = (after[name] - before[name]).norm()
        assert change > 0 or "projector" in like, name
        bound = 1e-4 * change + 1e-6 * after[name].norm()
        assert (tensor - after[name]).norm() <= bound, name


@pytest.mark.parametrize(
    ("case", "like"),
    [
        ("replicate", LONG),
        ("replicate, two parts", PLAIN),
        ("shard", LONG),
        ("shard, two parts", PLAIN),
        ("shard, tied", "tied"),
        ("shard, projector", "projector"),
        ("shard, full", PLAIN),
        ("tensor", PLAIN),
        ("contrastive, shard", "contrastive"),
    ],
)
def test_two_ranks_learn_what_one_does(two: Runs, one: Runs, case: str, like: str) -> None:
    """Some batches have no image on one rank."""
    assert_same(two, case, one, like)


def test_an_evaluation_calls_parts_of_a_sharded_model(two: Runs, one: Runs) -> None:
    found = two.facts("contrastive, shard")["figures"]
    assert found == pytest.approx(one.facts("contrastive")["figures"], abs=0.02)


@pytest.mark.parametrize("case", ["four parts", "full", "selective"])
def test_parts_and_recomputation_change_nothing(one: Runs, case: str) -> None:
    """TRN-10: four parts of 2 rows equal one part of 8."""
    assert_same(one, case, one, PLAIN)


@pytest.mark.parametrize("case", ["bf16", "shard, bf16"])
def test_bf16_is_near_and_keeps_float32_weights(two: Runs, one: Runs, case: str) -> None:
    runs = one if case == "bf16" else two
    facts, expected = runs.facts(case), one.facts(PLAIN)
    assert facts["sharded"]
    assert facts["losses"] == pytest.approx(expected["losses"], rel=0.02)
    assert facts["losses"] != pytest.approx(expected["losses"], rel=1e-6)
    assert all(tensor.dtype == torch.float32 for tensor in runs.after(case).values())


@pytest.mark.parametrize("case", ["projector", "shard, projector"])
def test_frozen_weights_stay(two: Runs, one: Runs, case: str) -> None:
    """TRN-10."""
    runs = one if case == "projector" else two
    before, after = runs.before(case), runs.after(case)
    for name in before:
        stays = torch.equal(before[name], after[name])
        assert stays != name.startswith("vision_projector."), name


def test_a_rank_holds_its_share_alone(two: Runs, one: Runs) -> None:
    assert not one.facts(PLAIN)["sharded"]
    assert one.facts(PLAIN)["share"] == two.facts("replicate")["share"] == 1.0
    # The 17 rows of the position table are split into 9 and 8.
    assert two.facts("shard")["share"] == pytest.approx(0.5, abs=0.02)
    assert 0.5 < two.facts("tensor")["share"] < 1.0


@pytest.fixture
def group() -> Any:
    with process_group("cpu") as group:
        yield group


@pytest.mark.parametrize("setting", ["parallel.mode=replicate", "parallel.mode=shard"])
def test_a_learner_is_on_meta_until_it_is_shared_out(
    group: Group, tmp_path: Path, setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = build(LanguageConfig, TREE, [setting])
    with torch.device("meta"):
        learner = LanguageLearner(config, TileSpec(tile_size=TILE))
    names = [name for name, _ in learner.model.named_parameters()]
    given: list[bool] = []
    to_empty = type(learner).to_empty

    def watched(self: Any, **options: Any) -> Any:
        given.append(all(p.is_meta for p in self.parameters()))
        return to_empty(self, **options)

    monkeypatch.setattr(type(learner), "to_empty", watched)
    parallel.prepare(learner, config.parallel, group)
    assert given == [True]
    assert not any(p.is_meta for p in learner.parameters())
    assert [name for name, _ in learner.model.named_parameters()] == names
    task = MadeTask(config)
    parallel.fill(learner.model, task.initial)
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(whole(parameter), task.initial(name, parameter.shape)), name


@pytest.mark.parametrize(
    ("settings", "ranks", "message"),
    [
        (("mode=hybrid", "shard_ranks=3"), 4, "shard_ranks 3 does not divide the 4 ranks"),
        (("mode=hybrid", "shard_ranks=8"), 4, "shard_ranks 8 does not divide the 4 ranks"),
    ],
)
def test_ranks_that_cannot_be_divided_are_named(
    settings: Sequence[str], ranks: int, message: str
) -> None:
    config = build(LanguageConfig, TREE, [f"parallel.{setting}" for setting in settings])
    with pytest.raises(InputError, match=message):
        build_mesh(config.parallel, Group(ranks=ranks))


def test_processes_and_heads_that_cannot_be_divided_are_named() -> None:
    with pytest.raises(InputError, match=r"parallel\.tensor 2 does not divide the 1 processes"):
        with process_group("cpu", tensor=2):
            pass
    config = build(LanguageConfig, TREE, [])
    model = LanguageLearner(config, TileSpec(tile_size=TILE)).model
    with pytest.raises(InputError, match="tensor 4 does not divide the decoder's kv_heads 2"):
        parallel.split_layers(model, SimpleNamespace(size=lambda: 4))  # type: ignore[arg-type]


def test_a_gradient_that_one_rank_lacks_is_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[Tensor] = []
    monkeypatch.setattr("torch.distributed.all_reduce", lambda flat: sent.append(flat.clone()))
    used, unused = (torch.nn.Parameter(torch.ones(2)) for _ in range(2))
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))
    used.grad, half.grad = torch.full((2,), 4.0), torch.ones(3, dtype=torch.bfloat16)
    average_gradients([used, unused, half], Group(ranks=2, processes=2))
    assert [flat.tolist() for flat in sent] == [[4.0, 4.0, 0.0, 0.0], [1.0, 1.0, 1.0]]
    assert unused.grad is not None
    assert used.grad.tolist() == [2.0, 2.0]
    assert unused.grad.tolist() == [0.0, 0.0]


DOCUMENTS = torch.tensor([[0, 0, 0, 1, 1, 2, -1, -1], [0, 0, 1, 1, 1, 1, 1, 1]])


def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 8, 64), torch.randn(2, 8, 32), torch.randn(2, 8, 32)


def expected_attention() -> Tensor:
    mask = attention.sdpa_document_mask(DOCUMENTS)
    return sdpa_attention(*attention_inputs(), heads=4, kv_heads=2, causal=True, mask=mask)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_keeps_documents_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "compiled_flex", lambda: flex_attention)
    mask = attention.flex_document_mask(DOCUMENTS)
    found = attention.flex_document_attention(
        *attention_inputs(), heads=4, kv_heads=2, causal=True, mask=mask
    )
    torch.testing.assert_close(found, expected_attention())


def test_xformers_gets_documents_in_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces the package, which needs a GPU, by attention as its documentation describes it."""

    def attend(q: Tensor, k: Tensor, v: Tensor, *, attn_bias: list[int]) -> Tensor:
        assert q.shape == k.shape == v.shape == (1, 16, 2, 2, 16)
        parts = [x.split(attn_bias, dim=1) for x in (q, k, v)]
        outputs = []
        for own in zip(*parts, strict=True):
            a, b, c = (x.permute(0, 2, 3, 1, 4) for x in own)
            y = torch.nn.functional.scaled_dot_product_attention(a, b, c, is_causal=True)
            outputs.append(y.permute(0, 3, 1, 2, 4))
        return torch.cat(outputs, dim=1)

    ops, bias = ModuleType("xformers.ops"), ModuleType("xformers.ops.fmha.attn_bias")
    ops.memory_efficient_attention = attend  # type: ignore[attr-defined]
    bias.BlockDiagonalCausalMask = SimpleNamespace(from_seqlens=list)  # type: ignore[attr-defined]
    for module in (ModuleType("xformers"), ops, ModuleType("xformers.ops.fmha"), bias):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    mask = attention.xformers_document_mask(DOCUMENTS)
    assert mask == [3, 2, 1, 2, 2, 6]
    found = attention.xformers_document_attention(
        *attention_inputs(), heads=4, kv_heads=2, causal=True, mask=mask
    )
    torch.testing.assert_close(found, expected_attention())


def test_kernels_of_the_gpu_are_refused_without_one(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("flex", "xformers"):
        with pytest.raises(InputError, match=f"{name} needs a GPU"):
            attention.get_kernel(name, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="pip install xformers"):
        attention.get_kernel("xformers", "auto")
    assert attention.get_kernel("flex", "auto").attention is attention.flex_document_attention


@pytest.mark.slow
def test_fifty_steps_on_two_and_four_ranks(tmp_path: Path) -> None:
    """With HSDP, and with tensor parallelism over shards."""
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2, 4)}
    for folder in folders.values():
        folder.mkdir()
    alone = train_on_ranks(1, [PLAIN], folders[1], 50)
    two = train_on_ranks(2, ["replicate", "shard"], folders[2], 50)
    four = train_on_ranks(4, ["hybrid", "hybrid, two parts", "tensor, shard"], folders[4], 50)
    for runs, case in (
        (two, "replicate"), (two, "shard"), (four, "hybrid"), (four, "hybrid, two parts"),
        (four, "tensor, shard"),
    ):  # fmt: skip
        assert_same(runs, case, alone, PLAIN)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    runs = train_on_ranks(1, [PLAIN, "compiled"], tmp_path)
    found, expected = runs.facts("compiled"), runs.facts(PLAIN)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
