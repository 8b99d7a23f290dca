"""Export components of a language model's decoder: its embedding, and runs of its layers.

Eager holds one layer at a time. What a component hands to the next (`Reference.carry`) is the
reference prompt's hidden state.

Legend: n tiles, t image tokens per tile, T tokens, C decoder width, V vocabulary;
L logit positions.
"""

import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from perception_rt.checkpoint.source import WeightSource
from perception_rt.export.components.component import (
    Component,
    Reference,
    TracedComponent,
    load_module,
    ranges_of,
    run_measured,
)
from perception_rt.export.components.parameters import decoder_parameters, embed_parameters
from perception_rt.export.components.traced_modules import DecoderGraph, EmbedGraph
from perception_rt.export.graph import trace
from perception_rt.export.graph.lazy_weights import Array, Weight, row_ranges
from perception_rt.export.graph.lowering import Recipe
from perception_rt.export.plan import PlmPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.head import MeasuredHead
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.models.decoder import DecoderLayer, RmsNorm, rope_1d
from perception_rt.package import contract
from perception_rt.package.contract import GraphSignature
from perception_rt.package.plm_graphs import decoder_signature, embed_signature
from perception_rt.processing.llm_tokenizer import open_tokenizer
from perception_rt.processing.prompt import Tiles, Turn, encode_prompt

PART_BYTES = 3 * 2**29  # weights of one decoder part: checking a package holds a part in memory
GATE_STEPS = 8  # last tokens of the reference prompt, which are fed one by one
_TEXT_TOKENS = 48  # before and after the image tokens of a random prompt
_IMAGE_TOKENS = 64  # of a random prompt, at most

# Bytes per weight, scales included.
_WEIGHT_BYTES: Mapping[Format | str, float] = {
    "float32": 4,
    "float16": 2,
    "int8_rows": 1,
    "int8_blocks": 1.125,
    "int4_blocks": 0.625,
    "fp8": 1,
}
_LINEARS = (
    *(f"attention.{name}" for name in ("wq", "wk", "wv", "wo")),
    *(f"feed_forward.{name}" for name in ("w1", "w2", "w3")),
)


