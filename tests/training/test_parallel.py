"""However a learner is spread over ranks and computed, it learns the same (TRN-10).

Run as a script, this file is one of the ranks: it trains its cases one after the other and leaves
losses and weights in a folder.
"""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.nn.attention.flex_attention import flex_attention

from perception_rt.errors import InputError
from perception_rt.models.layers import sdpa_attention
from perception_rt.processing.tiles import TileSpec
from training import parallel
from training.data.loader import LaneStream, Read
from training.data.packing import IGNORED, LanguageBatch, Sample, collate
from training.distributed import Group, average_gradients, build_mesh, process_group
from training.model import attention
from training.model.init import initial_value
from training.recipe.schema import LanguageConfig, load_config
from training.recipe.tree import build
from training.tasks.language import LanguageLearner
from training.tasks.registry import make_task
from training.tasks.task import Learner, Task
from training.trainer import Trainer

ROOT = Path(__file__).parents[2]
LANES, LENGTH, IMAGE_TOKEN, TILE = 8, 40, 300, 16
STEPS = 5
TREE: dict[str, Any] = {
    "task": "language",
    "model": {
        "dim": 32, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2, "vocab_size": 320,
        "multiple_of": 32, "max_seqlen": 64, "pooling_ratio": 2, "image_token_id": IMAGE_TOKEN,
        "vision_model": {
            "patch_size": 4, "image_size": TILE, "width": 32, "layers": 2, "heads": 2,
            "mlp_ratio": 2.0, "use_cls_token": True, "pool_type": "none",
        },
    },
    "data": {
        "datasets": {"made": {"annotation": "none"}}, "mix": "made:1", "tokenizer": "none",
        "batch_size": LANES, "seq_len": LENGTH,
    },
    # A large eps makes AdamW's step proportional to the gradient, so noise stays noise.
    "optim": {"lr": 0.01, "eps": 1e-3},
    "schedule": {"steps": 100, "warmup": 2},
    "run": {"out_dir": "unused", "threads": 1, "workers": 1, "device": "cpu"},
}  # fmt: skip

PLAIN, LONG = "plain", "twenty steps"
STEPS_OF = {LONG: 20, "replicate": 20, "shard": 20}
CASES: Mapping[str, tuple[str, ...]] = {
    PLAIN: (),
    LONG: (),
    "four parts": ("optim.accumulation=4",),
    "replicate": (),
    "replicate, two parts": ("optim.accumulation=2",),
    "shard": ("parallel.mode=shard",),
    "shard, two parts": ("parallel.mode=shard", "optim.accumulation=2"),
    "shard, tied": ("parallel.mode=shard", "model.weight_tying=true"),
    "tied": ("model.weight_tying=true",),
    "projector": ("train=projector",),
    "shard, projector": ("parallel.mode=shard", "train=projector"),
    "shard, full": ("parallel.mode=shard", "parallel.checkpointing=full"),
    "full": ("parallel.checkpointing=full",),
    "selective": ("parallel.checkpointing=selective",),
    "bf16": ("parallel.precision=bf16",),
    "shard, bf16": ("parallel.mode=shard", "parallel.precision=bf16"),
    "tensor": ("parallel.tensor=2",),
    "tensor, shard": ("parallel.tensor=2", "parallel.mode=shard"),
    "hybrid": ("parallel.mode=hybrid", "parallel.shard_ranks=2"),
    "hybrid, two parts": (
        "parallel.mode=hybrid", "parallel.shard_ranks=2", "optim.accumulation=2",
    ),
    "compiled": (
        "parallel.compile=true", "parallel.checkpointing=selective", "parallel.mode=shard",
    ),
    "contrastive": (),
    "contrastive, shard": ("parallel.mode=shard",),
}  # fmt: skip


def config_of(case: str, folder: Path) -> Any:
    settings = [f"run.out_dir={folder / 'run'}", *CASES[case]]
    if not case.startswith("contrastive"):
        return build(LanguageConfig, TREE, settings)
    recipe = ROOT / "training" / "configs" / "pe_tiny.yaml"
    # Stochastic depth draws other numbers on every rank.
    return load_config(recipe, [*settings, "optim.eps=1e-3", "model.vision.drop_path=0"])


class MadeSource:
    """Rows of two samples; every other row of the last lanes is text only."""

    def read(self, lane: int, position: int) -> Read[Sequence[Sample]]:
        rng = np.random.default_rng((lane, position))
        text_only = lane >= LANES // 2 and position % 2 == 0
        row = [self._sample(rng, tiles) for tiles in ((0, 0) if text_only else (1, 2))]
        return Read(row=row, position=position + 1)

    def _sample(self, rng: np.random.Generator, tiles: int) -> Sample:
        text = rng.integers(0, IMAGE_TOKEN, size=int(rng.integers(5, 12)))
        tokens = np.concatenate([np.full(4 * tiles, IMAGE_TOKEN), text])
        labels = np.where(np.arange(len(tokens)) >= 4 * tiles + 2, tokens, IGNORED)
        pixels = rng.integers(0, 256, size=(tiles, TILE, TILE, 3), dtype=np.uint8)
        return Sample(tokens=tokens, labels=labels, tiles=pixels, name=str(rng.integers(99)))


class MadeTask(Task):
    """A tiny language model on made-up conversations."""

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config

    def learner(self) -> Learner:
        return LanguageLearner(self.config, TileSpec(tile_size=TILE))

    def initial(self, name: str, shape: torch.Size) -> Tensor:
        return initial_value(name, shape, seed=1, layers=2, gain=None)

    def trainable(self, name: str) -> bool:
        return self.config.train == "all" or name.startswith("vision_projector.")

    def stream(self, group: Group) -> LaneStream[Any, LanguageBatch]:
        return LaneStream(
            MadeSource(),
            lambda rows: collate(rows, LENGTH),
            lanes=LANES,
            parts=self.config.optim.accumulation,
            group=group,
            workers=1,
        )

    def evaluate(self, learner: Learner) -> dict[str, float]:
        raise NotImplementedError

    def export(self, weights: Mapping[str, Tensor], folder: Path) -> None:
        raise NotImplementedError


