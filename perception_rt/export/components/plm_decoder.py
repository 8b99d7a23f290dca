"""The decoder of a PLM as an export sees it: embedding, and runs of layers with their caches.

Eager runs layer by layer, each read when it is its turn. What leaves one part is what the next one
starts from.

Legend: T tokens, C decoder width, V vocabulary, L logit positions.
"""

import itertools
from collections.abc import Mapping
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception_rt.checkpoint.source import WeightSource
from perception_rt.export.components.parameters import (
    decoder_parameters,
    embed_parameters,
)
from perception_rt.export.components.pe import (
    Recipe,
    Reference,
    load_module,
    ranges_of,
    run_measured,
    tensor_formats,
)
from perception_rt.export.components.traced_modules import DecoderGraph, EmbedGraph
from perception_rt.export.graph.lazy_weights import Array, Weight, row_ranges
from perception_rt.export.graph.lowering import as_is
from perception_rt.export.graph.trace import Traced, trace
from perception_rt.export.plan import PlmPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format, Scheme
from perception_rt.export.quantization.sensitivity import Measured, MeasuredHead
from perception_rt.models.decoder import DecoderLayer, RmsNorm, rope_1d
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.plm_config import DecoderConfig
from perception_rt.processing.llm_tokenizer import open_tokenizer
from perception_rt.processing.prompt import Tiles, Turn, encode_prompt

PART_BYTES = 3 * 2**29  # of a decoder part's weights: what checking a package may hold at once
GATE_STEPS = 8  # the last tokens of the reference prompt are fed one by one
_TEXT_TOKENS = 48  # before and after the image tokens of the reference prompt
_IMAGE_TOKENS = 64  # of it, at most

# Bytes per weight, scales included.
_WEIGHT_BYTES: Mapping[Format | str, float] = {
    "float32": 4,
    "float16": 2,
    "int8_rows": 1,
    "int8_blocks": 1.125,
    "int4_blocks": 0.625,
    "fp8": 1,
}


class HasFeatures(Protocol):
    """What is known of images when the prompt is made: their tokens, (n, t, C)."""

    features: Tensor | None