class EmbedComponent(Component[PlmPlan]):
    """The embedding: graph `embed`. Its reference makes a prompt with an image tile."""

    name = "embed"

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Embeds a prompt; a real one if activation ranges are calibrated on it.

        Args:
            carry: image features (n, t, C); those of the first tile go into the prompt.
        """
        assert carry is not None
        prompt = self._question(carry[0]) if self.plan.calibrated else None
        ids, prompt_hidden = prompt or self._random_prompt(carry[0])
        return Reference(
            inputs={contract.EMBED: {contract.TOKENS: ids[None]}},
            outputs={contract.EMBED: {contract.HIDDEN: self._embed(ids)[None].numpy()}},
            carry=prompt_hidden,
        )

    def _question(self, image: Tensor) -> tuple[Array, Tensor] | None:
        """Token ids (T,) of questions about an image, and hidden (1, T + t, C) with the image.

        Returns None without a tokenizer, or if the longest sequence has no room for the image.
        """
        if self.plan.tokenizer is None:
            return None
        count = len(image)
        room = min(self.plan.config.decoder.max_seqlen, count + calibration.MAX_PROMPT_TOKENS)
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
        return ids, self._with_image(ids, image, start)

    def _random_prompt(self, image: Tensor) -> tuple[Array, Tensor]:
        """Seeded token ids (T,), and hidden (1, T', C) with some image tokens in the middle."""
        config = self.plan.config.decoder
        image = image[: max(0, min(_IMAGE_TOKENS, config.max_seqlen - 2))]
        text = max(1, min(_TEXT_TOKENS, (config.max_seqlen - len(image)) // 2))
        # Only the first rows of the vocabulary, so that no others are read.
        _, rows = next(row_ranges((config.vocab_size, config.dim)))
        ids = np.random.default_rng(0).integers(0, rows, 2 * text, np.int64)
        return ids, self._with_image(ids, image, text)

    def _with_image(self, ids: Array, image: Tensor, start: int) -> Tensor:
        """Hidden (1, T + t, C) of token ids, with image features (t, C) from an index on."""
        hidden = self._embed(ids)
        return torch.cat([hidden[:start], image, hidden[start:]])[None]

    def _embed(self, ids: Array) -> Tensor:
        """Embeddings (T, C) of token ids (T,)."""
        rows, places = np.unique(ids, return_inverse=True)
        table = [self.source.load_rows("tok_embeddings.weight", i, i + 1) for i in rows.tolist()]
        return torch.cat(table).float()[torch.from_numpy(places)]

    def formats(self, measured: Measured) -> dict[str, Format]:
        """The format of the embedding, which a tied head shares."""
        return table_formats(self.plan)

    def signature(self) -> GraphSignature:
        """Inputs and outputs of the graph `embed`."""
        return embed_signature(self.plan.config.decoder)

    def parameters(self) -> dict[str, Weight]:
        """The embedding's weight."""
        return embed_parameters(self.source, EmbedGraph(self.plan.config.decoder))

    def traced(self) -> Sequence[TracedComponent]:
        """Traces the lookup; the graph is `embed`."""
        recipe = Recipe.of_signature(self.signature())
        graph = EmbedGraph(self.plan.config.decoder)
        example = {contract.TOKENS: torch.zeros(2, 3, dtype=torch.int64, device="meta")}
        dynamic = {contract.TOKENS: {0: contract.BATCH, 1: contract.LENGTH}}
        return [
            TracedComponent(
                recipes={contract.EMBED: recipe},
                traced=trace.trace(graph, example, dynamic=dynamic, output_names=[contract.HIDDEN]),
                parameters=self.parameters(),
            )
        ]


class DecoderComponent(Component[PlmPlan]):
    """Consecutive decoder layers; the last component has the norm and the head too.

    Args:
        plan: plan of the export.
        source: weights of the model.
        index: number of this decoder part.
        layers: layers of this part.
    """

    def __init__(self, plan: PlmPlan, source: WeightSource, index: int, layers: range) -> None:
        super().__init__(plan, source)
        self.name = contract.decoder_part(index)
        self.config = plan.config.decoder
        self.layers = layers
        self.is_last = layers.stop == self.config.n_layers

    def reference(self, carry: Tensor | None = None) -> Reference:
        """Runs the layers in eager, one in memory at a time.

        Args:
            carry: hidden state (1, T, C) that enters the first layer.
        """
        assert carry is not None
        hidden = carry
        rope = rope_1d(self.config, hidden.shape[1])
        measured = Measured()
        scheme = self.plan.scheme
        if scheme == "int8":
            scheme = "int8_rows" if block_format(self.plan) == "int8_rows" else None
        for index in self.layers:
            with torch.device("meta"):
                layer = DecoderLayer(self.config)
            prefix = f"layers.{index}."
            layer = load_module(layer, self.source, prefix)
            run = partial(layer, hidden, rope)
            hidden = run_measured(layer, run, scheme, measured, prefix, ranges_of(self.plan))
        if self.is_last:
            head = measured if scheme == "fp8" else None
            outputs = {contract.LOGITS: self._logits(hidden, head)}
        else:
            outputs = {contract.HIDDEN_OUT: hidden.numpy()}
        return Reference(
            inputs={self.name: {contract.HIDDEN: carry.numpy()}},
            outputs={self.name: outputs},
            measured=measured,
            carry=hidden,
        )

    def _logits(self, hidden: Tensor, measured: Measured | None) -> Array:
        """Logits (1, L, V) of the last GATE_STEPS + 1 tokens of (1, T, C).

        The head is read in pieces. With `measured`, its error in fp8 is measured on all tokens.
        """
        with torch.device("meta"):
            norm = RmsNorm(self.config.dim, self.config.norm_eps)
        norm = load_module(norm, self.source, "norm.")
        key = "tok_embeddings.weight" if self.config.weight_tying else "output.weight"
        kept = GATE_STEPS + 1
        pieces = []
        with torch.inference_mode():
            tokens = norm(hidden if measured is not None else hidden[:, -kept:])
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

    def formats(self, measured: Measured) -> dict[str, Format]:
        """Formats of the layers and the head: an int8 layer that W8A8 would hurt takes blocks."""
        blocks = block_format(self.plan)
        if blocks is None or blocks == "fp8":
            return super().formats(measured)
        excluded = measured.excluded()
        found = table_formats(self.plan)
        for index in self.layers:
            for name in _LINEARS:
                key = f"layers.{index}.{name}.weight"
                found[key] = "int8_blocks" if key in excluded else blocks
        return found

    def signature(self) -> GraphSignature:
        """Inputs and outputs of the graph."""
        return self._signature(picks_tokens=self.plan.target.picks_tokens)

    def parameters(self) -> dict[str, Weight]:
        """Weights of the layers, and of the norm and the head after the last."""
        graph = DecoderGraph(self.config, self.layers)
        return decoder_parameters(self.source, graph, self.config, self.plan.config.image_token_id)

    def traced(self) -> Sequence[TracedComponent]:
        """Traces the layers over their caches; the graph has the component's name."""
        signature = self._signature(picks_tokens=True)
        recipe = Recipe.of_signature(self.signature(), cached_attentions=len(self.layers))
        examples, dynamic = {}, {}
        for spec in signature.inputs:
            # Equal names are equal sizes, and a name always stands at the same index.
            sizes = [size if isinstance(size, int) else 2 + i for i, size in enumerate(spec.shape)]
            dtype = getattr(torch, "float32" if spec.dtype == "float16" else spec.dtype)
            examples[spec.name] = torch.zeros(sizes, dtype=dtype, device="meta")
            dynamic[spec.name] = {i: s for i, s in enumerate(spec.shape) if isinstance(s, str)}
        names = [spec.name for spec in signature.outputs]
        graph = DecoderGraph(self.config, self.layers)
        return [
            TracedComponent(
                recipes={self.name: recipe},
                traced=trace.trace(graph, examples, dynamic=dynamic, output_names=names),
                parameters=self.parameters(),
            )
        ]

    def _signature(self, *, picks_tokens: bool) -> GraphSignature:
        return decoder_signature(
            self.config,
            self.layers,
            cache_dtype=self.plan.cache_dtype,
            fixed_slots=self.plan.target.fixed_slots,
            picks_tokens=picks_tokens,
        )


def block_format(plan: PlmPlan) -> Format | None:
    """Format of the linear weights in the decoder's layers; None for float."""
    if plan.precision == "fp8":
        return "fp8"
    if not plan.quantized:
        return None
    if plan.blocks == "int4":
        return "int4_blocks"
    return "int8_blocks" if plan.target.whole_decoder else "int8_rows"


def table_formats(plan: PlmPlan) -> dict[str, Format]:
    """Formats of the embedding and the head, which may be tied; empty for float."""
    if not plan.quantized:
        return {}
    format_: Format = "int4_blocks" if plan.precision == "int4" else "int8_blocks"
    return {"tok_embeddings.weight": format_, "output.weight": format_}


def decoder_parts(plan: PlmPlan) -> list[range]:
    """Splits the layers into parts of at most about PART_BYTES of weights, head included."""
    config = plan.config.decoder
    if plan.target.whole_decoder:
        return [range(config.n_layers)]
    q_dim, kv_dim = (heads * config.head_dim for heads in (config.n_heads, config.kv_heads))
    layer = config.dim * (2 * q_dim + 2 * kv_dim + 3 * config.ffn_dim)
    per_weight = _WEIGHT_BYTES[block_format(plan) or plan.float_dtype]
    tables = table_formats(plan).get("output.weight", plan.float_dtype)
    head = config.vocab_size * config.dim * _WEIGHT_BYTES[tables]
    layer_bytes = layer * per_weight
    total = layer_bytes * config.n_layers + head
    count = min(config.n_layers, max(1, -int(-total // PART_BYTES)))
    # The head weighs as much as some layers, so the last part may have fewer.
    edges = [min(config.n_layers, round(i * total / count / layer_bytes)) for i in range(count)]
    edges = sorted({*edges, config.n_layers})
    return [range(start, stop) for start, stop in itertools.pairwise(edges)]
