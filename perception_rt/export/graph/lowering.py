"""Lowers a traced graph to a backend's graph.

A lowering is a subclass that emits our own operators in its backend's terms; all other operators
are copied. Operators on constants are folded into lazy weights, so no weight is in memory before it
is written.

Legend: N batch, H W pixels, T tokens, C input channels, O output channels, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from perception_rt.errors import ExportError
from perception_rt.export.graph.lazy_weights import Array, DType, Weight, constant
from perception_rt.export.graph.trace import DOMAIN, OPSET, Traced
from perception_rt.export.quantization.formats import Format
from perception_rt.export.quantization.sensitivity import Measured
from perception_rt.package.contract import GraphSignature, TensorSpec

IR_VERSION = 10
INLINE_BYTES = 1024  # smaller constants stay in the graph, where optimisers can read them

Operand = ir.Value | Weight


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """Cuts one graph of a package from a traced module.

    Attributes:
        sources: for each traced input, in order, the graph's input and the function that converts
            it to the traced one. An input with the name of a traced output stands for that value:
            the graph starts there.
        outputs: for each traced output that the graph has, by name, the graph's output.
        attentions: number of attentions without a cache.
        cached_attentions: number of attentions over a key-value cache.
    """

    sources: Sequence[tuple[TensorSpec, "Entry"]]
    outputs: Mapping[str, TensorSpec]
    attentions: int = 0
    cached_attentions: int = 0

    @classmethod
    def of_signature(
        cls,
        signature: GraphSignature,
        entry: "Entry | None" = None,
        *,
        attentions: int = 0,
        cached_attentions: int = 0,
    ) -> Self:
        """The recipe of a graph with these inputs and outputs; None as `entry` is `as_is`."""
        return cls(
            sources=[(spec, entry or as_is) for spec in signature.inputs],
            outputs={spec.name: spec for spec in signature.outputs},
            attentions=attentions,
            cached_attentions=cached_attentions,
        )


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """A backend's graph; its large constants, not yet written, by initializer name."""

    model: ir.Model
    weights: dict[str, Weight]

    def count(self, op_type: str) -> int:
        """Number of operators of a type."""
        return sum(node.op_type == op_type for node in self.model.graph)


