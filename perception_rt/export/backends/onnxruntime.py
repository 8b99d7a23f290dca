"""Lowering for ONNX Runtime: emits its fused operators, and relies on no optimiser to find them.

Attention is `MultiHeadAttention` on (N, T, C) with `RotaryEmbedding` before it, so nothing is
transposed. With a cache it is `GroupQueryAttention`, which rotates and updates the cache in place.

Legend: N sequences, T tokens, C input channels, O output channels, B blocks of 32 channels,
E channels per head.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from perception_rt.export.graph.lazy_weights import Array, Weight, constant
from perception_rt.export.graph.lowering import Lowering, Operand
from perception_rt.export.quantization.formats import (
    BITS,
    BLOCK,
    INT8_MAX,
    channel_scale,
    int8_channels,
    quantize_blocks,
)

CONTRIB = "com.microsoft"
_UINT8, _FLOAT32 = np.dtype(np.uint8), np.dtype(np.float32)
_ATTENTION, _CACHED_ATTENTION = "MultiHeadAttention", "GroupQueryAttention"
_ACCURACY_INT8 = 4  # MatMulNBits computes with activations in int8, scaled per block


class OnnxRuntimeLowering(Lowering):
    """Standard ONNX plus ONNX Runtime's contrib operators, on CPU or CUDA."""

    attention_ops: Mapping[str, int] = {_ATTENTION: 1}
    cached_attention_ops: Mapping[str, int] = {_CACHED_ATTENTION: 1}

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Values that several products, or all attentions, share are computed once.
        self.rounded_rows: dict[ir.Value, tuple[ir.Value, ir.Value]] = {}
        self.cache_lengths: tuple[ir.Value, ir.Value] | None = None
        # Smoothing factors that a LayerNorm takes over, by its gain and its bias.
        self.norm_factors = {
            parameter: factors
            for layer, norm in self.measured.norms.items()
            if self.formats.get(layer) == "int8"
            and (factors := self.measured.smoothing(layer)) is not None
            for parameter in norm
        }

    def linear(self, node: ir.Node, x: ir.Value, weight: Weight, bias: Weight | None) -> None:
        """Emits MatMul, or the product in the weight's format, and Add for the bias."""
        match self.format_of(weight):
            case None:
                transposed = weight.derive(".t", np.transpose, weight.shape[::-1])
                y = self.op("MatMul", [x, transposed])
            case "int8":
                packed, scale = _channels(self.smoothed(weight))
                operands: list[Operand | None] = [self.smooth(x, weight), packed, scale, None, bias]
                self.bind(node, self.op("DynamicQuantizeMatMul", operands, domain=CONTRIB))
                return
            case "int8_rows":
                y = self.row_product(x, weight)
            case format_:
                y = self.block_product(x, weight, BITS[format_])
        self.bind(node, y if bias is None else self.op("Add", [y[0], bias]))

    def parameter(self, weight: Weight) -> Weight:
        """Divides gain and bias of a LayerNorm by the smoothing factors of the layer after it."""
        factors = self.norm_factors.get(weight.origin)
        if factors is None:
            return weight
        return weight.derive("", lambda array: array / factors, weight.shape)

    def smooth(self, x: ir.Value, weight: Weight) -> ir.Value:
        """Emits x divided by its smoothing factors, unless there are none or a norm has them."""
        factors = self.measured.smoothing(weight.origin)
        if factors is None or weight.origin in self.measured.norms:
            return x
        return self.op("Mul", [x, constant(f"{weight.origin}.smoothing", 1 / factors)])[0]

    def smoothed(self, weight: Weight) -> Weight:
        """A linear weight (O, C) multiplied by the smoothing factors of its input, if any."""
        factors = self.measured.smoothing(weight.origin)
        if factors is None:
            return weight
        return weight.derive_rows(
            "", lambda rows: rows * factors, weight.shape, _FLOAT32, fixed=weight.fixed
        )

    def row_product(self, x: ir.Value, weight: Weight) -> list[ir.Value]:
        """Emits an integer product of activations that are rounded row by row."""
        packed, scale = _channels(weight)
        if x not in self.rounded_rows:
            self.rounded_rows[x] = self.round_rows(x)
        steps, rounded = self.rounded_rows[x]
        one, middle = self.scalar("one", 1.0), self.middle()
        operands: list[Operand | None] = [rounded, packed, one, scale, middle]
        y = self.op("MatMulIntegerToFloat", operands, domain=CONTRIB)
        return self.op("Mul", [y[0], steps])

    def round_rows(self, x: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Emits each row's step (..., 1), and the rows in such steps, uint8 around 128."""
        axis = constant("constant.last_axis", np.asarray([-1], np.int64))
        high = self.op("ReduceMax", [x, axis], {"keepdims": 1})[0]
        low = self.op("ReduceMin", [x, axis], {"keepdims": 1})[0]
        low = self.op("Neg", [low])[0]
        largest = self.op("Max", [high, low, self.scalar("tiny", 1e-30)])[0]
        step = self.op("Mul", [largest, self.scalar("step", 1 / 127)])[0]
        scaled = self.op("Div", [x, step])[0]
        operands: list[Operand | None] = [scaled, self.scalar("one", 1.0), self.middle()]
        return step, self.op("QuantizeLinear", operands)[0]

    def block_product(self, x: ir.Value, weight: Weight, bits: int) -> list[ir.Value]:
        """Emits MatMulNBits with activations in int8."""
        outputs, inputs = weight.shape
        packed, scale = _blocks(weight, bits)
        attributes = {
            "K": inputs,
            "N": outputs,
            "bits": bits,
            "block_size": BLOCK,
            "accuracy_level": _ACCURACY_INT8,
        }
        return self.op("MatMulNBits", [x, packed, scale], attributes, domain=CONTRIB)

    def embedding(self, node: ir.Node, weight: Weight, ids: ir.Value) -> None:
        """Emits Gather, or GatherBlockQuantized on the bytes that a tied head uses too."""
        format_ = self.format_of(weight)
        if format_ is None:
            self.bind(node, self.op("Gather", [weight, ids]))
            return
        bits = BITS[format_]
        packed, scale = _blocks(weight, bits)
        rows, blocks, block_bytes = packed.shape
        table = packed.reshaped((rows, blocks * block_bytes))
        attributes = {"gather_axis": 0, "quantize_axis": 1, "block_size": BLOCK, "bits": bits}
        operands: list[Operand | None] = [table, ids, scale]
        self.bind(node, self.op("GatherBlockQuantized", operands, attributes, domain=CONTRIB))

    def attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits MultiHeadAttention with the default scale, E ** -0.5."""
        query, key, value, cos, sin = (*inputs, None, None)[:5]
        heads = node.attributes["heads"].as_int()
        if cos is not None:
            query = self.rotary(query, cos, sin, heads)
            key = self.rotary(key, cos, sin, heads)
        causal = node.attributes["causal"].as_int()
        attributes = {"num_heads": heads, "unidirectional": causal}
        operands = [query, key, value]
        self.bind(node, self.op(_ATTENTION, operands, attributes, domain=CONTRIB))

    def cached_attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits GroupQueryAttention, which rotates, on a cache that is also its output."""
        query, key, value, keys, values, past, cos, sin = inputs
        assert isinstance(past, ir.Value) and isinstance(query, ir.Value)
        if self.cache_lengths is None:
            self.cache_lengths = self.lengths(query, past)
        last, total = self.cache_lengths
        attributes = {
            "num_heads": node.attributes["heads"].as_int(),
            "kv_num_heads": node.attributes["kv_heads"].as_int(),
            "do_rotary": 1,
            "rotary_interleaved": 1,
        }
        operands = [query, key, value, keys, values, last, total, cos, sin]
        results = self.op(_CACHED_ATTENTION, operands, attributes, domain=CONTRIB, outputs=3)
        self.bind(node, results)

    def lengths(self, query: ir.Value, past: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Emits each sequence's index of its last token (N,), and the longest length, in int32."""
        shape = self.op("Shape", [query], {"start": 1, "end": 2})[0]  # (1,)
        tokens = self.cast(shape, np.dtype(np.int32))
        totals = self.op("Add", [past, tokens])[0]
        one = constant("constant.one_int32", np.asarray(1, np.int32))
        last = self.op("Sub", [totals, one])[0]
        return last, self.op("ReduceMax", [totals], {"keepdims": 0})[0]

    def rotary(self, x: Operand | None, cos: Operand, sin: Operand | None, heads: int) -> ir.Value:
        """Emits the rotation of adjacent channel pairs of (N, T, C) by tables (T, E/2)."""
        start = constant("constant.position", np.zeros(1, np.int64))
        attributes = {"interleaved": 1, "num_heads": heads}
        operands = [x, start, cos, sin]
        return self.op("RotaryEmbedding", operands, attributes, domain=CONTRIB)[0]

    def scalar(self, name: str, value: float) -> Weight:
        """A float32 scalar."""
        return constant(f"constant.{name}", np.asarray(value, np.float32))

    def middle(self) -> Weight:
        """The zero point of signed values in uint8."""
        return constant("constant.middle", np.asarray(128, np.uint8))


def _channels(weight: Weight) -> tuple[Weight, Weight]:
    """A linear weight (O, C) as int8 (C, O) and its float32 scales (O,)."""
    outputs, inputs = weight.shape

    def packed() -> Array:
        return np.ascontiguousarray(int8_channels(weight.load())[0].T)

    def scales(rows: Array) -> Array:
        return channel_scale(rows, INT8_MAX)

    int8 = Weight(f"{weight.name}.int8", np.dtype(np.int8), (inputs, outputs), packed)
    scale = weight.derive_rows(".scale", scales, (outputs,), _FLOAT32)
    return int8, scale


def _blocks(weight: Weight, bits: int) -> tuple[Weight, Weight]:
    """A weight (O, C) as uint8 (O, B, bytes per block) and float32 scales (O, B)."""
    outputs, inputs = weight.shape
    blocks = -(-inputs // BLOCK)
    shape = (outputs, blocks, BLOCK * bits // 8)
    name = f".int{bits}"
    packed = weight.derive_rows(name, lambda rows: quantize_blocks(rows, bits)[0], shape, _UINT8)
    scale = weight.derive_rows(
        f"{name}_scale", lambda rows: quantize_blocks(rows, bits)[1], shape[:2], _FLOAT32
    )
    return packed, scale
