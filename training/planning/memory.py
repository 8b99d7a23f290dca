"""Plans a language training run before it starts: memory per GPU, FLOPs and time.

Everything is computed on the meta device, without data, weights or a GPU. The plan assumes the
costliest step: every row is full, with as many tiles as fit beside one text token, and all other
tokens are learned text. (Rows without images have more logits.) Each rank holds

- weights, 4 bytes per parameter divided by the ranks that share them; the same for gradients of
  trained parameters, and twice that for AdamW's moments;
- gathered weights: the learner's own (head, norm, projector) during the whole step, plus the
  current and the next block; the largest gradient before it is reduced; and, if parts accumulate
  before gradients are exchanged, float32 gradients of everything trained;
- activations, measured by running each kind of block on the meta device and adding up the tensors
  that autograd keeps: all of them without checkpointing, matrix products with `selective`, block
  inputs with `full`; with both of the latter, one block's activations during its recomputation;
- logits of learned tokens in float32, and the batch itself.

GPU kernels and the allocator need more memory, so a tenth must stay free. The plan uses the fewest
accumulation parts that achieve this, but at least the recipe's. `docs/training-plan.md` has the
formulas. Time is the model's own FLOPs at an assumed share of the GPU's peak (MFU).

Legend: N rows, T tokens of a row, I tiles, C width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from perception_rt.errors import InputError
from perception_rt.models.decoder import rope_1d
from perception_rt.models.layers import (
    Attention,
    Rope,
    merge_heads,
    rotated_heads,
    sdpa_attention,
)
from perception_rt.models.plm import PerceptionLM
from training.model import lora
from training.planning.flops import Flops, Work, step_flops
from training.recipe.schema import LanguageConfig, TrainConfig
from training.tasks.language import HEAD_ROWS, is_trained

GIB = 2**30
MEMORY = 80 * GIB  # H100
PEAK_TFLOPS = 989.0  # H100, bf16, dense
MFU = 0.4
_USABLE = 0.9  # share of the memory
_FLOAT_BYTES = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Bytes on one rank.

    Attributes:
        weights: parameters.
        gradients: gradients of trained parameters.
        moments: AdamW's two moments.
        gathered: gathered weights, and gradients that are not yet reduced.
        tower: activations of the vision tower.
        projector: activations of the projector.
        decoder: activations of the decoder.
        working: activations of the block being recomputed.
        logits: logits of learned tokens.
        batch: the batch.
    """

    weights: int
    gradients: int
    moments: int
    gathered: int
    tower: int
    projector: int
    decoder: int
    working: int
    logits: int
    batch: int

    @property
    def total(self) -> int:
        """Bytes of all parts together."""
        return sum(getattr(self, name) for name in self.__slots__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A recipe on a number of GPUs.

    Attributes:
        ranks: number of GPUs.
        accumulation: accumulation parts per step.
        rows: sequences per part.
        memory: memory per GPU.
        seconds: time per step.
    """

    ranks: int
    accumulation: int
    rows: int
    memory: Memory
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether a tenth of the memory stays free."""
        return self.memory.total <= _USABLE * MEMORY


class _Fused(torch.autograd.Function):
    """Keeps for the backward pass what a fused attention keeps: inputs, output, a sum per row."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        output = torch.empty_like(query)
        sums = query.new_empty(query.shape[:-1], dtype=torch.float32)
        ctx.save_for_backward(query, key, value, output, sums)
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        raise NotImplementedError


def _fused_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    heads: int,
    kv_heads: int | None = None,
    rope: Rope | None = None,
    causal: bool = False,
    mask: Any = None,
) -> Tensor:
    """An `Attention` that computes nothing and keeps what a fused kernel keeps."""
    q, k, v = rotated_heads(query, key, value, heads=heads, kv_heads=kv_heads, rope=rope)
    return merge_heads(_Fused.apply(q, k, v))


def planned_model(config: LanguageConfig, attention: Attention = sdpa_attention) -> PerceptionLM:
    """Creates the recipe's model on the meta device; trained parameters require a gradient."""
    with torch.device("meta"):
        model = PerceptionLM(config.model, attention=attention)
    if config.lora is not None:
        lora.add_updates(model, config.lora)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_trained(config, name))
    return model


