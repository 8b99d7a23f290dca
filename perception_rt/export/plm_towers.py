"""The parts of a PLM as an export sees them: tiles, embedding, and runs of decoder layers.

Eager runs layer by layer, each read when it is its turn, so that the peak is a layer and not the
model. What leaves one part is what the next one starts from.

Legend: T tokens, C decoder width, V vocabulary, L logit positions.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from perception_rt.checkpoint.source import WeightSource
from perception_rt.export.graphs import DecoderGraph, EmbedGraph, TileGraph
from perception_rt.export.lowering import as_is
from perception_rt.export.measure import Measured, measure_layers
from perception_rt.export.parameters import (
    decoder_parameters,
    embed_parameters,
    tile_parameters,
)
from perception_rt.export.plan import PlmPlan
from perception_rt.export.quantize import Format, Scheme
from perception_rt.export.towers import (
    Recipe,
    Reference,
    Tower,
    calibration_batches,
    gate_images,
    image_sources,
    load_module,
    measure_faithful,
    tensor_formats,
    trace_batch,
)
from perception_rt.export.trace import Traced, trace
from perception_rt.export.weights import Array, Weight, row_ranges
from perception_rt.models.decoder import DecoderLayer, RmsNorm, rope_1d
from perception_rt.models.plm import VisionProjector
from perception_rt.models.vision import VisionTower
from perception_rt.package import contract
from perception_rt.package.contract import TensorSpec
from perception_rt.plm_config import DecoderConfig
from perception_rt.processing.image import normalize

PART_BYTES = 3 * 2**29  # of a decoder part's weights: what checking a package may hold at once
_TOWER, _PROJECTOR = "vision_model.", "vision_projector."
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


class PlmExport:
    """What a PLM package is made of."""

    family = "plm"

    def __init__(self, plan: PlmPlan, source: WeightSource) -> None:
        self.plan = plan
        self.source = source

    def towers(self) -> Iterator[Tower]:
        """Tiles, embedding, then the decoder's parts; to be taken in order."""
        tiles = TileExport(self.plan, self.source)
        yield tiles
        embed = EmbedExport(self.plan, self.source, tiles)
        yield embed
        hidden = embed.prompt
        for index, layers in enumerate(decoder_parts(self.plan)):
            part = DecoderExport(self.plan, self.source, index, layers, hidden)
            yield part
            hidden = part.hidden

    def files(self) -> dict[str, bytes]:
        """The tokenizer's file, by its name in the package."""
        if self.plan.tokenizer is None:
            return {}
        spec, data = self.plan.tokenizer
        return {} if data is None or spec.file is None else {spec.file: data}

    def image(self) -> dict[str, Any]:
        """The manifest's `processing.image`."""
        return self.plan.tiles.to_dict()

    def text(self) -> dict[str, Any] | None:
        """The manifest's `processing.text`; None for a package that takes token ids only."""
        return None if self.plan.tokenizer is None else self.plan.tokenizer[0].to_dict()

    def options(self, layers: Mapping[str, Format | None]) -> dict[str, Any]:
        """The manifest's `target.options`."""
        own = {"blocks": self.plan.blocks} if self.plan.precision == "int4" else {}
        return {
            **own,
            "float_layers": [name for name, format_ in layers.items() if format_ is None],
            "block_layers": [name for name, format_ in layers.items() if format_ is not None],
        }


