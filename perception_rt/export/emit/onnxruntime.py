"""Lowering for ONNX Runtime: its fused operators, named outright instead of hoped for.

Attention is `MultiHeadAttention` on (N, T, C) with `RotaryEmbedding` before it, so that nothing is
transposed. int8 is dynamic W8A8: weights per output channel, activations per call.
"""

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from perception_rt.export.lowering import Array, Lowering, Operand, Weight, constant
from perception_rt.export.quantize import channel_scale, quantize_channels

CONTRIB = "com.microsoft"


class OnnxRuntimeLowering(Lowering):
    """Standard ONNX plus ONNX Runtime's contrib operators, on CPU or CUDA."""

    attention_op = "MultiHeadAttention"

    def linear(self, node: ir.Node, x: ir.Value, weight: Weight, bias: Weight | None) -> None:
        """MatMul and Add, or the fused dynamically quantized product."""
        if self.is_int8(weight):
            packed, scale = _int8(weight)
            operands: list[Operand | None] = [x, packed, scale, None, bias]
            self.bind(node, self.op("DynamicQuantizeMatMul", operands, domain=CONTRIB))
            return
        transposed = weight.derive(".t", np.transpose, weight.shape[::-1])
        y = self.op("MatMul", [x, transposed])
        self.bind(node, y if bias is None else self.op("Add", [y[0], bias]))

    def attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """MultiHeadAttention, its scale the default D ** -0.5."""
        query, key, value, cos, sin = (*inputs, None, None)[:5]
        heads = node.attributes["heads"].as_int()
        if cos is not None:
            query = self.rotary(query, cos, sin, heads)
            key = self.rotary(key, cos, sin, heads)
        causal = node.attributes["causal"].as_int()
        attributes = {"num_heads": heads, "unidirectional": causal}
        operands = [query, key, value]
        self.bind(node, self.op(self.attention_op, operands, attributes, domain=CONTRIB))

    def rotary(self, x: Operand | None, cos: Operand, sin: Operand | None, heads: int) -> ir.Value:
        """Adjacent channel pairs of (N, T, C) turned by tables (T, D/2), from position 0 on."""
        start = constant("constant.position", np.zeros(1, np.int64))
        attributes = {"interleaved": 1, "num_heads": heads}
        operands = [x, start, cos, sin]
        return self.op("RotaryEmbedding", operands, attributes, domain=CONTRIB)[0]


def _int8(weight: Weight) -> tuple[Weight, Weight]:
    """A linear weight (O, C) as int8 (C, O) and its float32 scales (O,)."""
    outputs, inputs = weight.shape

    def packed() -> Array:
        array = weight.load()
        return np.ascontiguousarray(quantize_channels(array, channel_scale(array)).T)

    int8 = Weight(f"{weight.name}.int8", np.dtype(np.int8), (inputs, outputs), packed)
    scale = Weight(
        f"{weight.name}.scale",
        np.dtype(np.float32),
        (outputs,),
        lambda: channel_scale(weight.load()),
    )
    return int8, scale
