"""Writes embedding and decoder for the native backend: weights as its kernels read them.

Legend: O output channels, C input channels, R rows at once, B blocks of 32 channels.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from perception_rt.export.components.plm_decoder import DecoderComponent, EmbedComponent
from perception_rt.export.graph.lazy_weights import Array, Weight
from perception_rt.export.quantization.formats import INT8_MAX, Format
from perception_rt.native import layout
from perception_rt.package.contract import GraphSpec
from perception_rt.package.store import Stage

_STORED: Mapping[Format | None, str] = {
    None: "float32",
    "int8_blocks": "int8",
    "int4_blocks": "int4",
}
# Parts of the matrices that are stored as one.
_QKV = tuple(f"attention.{name}.weight" for name in ("wq", "wk", "wv"))
_GATE_UP = tuple(f"feed_forward.{name}.weight" for name in ("w1", "w3"))
# Largest magnitudes of a block as a share of its exact one: a smaller step may fit most values
# better than it cuts the largest.
_SHARES = (1.0, 0.95, 0.9, 0.85)


def write_decoder(
    stage: Stage,
    component: EmbedComponent | DecoderComponent,
    formats: Mapping[str, Format],
    places: dict[str, Any],
) -> dict[str, GraphSpec]:
    """Writes a component's graph file and its data file; returns the graph's spec by name.

    One piece of one weight is in memory at a time.

    Args:
        stage: stage to write into.
        component: embedding, or the whole decoder.
        formats: formats by weight name; other weights stay in float32.
        places: places of the weights that earlier calls wrote, which a tied head shares; new ones
            are added.
    """
    matrices, vectors = _tensors(component)
    found: dict[str, layout.Place] = {}
    file = f"{component.name}.data"
    with stage.open_write(file) as writer:
        position = 0
        for name, parts in {**matrices, **vectors}.items():
            stored = _STORED[formats.get(parts[0].origin)] if name in matrices else "float32"
            key = "+".join([*(part.name for part in parts), stored])
            if key not in places:
                padding = -position % layout.ALIGNMENT
                writer.write(bytes(padding))
                position += padding
                places[key] = layout.Place(file=file, offset=position, format=stored)
                for piece in _pieces(parts, stored if name in matrices else None):
                    writer.write(piece.data)
                    position += piece.nbytes
            found[name] = places[key]
    graph_file = f"{component.name}.json"
    stage.write(graph_file, [layout.dump(found)])
    signature = component.signature()
    spec = GraphSpec(
        file=graph_file,
        data=tuple(sorted({place.file for place in found.values()})),
        inputs=signature.inputs,
        outputs=signature.outputs,
        kind=layout.KIND,
    )
    return {component.name: spec}


def _tensors(
    component: EmbedComponent | DecoderComponent,
) -> tuple[dict[str, Sequence[Weight]], dict[str, Sequence[Weight]]]:
    """Weights of each matrix and of each vector, under the names of `layout`."""
    weights, config = component.parameters(), component.plan.config.decoder
    if isinstance(component, EmbedComponent):
        return {layout.TABLE: [weights["tok_embeddings.weight"]]}, {}
    matrices: dict[str, Sequence[Weight]] = {}
    for name in layout.decoder_matrices(config):
        layer, _, leaf = name.rpartition("attention.qkv")
        if layer and not leaf:
            matrices[name] = [weights[layer + part] for part in _QKV]
        elif name.endswith("feed_forward.gate_up"):
            prefix = name.removesuffix("feed_forward.gate_up")
            matrices[name] = [weights[prefix + part] for part in _GATE_UP]
        else:
            matrices[name] = [weights[name if name == layout.HEAD else f"{name}.weight"]]
    tables = ("rope_cos", "rope_sin")
    vectors: dict[str, Sequence[Weight]] = {
        name: [weights[name if name in tables else f"{name}.weight"]]
        for name in layout.decoder_vectors(config)
    }
    return matrices, vectors


def _pieces(parts: Sequence[Weight], stored: str | None) -> Iterator[Array]:
    """The bytes of a tensor, whose parts follow each other; None stores plain float32."""
    for part in parts:
        for rows in part.pieces(layout.ROWS):
            if stored is None:
                yield np.ascontiguousarray(rows, np.float32).reshape(-1).view(np.uint8)
            else:
                yield pack_panels(rows, stored)


def pack_panels(rows: Array, stored: str) -> Array:
    """Rows (R, C) of a matrix as they are stored, uint8; missing rows of the last panel are 0.

    Args:
        rows: float32.
        stored: key of `layout.FORMATS`.
    """
    count, columns = rows.shape
    panels, width = -(-count // layout.ROWS), layout.padded(columns)
    padded = np.zeros((panels * layout.ROWS, width), np.float32)
    padded[:count, :columns] = rows
    if stored == "float32":
        by_column = padded.reshape(panels, layout.ROWS, width).transpose(0, 2, 1)
        return np.ascontiguousarray(by_column).reshape(-1).view(np.uint8)
    blocks = padded.reshape(panels, layout.ROWS, width // layout.BLOCK, layout.BLOCK)
    values, scales = int4_blocks(blocks) if stored == "int4" else int8_blocks(blocks)
    # (panel, row, block, group, 4) -> (panel, block, group, row, 4)
    groups = values.reshape(*values.shape[:3], 8, 4).transpose(0, 2, 3, 1, 4)
    packed = np.ascontiguousarray(groups).reshape(panels, width // layout.BLOCK, 8, 64)
    if stored == "int4":
        packed = packed[:, :, :4] | (packed[:, :, 4:] << 4)
    pairs = packed.reshape(panels, width // 64, -1)
    steps = np.ascontiguousarray(scales.transpose(0, 2, 1))  # (panel, block, row)
    heads = steps.reshape(panels, width // 64, -1).view(np.uint8)
    return np.concatenate([heads, pairs], axis=-1).reshape(-1)


def int8_blocks(blocks: Array) -> tuple[Array, Array]:
    """Rounds blocks (..., 32) to int8 plus 128, uint8, with float16 scales (...)."""
    scales = _half(np.abs(blocks).max(axis=-1) / np.float32(INT8_MAX))
    values = np.rint(blocks * _inverse(scales)[..., None])
    return (np.clip(values, -INT8_MAX, INT8_MAX) + 128).astype(np.uint8), scales


def int4_blocks(blocks: Array) -> tuple[Array, Array]:
    """Rounds blocks (..., 32) to 4 bits plus 8, uint8, with float16 scales (...).

    The largest magnitude becomes -8, which has no positive counterpart. Of several scales, each
    block takes the one with the least squared error.
    """
    low, high = blocks.min(axis=-1), blocks.max(axis=-1)
    extreme = np.where(high > -low, high, low)
    best = np.full(extreme.shape, np.inf, np.float32)
    values, scales = np.zeros(blocks.shape, np.uint8), np.zeros(extreme.shape, np.float16)
    for share in _SHARES:
        tried = _half(extreme * np.float32(-share / 8))
        rounded = np.clip(np.rint(blocks * _inverse(tried)[..., None]), -8, 7)
        error = rounded * tried.astype(np.float32)[..., None]
        error -= blocks
        errors = np.einsum("...i,...i->...", error, error)
        better = errors < best
        best[better], scales[better] = errors[better], tried[better]
        values[better] = (rounded[better] + 8).astype(np.uint8)
    return values, scales


def _half(scales: Array) -> Array:
    """Scales as float16, at most its largest number."""
    return np.clip(scales, -65504, 65504).astype(np.float16)


def _inverse(scales: Array) -> Array:
    """1 / scale in float32; 0 for 0."""
    exact = scales.astype(np.float32)
    inverse: Array = np.divide(np.float32(1), exact, out=np.zeros_like(exact), where=exact != 0)
    return inverse