class TileExport:
    """Tower and projector: `vision` from uint8 tiles, `pixels` from normalised ones."""

    name = "vision"

    def __init__(self, plan: PlmPlan, source: WeightSource) -> None:
        self.plan = plan
        self.source = source
        self.features: Tensor | None = None

    def reference(self, scheme: Scheme | None) -> Reference:
        """One tile through the eager tower; its image tokens stay in `features`."""
        spec = self.plan.tiles.tile
        pictures = gate_images(self.plan, spec, 1)
        images = pictures[:1]
        pixels = normalize(images, spec)
        batches = calibration_batches(pictures, spec, 1)
        self.features, measured = (
            self._whole(batches, scheme) if scheme == "fp8" else self._streamed(batches[0], scheme)
        )
        outputs = {contract.IMAGE_FEATURES: self.features.numpy()}
        return Reference(
            inputs={
                contract.VISION: {contract.IMAGES_U8: images},
                contract.PIXELS: {contract.PIXELS_F32: pixels},
            },
            outputs={contract.VISION: outputs, contract.PIXELS: outputs},
            measured=measured,
        )

    def _whole(self, batches: Sequence[Tensor], scheme: Scheme) -> tuple[Tensor, Measured]:
        """Image tokens, and the linear layers of a tower that is run several times over."""
        config = self.plan.config
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        eye = nn.ModuleDict({_TOWER[:-1]: tower, _PROJECTOR[:-1]: projector})

        def call(pixels: Tensor) -> Tensor:
            tokens = tower.forward_features(pixels, norm=True, strip_class_token=True)
            features: Tensor = projector(tokens)
            return features

        measured = measure_faithful(eye, call, batches, scheme)
        with torch.inference_mode():
            return call(batches[0]), measured

    def _streamed(self, pixels: Tensor, scheme: Scheme | None) -> tuple[Tensor, Measured]:
        """Image tokens, and the linear layers; one block of the tower is in memory at a time."""
        config = self.plan.config
        measured = Measured()
        with torch.device("meta"):
            tower, projector = VisionTower(config.vision), VisionProjector(config)
        blocks, tower.transformer.resblocks = tower.transformer.resblocks, nn.ModuleList()
        tower = load_module(tower, self.source, _TOWER)
        projector = load_module(projector, self.source, _PROJECTOR)
        grid = (config.vision.grid, config.vision.grid)
        rope = tower.rope_table(grid)
        embed = partial(tower.embed, pixels, tower.token_table(grid))
        x = _run(tower, embed, scheme, measured, _TOWER)
        for index, block in enumerate(blocks):
            prefix = f"{_TOWER}transformer.resblocks.{index}."
            # A copy, so that the block goes when its turn is over.
            layer = load_module(copy.deepcopy(block), self.source, prefix)
            x = _run(layer, partial(layer, x, rope=rope), scheme, measured, prefix)
        tokens = tower.ln_post(x)[:, tower.num_prefix :]
        features = _run(projector, partial(projector, tokens), scheme, measured, _PROJECTOR)
        return features, measured

    def formats(self, measured: Measured) -> dict[str, Format]:
        """8 bits where that does little harm."""
        return tensor_formats(measured, self.plan.scheme)

    def traced(self) -> tuple[Traced, dict[str, Weight]]:
        """The tower on the tile's grid, and the projector."""
        config, spec = self.plan.config, self.plan.tiles.tile
        graph = TileGraph(config)
        example = torch.empty(2, 3, spec.height, spec.width, device="meta")
        names = [contract.IMAGE_FEATURES]
        traced = trace_batch(graph, contract.PIXELS_F32, example, names)
        return traced, tile_parameters(self.source, graph, config)

    def recipes(self) -> dict[str, Recipe]:
        """`vision` and `pixels`."""
        config = self.plan.config
        shape = (contract.BATCH, config.tokens_per_tile, config.decoder.dim)
        features = TensorSpec(name=contract.IMAGE_FEATURES, dtype="float32", shape=shape)
        outputs = {contract.IMAGE_FEATURES: features}
        images, pixels = image_sources(self.plan.tiles.tile)
        layers = config.vision.layers
        return {
            contract.VISION: Recipe(sources=[images], outputs=outputs, attentions=layers),
            contract.PIXELS: Recipe(sources=[pixels], outputs=outputs, attentions=layers),
        }


class EmbedExport:
    """The embedding; with the image tokens of `tiles`, its reference makes the prompt's hidden."""

    name = "embed"

    def __init__(self, plan: PlmPlan, source: WeightSource, tiles: TileExport) -> None:
        self.plan = plan
        self.config = plan.config.decoder
        self.source = source
        self.tiles = tiles
        self.prompt = torch.empty(0)

    def reference(self, scheme: Scheme | None) -> Reference:
        """Seeded ids from the first rows of the vocabulary, so that only those are read."""
        assert self.tiles.features is not None
        _, rows = next(row_ranges((self.config.vocab_size, self.config.dim)))
        table = self.source.load_rows("tok_embeddings.weight", 0, rows).float()
        room = self.config.max_seqlen
        image = self.tiles.features[:1, : max(0, min(_IMAGE_TOKENS, room - 2))]
        text = max(1, min(_TEXT_TOKENS, (room - image.shape[1]) // 2))
        ids = np.random.default_rng(0).integers(0, rows, (1, 2 * text), np.int64)
        hidden = F.embedding(torch.from_numpy(ids), table)
        self.prompt = torch.cat([hidden[:, :text], image, hidden[:, text:]], dim=1)
        return Reference(
            inputs={contract.EMBED: {contract.TOKENS: ids}},
            outputs={contract.EMBED: {contract.HIDDEN: hidden.numpy()}},
        )

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
            self.hidden = _run(layer, run, scheme, measured, prefix)
        outputs = {contract.HIDDEN_OUT: self.hidden.numpy()}
        if self.is_last:
            outputs = {contract.LOGITS: self._logits()}
        return Reference(
            inputs={self.name: inputs}, outputs={self.name: outputs}, measured=measured
        )

    def _logits(self) -> Array:
        """Logits (1, L, V) of the last GATE_STEPS + 1 tokens, the head read in pieces."""
        with torch.device("meta"):
            norm = RmsNorm(self.config.dim, self.config.norm_eps)
        norm = load_module(norm, self.source, "norm.")
        key = "tok_embeddings.weight" if self.config.weight_tying else "output.weight"
        with torch.inference_mode():
            last = norm(self.hidden[:, -(GATE_STEPS + 1) :])
            pieces = [
                F.linear(last, self.source.load_rows(key, start, stop).float())
                for start, stop in row_ranges((self.config.vocab_size, self.config.dim))
            ]
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


def _run(
    module: nn.Module,
    run: Callable[[], Tensor],
    scheme: Scheme | None,
    measured: Measured,
    prefix: str,
) -> Tensor:
    """What `run` returns; the module's layers, if a scheme is asked about, into `measured`."""
    if scheme is None:
        with torch.inference_mode():
            return run()
    result, found = measure_layers(module, run, scheme)
    measured.add(found, prefix)
    return result


def _hidden(name: str, config: DecoderConfig) -> TensorSpec:
    shape = (contract.BATCH, contract.LENGTH, config.dim)
    return TensorSpec(name=name, dtype="float32", shape=shape)