class EmbedExport:
    """The embedding; with the image tokens of `tiles`, its reference makes the prompt's hidden."""

    name = "embed"

    def __init__(self, plan: PlmPlan, source: WeightSource, tiles: HasFeatures) -> None:
        self.plan = plan
        self.config = plan.config.decoder
        self.source = source
        self.tiles = tiles
        self.prompt = torch.empty(0)

    def reference(self, scheme: Scheme | None) -> Reference:
        """Ids, and the prompt's hidden; in fp8 of a real prompt, which ranges are found on."""
        prompt = self._prompt() if scheme == "fp8" else None
        ids, self.prompt = self._random() if prompt is None else prompt
        hidden = self._embed(ids)
        return Reference(
            inputs={contract.EMBED: {contract.TOKENS: ids[None]}},
            outputs={contract.EMBED: {contract.HIDDEN: hidden[None].numpy()}},
        )

    def _prompt(self) -> tuple[Array, Tensor] | None:
        """Ids (T,) of questions on a tile, as users put them, and hidden (1, T', C) with the tile.

        None without a tokenizer, or where there is no room for a tile.
        """
        count = self.plan.config.tokens_per_tile
        room = min(self.config.max_seqlen, count + calibration.MOST_TOKENS)
        if self.plan.tokenizer is None:
            return None
        assert self.tiles.features is not None
        tokenizer = open_tokenizer(*self.plan.tokenizer)
        text = " ".join(calibration.prompts(self.plan.calibration))
        prompt = encode_prompt(tokenizer, [Turn("user", (Tiles(1), text))], count)
        while len(prompt.ids) > room:
            text = text[: max(0, len(text) * room // len(prompt.ids) - 1)]
            if not text:
                return None
            prompt = encode_prompt(tokenizer, [Turn("user", (Tiles(1), text))], count)
        ((start, _),) = prompt.image_spans
        ids = np.concatenate([prompt.ids[:start], prompt.ids[start + count :]])
        hidden = self._embed(ids)
        image = self.tiles.features[0]
        return ids, torch.cat([hidden[:start], image, hidden[start:]])[None]

    def _random(self) -> tuple[Array, Tensor]:
        """Seeded ids, and hidden with some tokens of a tile between them."""
        assert self.tiles.features is not None
        room = self.config.max_seqlen
        image = self.tiles.features[0, : max(0, min(_IMAGE_TOKENS, room - 2))]
        text = max(1, min(_TEXT_TOKENS, (room - len(image)) // 2))
        # From the first rows of the vocabulary, so that only those are read.
        _, rows = next(row_ranges((self.config.vocab_size, self.config.dim)))
        ids = np.random.default_rng(0).integers(0, rows, 2 * text, np.int64)
        hidden = self._embed(ids)
        return ids, torch.cat([hidden[:text], image, hidden[text:]])[None]

    def _embed(self, ids: Array) -> Tensor:
        """Rows (T, C) of the embedding."""
        rows, places = np.unique(ids, return_inverse=True)
        table = [self.source.load_rows("tok_embeddings.weight", i, i + 1) for i in rows.tolist()]
        return torch.cat(table).float()[torch.from_numpy(places)]

    def formats(self, measured: Measured) -> dict[str, Format]:
        """Blocks, as the head."""
        return table_formats(self.plan)

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The gather."""
        graph = EmbedGraph(self.config)
        example = {contract.TOKENS: torch.zeros(2, 3, dtype=torch.int64, device="meta")}
        dynamic = {contract.TOKENS: {0: contract.BATCH, 1: contract.LENGTH}}
        traced = trace(graph, example, dynamic=dynamic, output_names=[contract.HIDDEN])
        return traced, embed_parameters(self.source, graph)

    def recipes(self) -> dict[str, Recipe]:
        """The one graph, `embed`."""
        shape = (contract.BATCH, contract.LENGTH)
        tokens = TensorSpec(name=contract.TOKENS, dtype="int64", shape=shape)
        hidden = _hidden(contract.HIDDEN, self.config)
        recipe = Recipe(sources=[(tokens, as_is)], outputs={contract.HIDDEN: hidden})
        return {contract.EMBED: recipe}


class DecoderExport:
    """Consecutive layers of the decoder; the last part has the norm and the head too.

    Args:
        plan: what to make.
        source: the weights.
        index: of this part.
        layers: of this part.
        hidden: what eager says goes in, (1, T, C).
    """

    def __init__(
        self, plan: PlmPlan, source: WeightSource, index: int, layers: range, hidden: Tensor
    ) -> None:
        self.name = contract.decoder_part(index)
        self.plan = plan
        self.config = plan.config.decoder
        self.source = source
        self.layers = layers
        self.hidden = hidden
        self.is_last = layers.stop == self.config.n_layers

    def reference(self, scheme: Scheme | None) -> Reference:
        """The layers in eager, one in memory at a time; `hidden` becomes what comes out."""
        inputs: dict[str, Array] = {contract.HIDDEN: self.hidden.numpy()}
        rope = rope_1d(self.config, self.hidden.shape[1])
        measured = Measured()
        if scheme == "int8":
            scheme = "int8_rows" if self._blocks == "int8_rows" else None
        for index in self.layers:
            with torch.device("meta"):
                layer = DecoderLayer(self.config)
            prefix = f"layers.{index}."
            layer = load_module(layer, self.source, prefix)
            run = partial(layer, self.hidden, rope)
            ranges = ranges_of(self.plan)
            self.hidden = run_measured(layer, run, scheme, measured, prefix, ranges)
        outputs = {contract.HIDDEN_OUT: self.hidden.numpy()}
        if self.is_last:
            outputs = {contract.LOGITS: self._logits(measured if scheme == "fp8" else None)}
        return Reference(
            inputs={self.name: inputs}, outputs={self.name: outputs}, measured=measured
        )

    def _logits(self, measured: Measured | None) -> Array:
        """Logits (1, L, V) of the last GATE_STEPS + 1 tokens, the head read in pieces.

        Args:
            measured: what fp8 does to the head is added to; None if that is not asked.
        """
        with torch.device("meta"):
            norm = RmsNorm(self.config.dim, self.config.norm_eps)
        norm = load_module(norm, self.source, "norm.")
        key = "tok_embeddings.weight" if self.config.weight_tying else "output.weight"
        kept = GATE_STEPS + 1
        pieces = []
        with torch.inference_mode():
            tokens = norm(self.hidden if measured is not None else self.hidden[:, -kept:])
            head = MeasuredHead(tokens)
            for start, stop in row_ranges((self.config.vocab_size, self.config.dim)):
                weight = self.source.load_rows(key, start, stop).float()
                exact = F.linear(tokens, weight)
                pieces.append(exact[:, -kept:])
                if measured is not None:
                    head.add(exact, weight, start)
            if measured is not None:
                head.put(measured, key)
            logits: Array = torch.cat(pieces, dim=-1).numpy()
        return logits

    @property
    def _blocks(self) -> Format | None:
        return block_format(self.plan)

    def formats(self, measured: Measured) -> dict[str, Format]:
        """fp8, or W8A8 by rows, where that does little harm; else blocks; or blocks of 4 bits."""
        blocks = self._blocks
        if blocks is None:
            return {}
        if blocks == "fp8":
            return tensor_formats(measured, blocks)
        found = table_formats(self.plan)
        harmed = measured.harmed()
        for index in self.layers:
            for name in _LINEARS:
                key = f"layers.{index}.{name}.weight"
                found[key] = "int8_blocks" if key in harmed else blocks
        return found

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The layers over their caches."""
        graph = DecoderGraph(self.config, self.layers)
        examples, dynamic = {}, {}
        for spec in self._sources():
            sizes = [size if isinstance(size, int) else 2 + i for i, size in enumerate(spec.shape)]
            dtype = getattr(torch, "float32" if spec.dtype == "float16" else spec.dtype)
            examples[spec.name] = torch.zeros(sizes, dtype=dtype, device="meta")
            dynamic[spec.name] = {i: s for i, s in enumerate(spec.shape) if isinstance(s, str)}
        # Equal names are equal sizes, so each name must have one size in the examples.
        names = [*self._outputs(), *(spec.name for spec in self._picks())]
        traced = trace(graph, examples, dynamic=dynamic, output_names=names)
        excluded = self.plan.config.image_token_id
        return traced, decoder_parameters(self.source, graph, self.config, excluded)

    def recipes(self) -> dict[str, Recipe]:
        """The one graph of this part."""
        picks = self._picks() if self.plan.target.picks_tokens else []
        recipe = Recipe(
            sources=[(spec, as_is) for spec in self._sources()],
            outputs=self._outputs() | {spec.name: spec for spec in picks},
            cached_attentions=len(self.layers),
        )
        return {self.name: recipe}

    def _sources(self) -> list[TensorSpec]:
        past = TensorSpec(name=contract.PAST_LENGTHS, dtype="int32", shape=(contract.BATCH,))
        specs = [_hidden(contract.HIDDEN, self.config), past]
        if self.is_last:
            shape = (contract.BATCH, contract.POSITIONS)
            specs.append(TensorSpec(name=contract.LOGIT_POSITIONS, dtype="int64", shape=shape))
        return specs + self._caches()

    def _outputs(self) -> dict[str, TensorSpec]:
        specs = [_hidden(contract.HIDDEN_OUT, self.config)]
        if self.is_last:
            shape = (contract.BATCH, contract.POSITIONS, self.config.vocab_size)
            specs = [TensorSpec(name=contract.LOGITS, dtype="float32", shape=shape)]
        for cache in self._caches():
            name = contract.updated(cache.name)
            specs.append(TensorSpec(name=name, dtype=cache.dtype, shape=cache.shape))
        return {spec.name: spec for spec in specs}

    def _picks(self) -> list[TensorSpec]:
        """The largest logit and its token."""
        if not self.is_last:
            return []
        shape = (contract.BATCH, contract.POSITIONS)
        return [
            TensorSpec(name=contract.TOP_LOGIT, dtype="float32", shape=shape),
            TensorSpec(name=contract.TOP_ID, dtype="int64", shape=shape),
        ]

    def _caches(self) -> list[TensorSpec]:
        config = self.config
        slots = config.max_seqlen if self.plan.target.fixed_slots else contract.SLOTS
        shape = (contract.BATCH, config.kv_heads, slots, config.head_dim)
        return [
            TensorSpec(name=name(index), dtype=self.plan.float_dtype, shape=shape)
            for index in self.layers
            for name in (contract.key_cache, contract.value_cache)
        ]


_LINEARS = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)


def block_format(plan: PlmPlan) -> Format | None:
    """How the linear weights of the decoder's blocks are quantised."""
    if plan.precision == "fp8":
        return "fp8"
    if not plan.quantized:
        return None
    return "int4_blocks" if plan.blocks == "int4" else "int8_rows"


def table_formats(plan: PlmPlan) -> dict[str, Format]:
    """How the embedding and the head are quantised; tied, they are the same bytes."""
    if not plan.quantized:
        return {}
    format_: Format = "int4_blocks" if plan.precision == "int4" else "int8_blocks"
    return {"tok_embeddings.weight": format_, "output.weight": format_}


def decoder_parts(plan: PlmPlan) -> list[range]:
    """Runs of layers whose weights are at most about PART_BYTES, the head with the last."""
    config = plan.config.decoder
    kv_dim = config.kv_heads * config.head_dim
    layer = config.dim * (2 * config.dim + 2 * kv_dim + 3 * config.ffn_dim)
    per_weight = _WEIGHT_BYTES[block_format(plan) or plan.float_dtype]
    tables = table_formats(plan).get("output.weight", plan.float_dtype)
    head = config.vocab_size * config.dim * _WEIGHT_BYTES[tables]
    layer_bytes = layer * per_weight
    total = layer_bytes * config.n_layers + head
    count = min(config.n_layers, max(1, -int(-total // PART_BYTES)))
    # The head weighs as much as some layers: the parts share what all weigh together.
    edges = [min(config.n_layers, round(i * total / count / layer_bytes)) for i in range(count)]
    edges = sorted({*edges, config.n_layers})
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]


def _hidden(name: str, config: DecoderConfig) -> TensorSpec:
    shape = (contract.BATCH, contract.LENGTH, config.dim)
    return TensorSpec(name=name, dtype="float32", shape=shape)
