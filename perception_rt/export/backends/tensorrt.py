"""Lowering for TensorRT and TensorRT for RTX: standard operators of opset 24, strongly typed.

The graph states every precision, and has one operator for whatever TensorRT fuses: `Attention`,
`RotaryEmbedding`, `TensorScatter` for the cache, `RMSNormalization`, and Q/DQ around a product in
fp8. ONNX Runtime runs the same graph on a CPU, so it is compared with eager without a GPU.

Legend: N batch, T tokens, C input channels, O output channels, H heads, K key and value heads,
S cache slots, E channels per head, P positions.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from perception_rt.export.graph.lazy_weights import Array, Weight, constant
from perception_rt.export.graph.lowering import Lowering, Operand
from perception_rt.export.quantization.formats import FP8, FP8_MAX, channel_scale, fp8_channels

_LEAST_STEP = 2.0**-24  # smallest positive float16


class TensorRtLowering(Lowering):
    """Standard ONNX operators, with attention on (N, H, T, E)."""

    opset = 24
    attention_ops: Mapping[str, int] = {"Attention": 1}
    cached_attention_ops: Mapping[str, int] = {
        "Attention": 1,
        "RotaryEmbedding": 2,
        "TensorScatter": 2,
    }

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # Values that all attentions of a graph share are computed once.
        self.shared: dict[str, ir.Value] = {}
        self.rounded: dict[tuple[ir.Value, float], ir.Value] = {}
        self.smoothed: dict[tuple[ir.Value, str], ir.Value] = {}

    def linear(self, node: ir.Node, x: ir.Value, weight: Weight, bias: Weight | None) -> None:
        """Emits MatMul, on fp8 operands if the weight is quantised, and Add for the bias."""
        if self.format_of(weight) == "fp8":
            x = self.smooth(x, weight)
            y = self.op("MatMul", [self.round(x, weight), self.fp8_weight(weight)])[0]
        else:
            transposed = weight.derive(".t", np.transpose, weight.shape[::-1])
            y = self.op("MatMul", [x, transposed])[0]
        self.bind(node, [y] if bias is None else self.op("Add", [y, bias]))

    def smooth(self, x: ir.Value, weight: Weight) -> ir.Value:
        """Emits x divided by its smoothing factors, if any; `fp8_weight` multiplies by them."""
        smoothing = self.measured.smoothing(weight.origin)
        if smoothing is None:
            return x
        key = x, weight.origin
        if key not in self.smoothed:
            # The name is part of a graph's structure, which a refit compares with older packages.
            factors = constant(f"{weight.origin}.balance", (1 / smoothing).astype(self.dtype))
            self.smoothed[key] = self.op("Mul", [x, factors])[0]
        return self.smoothed[key]

    def round(self, x: ir.Value, weight: Weight) -> ir.Value:
        """Emits x rounded to E4M3, scaled by the range of this layer's input."""
        largest = self.measured.range(weight.origin)
        key = x, largest
        if key not in self.rounded:
            # A smaller step would be zero in float16; activations are not that small.
            step = np.asarray(max(largest / FP8_MAX, _LEAST_STEP), self.dtype)
            scale = constant(f"{weight.name}.step", step)
            zero = constant("constant.fp8_zero", np.zeros((), FP8))
            rounded = self.op("QuantizeLinear", [x, scale, zero])[0]
            self.rounded[key] = self.op("DequantizeLinear", [rounded, scale, zero])[0]
        return self.rounded[key]

    def fp8_weight(self, weight: Weight) -> ir.Value:
        """Emits a linear weight (O, C) as (C, O) of E4M3 numbers, with a scale per row."""
        outputs, inputs = weight.shape
        smoothing = self.measured.smoothing(weight.origin)

        def scales(rows: Array) -> Array:
            rows = rows if smoothing is None else rows * smoothing
            return np.maximum(channel_scale(rows, FP8_MAX), _LEAST_STEP).astype(self.dtype)

        def packed() -> Array:
            array = weight.load()
            steps = scales(array)
            if smoothing is not None:
                array = array * smoothing
            return np.ascontiguousarray(fp8_channels(array, steps).T)

        numbers = Weight(f"{weight.name}.fp8", FP8, (inputs, outputs), packed, fixed=True)
        scale = weight.derive_rows(".fp8_scale", scales, (outputs,), self.dtype)
        return self.op("DequantizeLinear", [numbers, scale], {"axis": 1})[0]

    def channels_first(self, images: ir.Value) -> ir.Value:
        """Casts first, since TensorRT can do nothing else with uint8."""
        x = self.cast(images, np.dtype(np.float32))
        return self.op("Transpose", [x], {"perm": [0, 3, 1, 2]})[0]

    def embedding(self, node: ir.Node, weight: Weight, ids: ir.Value) -> None:
        """Emits Gather."""
        self.bind(node, self.op("Gather", [weight, ids]))

    def attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits rotation and Attention, causal or not."""
        query, key, value, cos, sin = (*inputs, None, None)[:5]
        assert query is not None and key is not None and value is not None
        heads = node.attributes["heads"].as_int()
        if cos is not None and sin is not None:
            assert isinstance(cos, Weight)
            positions = self.all_positions(query, cos)
            query = self.rotary(query, cos, sin, positions, heads)
            key = self.rotary(key, cos, sin, positions, heads)
        operands = [self.split_heads(x, heads) for x in (query, key, value)]
        attributes = {"is_causal": node.attributes["causal"].as_int()}
        self.bind(node, self.merge_heads(self.op("Attention", operands, attributes)[0]))

    def cached_attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits rotation, updates of the caches in place, and Attention with a mask."""
        query, key, value, keys, values, past, cos, sin = inputs
        assert isinstance(query, ir.Value) and isinstance(past, ir.Value)
        assert isinstance(keys, ir.Value) and isinstance(values, ir.Value)
        assert key is not None and value is not None and cos is not None and sin is not None
        heads = node.attributes["heads"].as_int()
        kv_heads = node.attributes["kv_heads"].as_int()
        if not self.shared:
            self.share_positions(query, keys, past)
        start, positions, mask = (self.shared[name] for name in ("start", "positions", "mask"))
        query = self.split_heads(self.rotary(query, cos, sin, positions, heads), heads)
        key = self.split_heads(self.rotary(key, cos, sin, positions, kv_heads), kv_heads)
        new = self.split_heads(value, kv_heads)
        keys = self.op("TensorScatter", [keys, key, start], {"axis": 2})[0]
        values = self.op("TensorScatter", [values, new, start], {"axis": 2})[0]
        y = self.op("Attention", [query, keys, values, mask])[0]
        self.bind(node, [*self.merge_heads(y), keys, values])

    def share_positions(self, query: ir.Value, keys: ir.Value, past: ir.Value) -> None:
        """Emits first slots (N,), positions (N, T), and the mask of visible slots (N, 1, T, S)."""
        zero, one = self.index("zero", 0), self.index("one", 1)
        length = self.op("Shape", [query], {"start": 1, "end": 2})[0]
        length = self.op("Squeeze", [length, self.index("axis_0", [0])])[0]
        steps = self.op("Range", [zero, length, one])[0]
        start = self.cast(past, np.dtype(np.int64))
        first = self.op("Unsqueeze", [start, self.index("axis_1", [1])])[0]
        positions = self.op("Add", [first, steps])[0]
        slots = keys.shape[2] if keys.shape is not None else None
        assert isinstance(slots, int), "the cache of a TensorRT engine has a fixed size"
        rows = self.op("Unsqueeze", [positions, self.index("axis_1_3", [1, 3])])[0]
        columns = constant("constant.slots", np.arange(slots, dtype=np.int64))
        mask = self.op("LessOrEqual", [columns, rows])[0]
        self.shared = {"start": start, "positions": positions, "mask": mask}

    def all_positions(self, query: Operand, cos: Weight) -> ir.Value:
        """Emits positions 0 to T - 1 for each sequence, (N, T), once for each rotary table.

        Attentions that share a table share N too: those within windows have a table of their own.
        """
        tokens, key = cos.shape[0], f"positions {cos.name}"
        if key not in self.shared:
            batch = self.op("Shape", [query], {"start": 0, "end": 1})[0]
            suffix = f"_{tokens}" if self.shared else ""
            length = self.index(f"tokens{suffix}", [tokens])
            size = self.op("Concat", [batch, length], {"axis": 0})[0]
            row = constant(f"constant.positions{suffix}", np.arange(tokens, dtype=np.int64)[None])
            self.shared[key] = self.op("Expand", [row, size])[0]
        return self.shared[key]

    def rotary(
        self, x: Operand, cos: Operand, sin: Operand, positions: ir.Value, heads: int
    ) -> ir.Value:
        """Emits the rotation of adjacent channel pairs of (N, T, C) by tables (P, E/2)."""
        attributes = {"interleaved": 1, "num_heads": heads}
        return self.op("RotaryEmbedding", [x, cos, sin, positions], attributes)[0]

    def split_heads(self, x: Operand, heads: int) -> ir.Value:
        """Emits (N, T, H * E) -> (N, H, T, E)."""
        x = self.op("Reshape", [x, self.index(f"heads_{heads}", [0, 0, heads, -1])])[0]
        return self.op("Transpose", [x], {"perm": [0, 2, 1, 3]})[0]

    def merge_heads(self, x: ir.Value) -> list[ir.Value]:
        """Emits (N, H, T, E) -> (N, T, H * E)."""
        x = self.op("Transpose", [x], {"perm": [0, 2, 1, 3]})[0]
        return self.op("Reshape", [x, self.index("merged", [0, 0, -1])])

    def index(self, name: str, value: int | list[int]) -> Weight:
        """An int64 constant."""
        return constant(f"constant.{name}", np.asarray(value, np.int64))