def full_rows(config: LanguageConfig, rows: int) -> Work:
    """Returns the costliest work of `rows` rows."""
    data, per_tile = config.data, config.model.tokens_per_tile
    tiles = (data.seq_len - 1) // per_tile
    return Work(
        tokens=rows * data.seq_len,
        pairs=rows * data.seq_len * (data.seq_len + 1) // 2,
        tiles=rows * tiles,
        labelled=rows * (data.seq_len - tiles * per_tile),
    )


def kept_bytes(run: Callable[[], Tensor]) -> int:
    """Measures the bytes that autograd keeps for the backward pass, without parameters."""
    kept: dict[int, Any] = {}  # storages by id; kept alive so that ids stay unique

    def pack(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            storage = tensor.untyped_storage()
            kept[id(storage)] = storage
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
        total = sum(storage.nbytes() for storage in kept.values())
        del output
    return total


@dataclass(frozen=True, slots=True, kw_only=True)
class _Kept:
    """Bytes that a stack of blocks keeps during a step, and for one block being recomputed."""

    stored: int
    working: int


class Planner:
    """Computes the memory of one recipe.

    Args:
        config: the recipe.
    """

    def __init__(self, config: LanguageConfig) -> None:
        self.config = config
        self.half = config.parallel.precision == "bf16"
        self.width = 2 if self.half else _FLOAT_BYTES  # bytes per activation
        self.model = planned_model(config, _fused_attention)
        sizes = {name: p.numel() for name, p in self.model.named_parameters()}
        self.parameters = sum(sizes.values())
        self.trained = sum(n for name, n in sizes.items() if is_trained(config, name))
        self._units = self._sharing_units()
        if self.half:
            self.model.to(torch.bfloat16)
        self.model.train()

    def memory(self, ranks: int, accumulation: int, rows: int) -> Memory:
        """Returns the bytes on one of `ranks` ranks for parts of `rows` rows."""
        parallel = self.config.parallel
        shares = {"replicate": 1, "shard": ranks, "hybrid": parallel.shard_ranks}[parallel.mode]
        weights = _FLOAT_BYTES * self.parameters // shares
        gradients = _FLOAT_BYTES * self.trained // shares
        work = full_rows(self.config, rows)
        tower, projector, decoder = self._tower(work), self._projector(work), self._decoder(rows)
        head = work.labelled * self.config.model.decoder.vocab_size
        piece = min(work.labelled, HEAD_ROWS) * self.config.model.decoder.vocab_size
        side = self.config.model.vision.image_size
        pixels = work.tiles * 3 * side**2
        mask = rows * self.config.data.seq_len**2 if parallel.attention == "sdpa" else 0
        return Memory(
            weights=weights,
            gradients=gradients,
            moments=2 * gradients,
            gathered=self._gathered(ranks, shares, accumulation),
            tower=tower.stored,
            projector=projector,
            decoder=decoder.stored,
            working=max(tower.working, decoder.working),
            logits=_FLOAT_BYTES * head + (_FLOAT_BYTES + self.width) * piece,
            batch=pixels * (1 + _FLOAT_BYTES + self.width) + mask,
        )

    def _sharing_units(self) -> list[tuple[int, int, bool]]:
        """Parameters, trained parameters and whether it is the root, for each unit of sharding."""
        model = self.model
        modules: list[nn.Module] = [*model.vision_model.transformer.resblocks, *model.layers]
        if not model.decoder_config.weight_tying:
            modules.append(model.tok_embeddings)
        units = [(_count(module), _count(module, trained=True), False) for module in modules]
        rest = self.parameters - sum(size for size, _, _ in units)
        trained = self.trained - sum(size for _, size, _ in units)
        return [*units, (rest, trained, True)]

    def _gathered(self, ranks: int, shares: int, accumulation: int) -> int:
        """Bytes of gathered weights, and of gradients that are not yet reduced."""
        if self.config.parallel.mode == "replicate" and not self.half:
            return _FLOAT_BYTES * self.trained if ranks > 1 else 0  # gradients in one message
        own = next(size for size, _, root in self._units if root)
        largest = max(size for size, _, root in self._units if not root)
        gradient = max(trained for _, trained, _ in self._units)
        whole = self.trained if accumulation > 1 and shares == ranks else 0
        weights = self.width * (own + 2 * largest)
        return weights + (self.width + _FLOAT_BYTES) * gradient + _FLOAT_BYTES * whole

    def _tower(self, work: Work) -> _Kept:
        tower = self.model.vision_model
        if not any(p.requires_grad for p in tower.parameters()):
            return _Kept(stored=0, working=0)
        config = tower.config
        tokens = config.grid**2 + tower.num_prefix
        pixels = self._activation(work.tiles, 3, config.image_size, config.image_size)
        x = self._activation(work.tiles, tokens, config.width)
        grid = (config.grid, config.grid)
        rope = tower.rope_table(grid)
        embedding = kept_bytes(lambda: tower.embed(pixels.detach(), tower.token_table(grid)))
        block = tower.transformer.resblocks[-1]
        kept = self._stack(block, config.layers, x, lambda: block(x, rope=rope))
        return _Kept(stored=embedding + kept.stored, working=kept.working)

    def _projector(self, work: Work) -> int:
        projector, config = self.model.vision_projector, self.model.vision_model.config
        x = self._activation(work.tiles, config.grid**2, config.width)
        x.requires_grad_(any(p.requires_grad for p in self.model.vision_model.parameters()))
        return kept_bytes(lambda: projector(x))

    def _decoder(self, rows: int) -> _Kept:
        config, length = self.model.decoder_config, self.config.data.seq_len
        x = self._activation(rows, length, config.dim)
        rope = rope_1d(config, length, torch.device("meta"))
        layer = self.model.layers[-1]
        kept = self._stack(layer, config.n_layers, x, lambda: layer(x, rope))
        norm = kept_bytes(lambda: self.model.norm(x))
        return _Kept(stored=kept.stored + norm, working=kept.working)

    def _stack(self, block: nn.Module, layers: int, x: Tensor, run: Callable[[], Tensor]) -> _Kept:
        """Bytes kept by equal blocks in sequence under the recipe's checkpointing."""
        whole = kept_bytes(run)
        match self.config.parallel.checkpointing:
            case "none":
                return _Kept(stored=layers * whole, working=0)
            case "full":
                return _Kept(stored=layers * x.nbytes, working=whole)
            case _:
                rows = x.numel() // x.shape[-1]
                wide = sum(p.shape[0] for p in block.parameters() if p.ndim == 2)
                products = rows * self.width * (wide + x.shape[-1])  # with the attention's output
                return _Kept(stored=layers * (x.nbytes + products), working=whole)

    def _activation(self, *shape: int) -> Tensor:
        dtype = torch.bfloat16 if self.half else torch.float32
        return torch.empty(shape, dtype=dtype, device="meta", requires_grad=True)


def _count(module: nn.Module, *, trained: bool = False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def make_plan(planner: Planner, ranks: int) -> Plan:
    """Plans a recipe on a number of GPUs with the fewest accumulation parts that fit.

    If nothing fits, the plan has parts of one row.

    Args:
        planner: the recipe's planner.
        ranks: number of GPUs.

    Raises:
        InputError: the ranks do not divide the batch, or the recipe uses tensor parallelism.
    """
    config = planner.config
    data, parallel = config.data, config.parallel
    if parallel.tensor != 1:
        raise InputError(f"--plan needs parallel.tensor 1, not {parallel.tensor}")
    if ranks < 1 or data.batch_size % ranks:
        raise InputError(f"data.batch_size {data.batch_size} is not divisible by {ranks} ranks")
    if parallel.mode == "hybrid" and ranks % parallel.shard_ranks:
        raise InputError(
            f"{ranks} ranks cannot form groups of parallel.shard_ranks {parallel.shard_ranks}"
        )
    share = data.batch_size // ranks
    flops = planned_flops(config, planner.model)
    peak = (config.run.peak_tflops or PEAK_TFLOPS) * 1e12
    for parts in range(min(config.optim.accumulation, share), share + 1):
        if share % parts:
            continue
        plan = Plan(
            ranks=ranks,
            accumulation=parts,
            rows=share // parts,
            memory=planner.memory(ranks, parts, share // parts),
            seconds=flops.model / (ranks * peak * MFU),
        )
        if plan.fits:
            break
    return plan


def planned_flops(config: LanguageConfig, model: PerceptionLM) -> Flops:
    """Returns the FLOPs of a step of full rows."""
    return step_flops(
        model, full_rows(config, config.data.batch_size), config.parallel.checkpointing
    )


def report(config: TrainConfig, ranks: Sequence[int]) -> str:
    """Formats the table of `--plan`.

    Args:
        config: the recipe.
        ranks: numbers of GPUs, one column each.

    Raises:
        InputError: the recipe is not for language training, or see `make_plan`.
    """
    if not isinstance(config, LanguageConfig):
        raise InputError("--plan needs a recipe of task language")
    planner = Planner(config)
    plans = [make_plan(planner, number) for number in ranks]
    flops = planned_flops(config, planner.model)
    row, data = full_rows(config, 1), config.data
    tokens, images = data.batch_size * data.seq_len, data.batch_size * row.tiles
    rows: list[tuple[str, list[str]]] = [
        ("accumulation", [f"{p.accumulation}" for p in plans]),
        ("rows per part", [f"{p.rows}" for p in plans]),
    ]
    rows += [
        (f"{label} (GiB)", [f"{getattr(p.memory, name) / GIB:.2f}" for p in plans])
        for name, label in _MEMORY_LABELS.items()
    ]
    rows += [
        (f"of {MEMORY // GIB} GiB", [f"{p.memory.total / MEMORY:.0%}{_verdict(p)}" for p in plans]),
        ("step (s)", [f"{p.seconds:.1f}" for p in plans]),
        ("tokens/s", [f"{tokens / p.seconds:,.0f}" for p in plans]),
        ("tiles/s", [f"{images / p.seconds:,.0f}" for p in plans]),
        (
            f"{config.schedule.steps:,} steps (days)",
            [f"{p.seconds * config.schedule.steps / 86400:.1f}" for p in plans],
        ),
    ]
    peak = config.run.peak_tflops or PEAK_TFLOPS
    parallel = config.parallel
    return "\n".join(
        [
            f"parameters     {planner.parameters:,}, of which {planner.trained:,} are trained",
            f"step           {data.batch_size:,} rows of {data.seq_len:,} tokens: "
            f"{row.tiles} tiles and {row.labelled:,} text tokens each",
            f"FLOPs          {flops.model:.3e} per step, and {flops.recomputed:.3e} recomputed",
            f"parallel       {parallel.mode}, {parallel.precision}, "
            f"checkpointing {parallel.checkpointing}",
            f"assumed MFU    {MFU:.0%} of {peak:g} TFLOP/s",
            "",
            _line("GPUs", [f"{p.ranks}" for p in plans]),
            *(_line(label, cells) for label, cells in rows),
        ]
    )


_MEMORY_LABELS = {
    "weights": "weights",
    "gradients": "gradients",
    "moments": "moments",
    "gathered": "gathered weights, gradients",
    "tower": "tower activations",
    "projector": "projector activations",
    "decoder": "decoder activations",
    "working": "recomputed block",
    "logits": "logits",
    "batch": "batch",
    "total": "total",
}


def _verdict(plan: Plan) -> str:
    return "" if plan.fits else ": too much"


def _line(label: str, cells: Sequence[str]) -> str:
    return f"{label:34}" + "".join(f"{cell:>16}" for cell in cells)