def task_of(config: Any) -> Task:
    return MadeTask(config) if isinstance(config, LanguageConfig) else make_task(config)


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(case: str, folder: Path, group: Group, steps: int) -> None:
    """Trains one case; the main rank writes what came out under the case's name."""
    config = config_of(case, folder)
    trainer = Trainer(config, task_of(config), group)
    sharded = isinstance(trainer.learner, FSDPModule)
    before = {name: whole(p) for name, p in trainer.model.named_parameters()}
    share = sum(parallel.local_part(p).numel() for p in trainer.model.parameters())
    results = [trainer.step(trainer.stream.next()) for _ in range(steps)]
    figures = {}
    if case.startswith("contrastive"):
        with parallel.unsharded(trainer.learner):
            figures = trainer.task.evaluate(trainer.learner)
    after = {name: whole(p) for name, p in trainer.model.named_parameters()}
    trainer.stream.close()
    trainer.checkpoints.close()
    if group.is_main:
        size = sum(tensor.numel() for tensor in after.values())
        facts = {"losses": [r.loss for r in results], "norms": [r.grad_norm for r in results]}
        facts |= {"share": share / size, "sharded": sharded, "figures": figures}
        (folder / f"{case}.json").write_text(json.dumps(facts))
        save_file({k: v.contiguous() for k, v in before.items()}, folder / f"{case}.before")
        save_file({k: v.contiguous() for k, v in after.items()}, folder / f"{case}.after")


class Runs:
    """What cases came to on one number of ranks."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def facts(self, case: str) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / f"{case}.json").read_text())
        return found

    def before(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case}.before")

    def after(self, case: str) -> dict[str, Tensor]:
        return load_file(self.folder / f"{case}.after")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def start(ranks: int, cases: Sequence[str], folder: Path, steps: int | None = None) -> Runs:
    """Runs this file on so many ranks, as torchrun would."""
    ports = [str(free_port()) for _ in (1, 2)]  # of the group of each width of tensor parallel
    running = []
    for rank in range(ranks):
        environment = {
            **os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1",
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORTS": " ".join(ports),
        }  # fmt: skip
        command = [sys.executable, str(Path(__file__)), str(folder), str(steps or 0), *cases]
        running.append(subprocess.Popen(command, env=environment))
    try:
        assert [process.wait(300) for process in running] == [0] * ranks
    finally:
        for process in running:
            process.kill()
    return Runs(folder)


def main(folder: str, steps: str, *cases: str) -> None:
    ports = os.environ.get("MASTER_PORTS", "0 0").split()
    for tensor, port in zip((1, 2), ports, strict=True):
        some = [case for case in cases if case.startswith("tensor") == (tensor == 2)]
        if some:
            os.environ["MASTER_PORT"] = port
            with process_group("cpu", tensor) as group:
                for case in some:
                    train(case, Path(folder), group, int(steps) or STEPS_OF.get(case, STEPS))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.exit()


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    cases = (
        PLAIN, LONG, "four parts", "tied", "projector", "full", "selective", "bf16", "contrastive",
    )  # fmt: skip
    main(str(folder), "0", *cases)
    torch.set_num_threads(threads)
    return Runs(folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    cases = (
        "replicate", "replicate, two parts", "shard", "shard, two parts", "shard, tied",
        "shard, projector", "shard, full", "shard, bf16", "tensor", "contrastive, shard",
    )  # fmt: skip
    return start(2, cases, tmp_path_factory.mktemp("two"))


def assert_same(found: Runs, case: str, expected: Runs, like: str) -> None:
    """Losses within 1e-5, norms and what training changed within 1e-4."""
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
    """Batches in which one rank has no image are among them."""
    assert_same(two, case, one, like)


def test_an_evaluation_calls_parts_of_a_sharded_model(two: Runs, one: Runs) -> None:
    found = two.facts("contrastive, shard")["figures"]
    assert found == pytest.approx(one.facts("contrastive")["figures"], abs=0.02)


@pytest.mark.parametrize("case", ["four parts", "full", "selective"])
def test_parts_and_recomputation_change_nothing(one: Runs, case: str) -> None:
    """TRN-10: 4 parts of 2 rows are one of 8."""
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
    # The position table's 17 rows go by 9 and 8.
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


def test_xformers_is_given_documents_in_one_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the package, which needs a GPU, attention as its documentation has it."""

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
    """HSDP, and tensor parallel over shards."""
    folders = {ranks: tmp_path / str(ranks) for ranks in (1, 2, 4)}
    for folder in folders.values():
        folder.mkdir()
    alone = start(1, [PLAIN], folders[1], 50)
    two = start(2, ["replicate", "shard"], folders[2], 50)
    four = start(4, ["hybrid", "hybrid, two parts", "tensor, shard"], folders[4], 50)
    for runs, case in (
        (two, "replicate"), (two, "shard"), (four, "hybrid"), (four, "hybrid, two parts"),
        (four, "tensor, shard"),
    ):  # fmt: skip
        assert_same(runs, case, alone, PLAIN)


@pytest.mark.slow
def test_compiled_blocks_learn_the_same(tmp_path: Path) -> None:
    runs = start(1, [PLAIN, "compiled"], tmp_path)
    found, expected = runs.facts("compiled"), runs.facts(PLAIN)
    assert found["losses"] == pytest.approx(expected["losses"], rel=1e-4)