class Lowering(ABC):
    """Rebuilds a traced graph for one backend; an instance lowers one graph.

    Args:
        traced: the traced module.
        parameters: a weight for every parameter of the module, by name.
        dtype: float32 or float16, for activations and float weights.
        formats: quantised linear and embedding weights, by the checkpoint tensor's name.
        measured: measured linear layers, for formats that need the range of their inputs.
    """

    # Operators that each traced attention becomes, without and with a cache, and their number.
    attention_ops: Mapping[str, int]
    cached_attention_ops: Mapping[str, int]
    opset = OPSET

    def __init__(
        self,
        traced: Traced,
        parameters: Mapping[str, Weight],
        *,
        dtype: DType,
        formats: Mapping[str, Format] | None = None,
        measured: Measured | None = None,
    ) -> None:
        self.traced = traced
        self.parameters = parameters
        self.dtype = np.dtype(dtype)
        self.formats = formats or {}
        self.measured = measured or Measured()
        self.nodes: list[ir.Node] = []
        self.finished: set[ir.Value] = set()
        self.env: dict[ir.Value, Operand] = {}
        self.constants: dict[str, tuple[Weight, ir.Value]] = {}
        self.opsets = {"": self.opset}

    def lower(self, name: str, recipe: Recipe) -> LoweredGraph:
        """Builds a graph; `name` is for messages.

        Raises:
            ExportError: an attention did not become the operators that the backend fuses.
        """
        for parameter, initializer in self.traced.graph.initializers.items():
            self.env[initializer] = self.parameter(self.parameters[parameter])
        inputs = [_value(spec) for spec, _ in recipe.sources]
        starts = [
            self.traced.outputs.get(spec.name, traced)
            for traced, (spec, _) in zip(self.traced.graph.inputs, recipe.sources, strict=True)
        ]
        for old, new, (_, entry) in zip(starts, inputs, recipe.sources, strict=True):
            self.env[old] = entry(self, new)
        nodes = list(self.traced.graph)
        needed = _live(nodes, [self.traced.outputs[old] for old in recipe.outputs], starts)
        for node in nodes:
            if node in needed:
                self.visit(node)
        results = [
            self.finish(self.env[self.traced.outputs[old]], new)
            for old, new in recipe.outputs.items()
        ]
        graph = self.assemble(inputs, results)
        self.check_fused(name, graph, recipe)
        return graph

    # Methods that a backend defines.

    @abstractmethod
    def linear(self, node: ir.Node, x: ir.Value, weight: Weight, bias: Weight | None) -> None:
        """Emits x @ weight.T + bias for a weight (O, C), and binds the node's output."""

    @abstractmethod
    def attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits attention over q, k, v and optional cos, sin, and binds the node's output."""

    @abstractmethod
    def cached_attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits attention over q, k, v, keys, values, past_lengths, cos, sin; binds 3 outputs."""

    @abstractmethod
    def embedding(self, node: ir.Node, weight: Weight, ids: ir.Value) -> None:
        """Emits the rows `ids` of a weight (V, C), and binds the node's output."""

    def parameter(self, weight: Weight) -> Weight:
        """The weight that stands for a parameter of the module."""
        return weight

    def channels_first(self, images: ir.Value) -> ir.Value:
        """Emits uint8 (N, H, W, 3) -> float32 (N, 3, H, W); transposes bytes, which is faster."""
        x = self.op("Transpose", [images], {"perm": [0, 3, 1, 2]})[0]
        return self.cast(x, np.dtype(np.float32))

    # Methods that emit.

    def op(
        self,
        op_type: str,
        inputs: Sequence[Operand | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Emits one operator and returns its outputs."""
        node = ir.Node(
            domain,
            op_type,
            [None if x is None else self.value(x) for x in inputs],
            ir.convenience.convert_attributes(attributes or {}),
            num_outputs=outputs,
        )
        if domain:
            self.opsets[domain] = 1
        self.nodes.append(node)
        return list(node.outputs)

    def value(self, operand: Operand) -> ir.Value:
        """The graph value of an operand; a weight becomes an initializer."""
        if isinstance(operand, ir.Value):
            return operand
        weight = self.in_dtype(operand)
        if weight.name not in self.constants:
            dtype = ir.DataType.from_numpy(weight.dtype)
            value = ir.Value(
                name=weight.name, shape=ir.Shape(weight.shape), type=ir.TensorType(dtype)
            )
            self.constants[weight.name] = (weight, value)
        return self.constants[weight.name][1]

    def in_dtype(self, weight: Weight) -> Weight:
        """A float32 weight in the graph's dtype; other weights unchanged."""
        if weight.fixed or weight.dtype != np.float32 or self.dtype == np.float32:
            return weight
        dtype = self.dtype

        def cast(array: Array) -> Array:
            with np.errstate(over="ignore"):  # `Weight.array` raises for infinities
                return array.astype(dtype)

        return weight.derive_rows(f".{dtype.name}", cast, weight.shape, dtype, fixed=False)

    def format_of(self, weight: Weight) -> Format | None:
        """Format of the checkpoint tensor that a weight is made from; None for float."""
        return self.formats.get(weight.origin)

    def bind(self, node: ir.Node, operands: Sequence[Operand]) -> None:
        """Lets operands stand for the outputs of a traced node."""
        self.env.update(zip(node.outputs, operands, strict=True))

    def cast(self, x: ir.Value, dtype: DType) -> ir.Value:
        """Emits a cast."""
        return self.op("Cast", [x], {"to": int(ir.DataType.from_numpy(dtype))})[0]

    # Methods that walk the traced graph.

    def visit(self, node: ir.Node) -> None:
        """Lowers one traced node."""
        if node.op_type == "Constant":
            name = f"constant.{node.outputs[0].name}"
            self.bind(node, [constant(name, _constant_of(node))])
            return
        inputs = [None if v is None else self.env[v] for v in node.inputs]
        weights = [x for x in inputs if isinstance(x, Weight)]
        if node.op_type in _FOLDED and len(weights) == len(inputs):
            self.bind(node, [_fold(node, weights)])
        elif node.domain == DOMAIN:
            self.own(node, inputs)
        else:
            self.standard(node, inputs)

    def own(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Lowers an operator of our domain."""
        match node.op_type:
            case "Linear":
                x, weight, bias = (*inputs, None)[:3]
                assert isinstance(x, ir.Value) and isinstance(weight, Weight)
                assert bias is None or isinstance(bias, Weight)
                self.linear(node, x, weight, bias)
            case "Embedding":
                weight, ids = inputs
                assert isinstance(weight, Weight) and isinstance(ids, ir.Value)
                self.embedding(node, weight, ids)
            case "CachedAttention":
                self.cached_attention(node, inputs)
            case _:
                self.attention(node, inputs)

    def standard(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Copies an operator; a reshape with one dynamic size gets a constant shape."""
        if node.op_type == "Identity" and inputs[0] is not None:
            self.bind(node, [inputs[0]])
            return
        if node.op_type == "Reshape" and inputs[0] is not None:
            sizes = [s if isinstance(s, int) else -1 for s in node.outputs[0].shape or ()]
            if sizes and sizes.count(-1) <= 1:
                name = "constant.shape." + "_".join(map(str, sizes))
                inputs = [inputs[0], constant(name, np.asarray(sizes, dtype=np.int64))]
        attributes = {a.name: a.value for a in node.attributes.values() if a.name != "allowzero"}
        self.bind(node, self.op(node.op_type, inputs, attributes, outputs=len(node.outputs)))

    def finish(self, result: Operand, spec: TensorSpec) -> ir.Value:
        """A graph output with the dtype and name of its spec.

        The value itself if possible, since a copy of a cache would not be updated in place.
        """
        assert isinstance(result, ir.Value)
        dtype = np.dtype(spec.dtype)
        value = result
        if self.dtype != dtype:
            value = self.cast(result, dtype)
        elif result in self.finished or result.producer() is None:
            (value,) = self.op("Identity", [result])
        self.finished.add(value)
        named = _value(spec)
        value.name, value.shape, value.type = named.name, named.shape, named.type
        return value

    def assemble(self, inputs: Sequence[ir.Value], results: Sequence[ir.Value]) -> LoweredGraph:
        """The model of the emitted operators, without unused operators and constants."""
        needed = _live(self.nodes, results)
        initializers, external = [], {}
        for name, (weight, value) in self.constants.items():
            if not any(use.node in needed for use in value.uses()):
                continue
            initializers.append(value)
            if weight.nbytes <= INLINE_BYTES:
                value.const_value = ir.Tensor(weight.array(), name=name)
            else:
                external[name] = weight
        for node in reversed(self.nodes):
            if node not in needed:
                for index in range(len(node.inputs)):
                    node.replace_input_with(index, None)
        graph = ir.Graph(
            list(inputs),
            list(results),
            nodes=[n for n in self.nodes if n in needed],
            initializers=initializers,
            opset_imports=self.opsets,
            name="perception_rt",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="perception_rt")
        return LoweredGraph(model, external)

    def check_fused(self, name: str, graph: LoweredGraph, recipe: Recipe) -> None:
        """ExportError unless every attention became the operators that the backend fuses."""
        wanted: Counter[str] = Counter()
        for times, operators in (
            (recipe.attentions, self.attention_ops),
            (recipe.cached_attentions, self.cached_attention_ops),
        ):
            if times:
                wanted.update({operator: times * count for operator, count in operators.items()})
        for operator, count in wanted.items():
            fused = graph.count(operator)
            if fused != count:
                raise ExportError(
                    f"graph {name!r} has {fused} {operator} operators, not {count}: attention was "
                    "not fused"
                )


Entry = Callable[[Lowering, ir.Value], ir.Value]


def as_is(lowering: Lowering, x: ir.Value) -> ir.Value:
    """The input itself, or a cast to the graph's dtype for floats."""
    if x.dtype != ir.DataType.FLOAT or lowering.dtype == np.float32:
        return x
    return lowering.cast(x, lowering.dtype)


def uint8_images(mean: Sequence[float], std: Sequence[float]) -> Entry:
    """Entry for uint8 images (N, H, W, 3): (x / 255 - mean) / std as floats (N, 3, H, W)."""

    def entry(lowering: Lowering, images: ir.Value) -> ir.Value:
        x = lowering.channels_first(images)
        scale = np.asarray([1 / (255 * s) for s in std], np.float32).reshape(1, 3, 1, 1)
        shift = np.asarray([m / s for m, s in zip(mean, std, strict=True)], np.float32)
        x = lowering.op("Mul", [x, constant("images.scale", scale)])[0]
        x = lowering.op("Sub", [x, constant("images.shift", shift.reshape(1, 3, 1, 1))])[0]
        return x if lowering.dtype == np.float32 else lowering.cast(x, lowering.dtype)

    return entry


def _value(spec: TensorSpec) -> ir.Value:
    return ir.Value(
        name=spec.name,
        shape=ir.Shape(spec.shape),
        type=ir.TensorType(ir.DataType.from_numpy(np.dtype(spec.dtype))),
    )


def _constant_of(node: ir.Node) -> Array:
    (attribute,) = node.attributes.values()
    if attribute.name == "value":
        array: Array = attribute.as_tensor().numpy()
        return array
    return np.asarray(attribute.value, dtype=np.int64)


def _live(
    nodes: Sequence[ir.Node], results: Sequence[ir.Value], starts: Sequence[ir.Value] = ()
) -> set[ir.Node]:
    """Nodes that the results depend on, if the values `starts` are given."""
    needed: set[ir.Node] = set()
    wanted = set(results)
    for node in reversed(nodes):
        if any(v in wanted for v in node.outputs):
            needed.add(node)
            wanted.update(v for v in node.inputs if v is not None and v not in starts)
    return needed


def _slice(x: Array, starts: Array, ends: Array, axes: Array, steps: Array) -> Array:
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(index)]


def _evaluate(node: ir.Node, arrays: Sequence[Array]) -> Array:
    """Result of an operator on arrays."""
    attributes = node.attributes
    match node.op_type:
        case "Reshape":
            return arrays[0].reshape(arrays[1])
        case "Transpose":
            return arrays[0].transpose(attributes["perm"].as_ints())
        case "Slice":
            return _slice(*arrays)
        case "Cast":
            return arrays[0].astype(ir.DataType(attributes["to"].as_int()).numpy())
        case "Concat":
            return np.concatenate(arrays, axis=attributes["axis"].as_int())
        case "Linear":
            y: Array = arrays[0] @ arrays[1].T
            return y if len(arrays) == 2 else y + arrays[2]
        case _:
            raise AssertionError(f"cannot fold {node.op_type}")


_FOLDED = frozenset({"Concat", "Reshape", "Transpose", "Slice", "Cast", "Linear"})


def _fold(node: ir.Node, weights: Sequence[Weight]) -> Weight:
    """Folds an operator on constants: at once for integers, lazily for weights."""
    result = node.outputs[0]
    floats = [w for w in weights if w.dtype.kind == "f"]
    if not floats:
        array = _evaluate(node, [w.load() for w in weights])
        return constant(f"constant.{result.name}", np.asarray(array))
    shape = tuple(size for size in result.shape or () if isinstance(size, int))
    name = f"{floats[0].name}.{result.name}"
    return replace(
        floats[0],
        name=name,
        shape=shape,
        rows=None,
        load=lambda: _evaluate(node, [w.load() for w in weights]),
    )
