"""Inputs and outputs of every graph of a Perception Language Model package.

The exporter builds its graphs to these signatures, and the runtime compares a package with them.
What an export may choose (how layers are split, the caches' dtype, and so on) is a `DecoderLayout`.

Legend: N sequences or tiles, T tokens, C decoder width, L logit positions, V vocabulary;
S tile side in pixels, t image tokens per tile.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from perception_rt.errors import PackageError
from perception_rt.package import contract
from perception_rt.package.contract import (
    GraphSignature,
    GraphSpec,
    TensorSpec,
    batched,
    check_signatures,
    required_graph,
)
from perception_rt.package.onnx_scan import scan_graph
from perception_rt.plm_config import DecoderConfig, PlmConfig

_CACHE_ITEM_BYTES = {"float32": 4, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class CacheShape:
    """Shape of one token's keys and values.

    Attributes:
        layers: decoder layers.
        kv_heads: key and value heads per layer.
        head_dim: channels per head.
        dtype: "float32" or "float16".
    """

    layers: int
    kv_heads: int
    head_dim: int
    dtype: str

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * _CACHE_ITEM_BYTES[self.dtype]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderLayout:
    """Layout of a decoder in a package.

    Attributes:
        parts: layers of each decoder graph; together all layers, in order.
        cache_dtype: "float32" or "float16".
        fixed_slots: whether every cache row has `max_seqlen` slots; otherwise any number.
        picks_tokens: whether the last graph also outputs the likeliest token.
    """

    parts: tuple[range, ...]
    cache_dtype: str = "float32"
    fixed_slots: bool = False
    picks_tokens: bool = False


def plm_signatures(config: PlmConfig, layout: DecoderLayout) -> dict[str, GraphSignature]:
    """Signatures of all graphs of a package, by graph name."""
    decoders = {
        contract.decoder_part(index): decoder_signature(
            config.decoder,
            layers,
            cache_dtype=layout.cache_dtype,
            fixed_slots=layout.fixed_slots,
            picks_tokens=layout.picks_tokens,
        )
        for index, layers in enumerate(layout.parts)
    }
    return {
        contract.EMBED: embed_signature(config.decoder),
        **tile_signatures(config),
        **decoders,
    }


def tile_signatures(config: PlmConfig) -> dict[str, GraphSignature]:
    """Signatures of `vision` and `pixels`: tiles (N, S, S, 3) or (N, 3, S, S) to (N, t, C)."""
    side = config.vision.image_size
    features = batched(
        contract.IMAGE_FEATURES, "float32", config.tokens_per_tile, config.decoder.dim
    )
    images = batched(contract.IMAGES_U8, "uint8", side, side, 3)
    pixels = batched(contract.PIXELS_F32, "float32", 3, side, side)
    return {
        contract.VISION: GraphSignature(inputs=(images,), outputs=(features,)),
        contract.PIXELS: GraphSignature(inputs=(pixels,), outputs=(features,)),
    }


def embed_signature(config: DecoderConfig) -> GraphSignature:
    """Signature of `embed`: token ids (N, T) to hidden (N, T, C)."""
    tokens = batched(contract.TOKENS, "int64", contract.LENGTH)
    return GraphSignature(inputs=(tokens,), outputs=(_hidden(contract.HIDDEN, config),))


def decoder_signature(
    config: DecoderConfig,
    layers: range,
    *,
    cache_dtype: str = "float32",
    fixed_slots: bool = False,
    picks_tokens: bool = False,
) -> GraphSignature:
    """Signature of the decoder graph with some layers; the other arguments as `DecoderLayout`.

    Outputs hidden (N, T, C), or logits (N, L, V) where the last layer is among `layers`.
    """
    slots = config.max_seqlen if fixed_slots else contract.SLOTS
    caches = [
        batched(name, cache_dtype, config.kv_heads, slots, config.head_dim)
        for layer in layers
        for name in (contract.key_cache(layer), contract.value_cache(layer))
    ]
    updated = [
        TensorSpec(name=contract.updated(cache.name), dtype=cache.dtype, shape=cache.shape)
        for cache in caches
    ]
    inputs = [_hidden(contract.HIDDEN, config), batched(contract.PAST_LENGTHS, "int32")]
    if layers.stop < config.n_layers:
        return GraphSignature(
            inputs=(*inputs, *caches), outputs=(_hidden(contract.HIDDEN_OUT, config), *updated)
        )
    positions = contract.POSITIONS
    inputs.append(batched(contract.LOGIT_POSITIONS, "int64", positions))
    logits = batched(contract.LOGITS, "float32", positions, config.vocab_size)
    picks = [
        batched(contract.TOP_LOGIT, "float32", positions),
        batched(contract.TOP_ID, "int64", positions),
    ]
    return GraphSignature(
        inputs=(*inputs, *caches),
        outputs=(logits, *updated, *(picks if picks_tokens else ())),
    )


def check_graphs(graphs: Mapping[str, GraphSpec], config: PlmConfig) -> DecoderLayout:
    """Compares a package's graphs with the architecture, and returns the layout it chose.

    Raises:
        PackageError: a graph is missing, or its inputs or outputs differ from the signature.
    """
    layout = _read_layout(graphs, config.decoder)
    check_signatures(graphs, plm_signatures(config, layout))
    return layout


def check_positions(model: bytes, config: DecoderConfig) -> None:
    """Compares the positions of a decoder graph's rotary tables with the longest sequence.

    Args:
        model: bytes of an ONNX graph. Tables inside the graph, which are tiny, are not compared.
        config: the decoder.

    Raises:
        PackageError: they differ, or the bytes are not an ONNX model.
    """
    for tensor in scan_graph(model).externals:
        if tensor.name in contract.ROTARY_TABLES and tensor.shape[:1] != (config.max_seqlen,):
            raise PackageError(
                f"the architecture has max_seqlen {config.max_seqlen}, and the decoder's table "
                f"{tensor.name!r} has the shape {tensor.shape}; export the package again"
            )


def _read_layout(graphs: Mapping[str, GraphSpec], config: DecoderConfig) -> DecoderLayout:
    parts = _read_parts(graphs, config.n_layers)
    first = required_graph(graphs, contract.decoder_part(0))
    cache = next(spec for spec in first.inputs if spec.name == contract.key_cache(0))
    if cache.dtype not in _CACHE_ITEM_BYTES:
        known = " or ".join(_CACHE_ITEM_BYTES)
        raise PackageError(f"the decoder's caches must be {known}, not {cache.dtype}")
    last = required_graph(graphs, contract.decoder_part(len(parts) - 1))
    return DecoderLayout(
        parts=parts,
        cache_dtype=cache.dtype,
        fixed_slots=len(cache.shape) == 4 and isinstance(cache.shape[2], int),
        picks_tokens=any(spec.name == contract.TOP_ID for spec in last.outputs),
    )


def _read_parts(graphs: Mapping[str, GraphSpec], n_layers: int) -> tuple[range, ...]:
    """Layers of each decoder graph, by the caches that it has."""
    parts: list[range] = []
    start = 0
    while start < n_layers:
        name = contract.decoder_part(len(parts))
        inputs = {spec.name for spec in required_graph(graphs, name).inputs}
        stop = start
        while contract.key_cache(stop) in inputs:
            stop += 1
        if stop == start or stop > n_layers:
            raise PackageError(
                f"graph {name!r} must start with layer {start} and end at layer {n_layers - 1} "
                "or before"
            )
        parts.append(range(start, stop))
        start = stop
    if contract.decoder_part(len(parts)) in graphs:
        raise PackageError("there are decoder graphs beyond its last layer")
    return tuple(parts)


def _hidden(name: str, config: DecoderConfig) -> TensorSpec:
    return batched(name, "float32", contract.LENGTH, config.dim)
