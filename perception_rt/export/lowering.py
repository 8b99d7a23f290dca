"""The walk from a traced graph to a backend's graph, and the weights that it refers to.

A lowering is a subclass that says how `Linear` and `Attention` look for its backend; every other
operator is copied. Operators on constants alone are folded into lazy weights, so that no weight is
in memory before it is written.

Legend: N batch, T tokens, C channels in, O channels out.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from perception_rt.errors import ExportError
from perception_rt.export.trace import DOMAIN, OPSET, Traced
from perception_rt.package.contract import TensorSpec

Array = np.ndarray[Any, Any]
DType = np.dtype[Any]
IR_VERSION = 10
INLINE_BYTES = 1024  # smaller constants stay in the graph, where optimisers can read them


@dataclass(frozen=True, slots=True)
class Weight:
    """A constant of a graph whose bytes exist only while they are written.

    Attributes:
        name: unique within a package: equal names mean equal bytes.
        dtype: numpy dtype.
        shape: sizes.
        load: reads or computes the array; pure, may be called again.
        fixed: keeps its dtype in a graph of another.
        origin: the checkpoint tensor that it is made from, if it is one.
    """

    name: str
    dtype: DType
    shape: tuple[int, ...]
    load: Callable[[], Array]
    fixed: bool = False
    origin: str = ""

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    def array(self) -> Array:
        """The contiguous array; ExportError that names the weight if it is not finite."""
        array = np.asarray(self.load(), order="C")
        assert array.shape == self.shape and array.dtype == self.dtype, self.name
        if not np.isfinite(array).all():
            raise ExportError(f"{self.name} is not finite as {self.dtype}")
        return array

    def derive(
        self, suffix: str, function: Callable[[Array], Array], shape: tuple[int, ...]
    ) -> "Weight":
        """`function` of this weight, of the same dtype, under a name that says so."""
        load = self.load
        return replace(self, name=self.name + suffix, shape=shape, load=lambda: function(load()))


Operand = ir.Value | Weight


def constant(name: str, array: Array) -> Weight:
    """A small constant that is known now, and keeps its dtype."""
    return Weight(name, array.dtype, array.shape, lambda: array, fixed=True)


@dataclass(frozen=True, slots=True)
class LoweredGraph:
    """A backend's graph, and its large constants by initializer name, not yet written."""

    model: ir.Model
    weights: dict[str, Weight]

    def count(self, op_type: str) -> int:
        """How many operators of a type the graph has."""
        return sum(node.op_type == op_type for node in self.model.graph)


class Lowering(ABC):
    """Rebuilds a traced graph for one backend. An instance is used once.

    Args:
        traced: what `trace` returned.
        parameters: a `Weight` for every parameter of the traced module, by name.
        dtype: of activations and float weights: float32 or float16.
        int8: names of the linear weights that become int8.
    """

    # The one operator that each traced attention becomes; the export counts them.
    attention_op: str

    def __init__(
        self,
        traced: Traced,
        parameters: Mapping[str, Weight],
        *,
        dtype: DType,
        int8: Collection[str] = (),
    ) -> None:
        self.traced = traced
        self.parameters = parameters
        self.dtype = np.dtype(dtype)
        self.int8 = frozenset(int8)
        self.nodes: list[ir.Node] = []
        self.env: dict[ir.Value, Operand] = {}
        self.constants: dict[str, tuple[Weight, ir.Value]] = {}
        self.opsets = {"": OPSET}

    def lower(
        self, spec: TensorSpec, entry: "Entry", outputs: Mapping[str, TensorSpec]
    ) -> LoweredGraph:
        """Builds the graph from one input to some of the traced graph's outputs.

        Args:
            spec: the new graph's input.
            entry: turns it into the traced graph's input.
            outputs: for each wanted traced output, by name, the new graph's output.
        """
        for name, initializer in self.traced.graph.initializers.items():
            self.env[initializer] = self.parameters[name]
        source = _value(spec)
        self.env[self.traced.graph.inputs[0]] = entry(self, source)
        for node in self.traced.graph:
            self.visit(node)
        results = [
            self.finish(self.env[self.traced.outputs[old]], new) for old, new in outputs.items()
        ]
        return self.assemble(source, results)

    # What a backend overrides.

    @abstractmethod
    def linear(self, node: ir.Node, x: ir.Value, weight: Weight, bias: Weight | None) -> None:
        """Emits x @ weight.T + bias, weight (O, C), and binds the node's output."""

    @abstractmethod
    def attention(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Emits attention over q, k, v and optional cos, sin, and binds the node's output."""

    # What it builds with.

    def op(
        self,
        op_type: str,
        inputs: Sequence[Operand | None],
        attributes: Mapping[str, Any] | None = None,
        *,
        domain: str = "",
        outputs: int = 1,
    ) -> list[ir.Value]:
        """Appends one node and returns its outputs."""
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
        """The graph value of an operand; a weight becomes an initializer, once."""
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
        """A float32 weight in the graph's dtype; any other as it is."""
        if weight.fixed or weight.dtype != np.float32 or self.dtype == np.float32:
            return weight
        dtype, load = self.dtype, weight.load
        name = f"{weight.name}.{dtype.name}"

        def cast() -> Array:
            with np.errstate(over="ignore"):  # `Weight.array` names a weight that overflows
                return load().astype(dtype)

        return replace(weight, name=name, dtype=dtype, load=cast)

    def is_int8(self, weight: Weight) -> bool:
        """Whether a linear weight, or the tensor that it is a part of, becomes int8."""
        return weight.origin in self.int8

    def bind(self, node: ir.Node, operands: Sequence[Operand]) -> None:
        """Says what stands for the outputs of a traced node."""
        self.env.update(zip(node.outputs, operands, strict=True))

    def cast(self, x: ir.Value, dtype: DType) -> ir.Value:
        """x as `dtype`."""
        return self.op("Cast", [x], {"to": int(ir.DataType.from_numpy(dtype))})[0]

    # The walk.

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
        elif node.domain == DOMAIN and node.op_type == "Linear":
            x, weight, bias = (*inputs, None)[:3]
            assert isinstance(x, ir.Value) and isinstance(weight, Weight)
            assert bias is None or isinstance(bias, Weight)
            self.linear(node, x, weight, bias)
        elif node.domain == DOMAIN:
            self.attention(node, inputs)
        else:
            self.standard(node, inputs)

    def standard(self, node: ir.Node, inputs: Sequence[Operand | None]) -> None:
        """Copies an operator; a reshape in which only the batch is dynamic gets a constant."""
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
        """A graph output in the dtype and under the name of its spec."""
        assert isinstance(result, ir.Value)
        dtype = np.dtype(spec.dtype)
        op_type = "Cast" if self.dtype != dtype else "Identity"
        attributes = {"to": int(ir.DataType.from_numpy(dtype))} if op_type == "Cast" else {}
        (value,) = self.op(op_type, [result], attributes)
        named = _value(spec)
        value.name, value.shape, value.type = named.name, named.shape, named.type
        return value

    def assemble(self, source: ir.Value, results: Sequence[ir.Value]) -> LoweredGraph:
        """The model of what was emitted, without nodes and constants that nothing uses."""
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
            [source],
            list(results),
            nodes=[n for n in self.nodes if n in needed],
            initializers=initializers,
            opset_imports=self.opsets,
            name="perception_rt",
        )
        model = ir.Model(graph, ir_version=IR_VERSION, producer_name="perception_rt")
        return LoweredGraph(model, external)


Entry = Callable[[Lowering, ir.Value], ir.Value]


def as_is(lowering: Lowering, x: ir.Value) -> ir.Value:
    """Token ids, or normalised float pixels in the graph's dtype."""
    if x.dtype != ir.DataType.FLOAT or lowering.dtype == np.float32:
        return x
    return lowering.cast(x, lowering.dtype)


def uint8_images(mean: Sequence[float], std: Sequence[float]) -> Entry:
    """uint8 (N, H, W, 3) -> normalised (N, 3, H, W): (x / 255 - mean) / std."""

    def entry(lowering: Lowering, images: ir.Value) -> ir.Value:
        (x,) = lowering.op("Transpose", [images], {"perm": [0, 3, 1, 2]})
        x = lowering.cast(x, np.dtype(np.float32))
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


def _live(nodes: Sequence[ir.Node], results: Sequence[ir.Value]) -> set[ir.Node]:
    """The nodes that the results depend on."""
    needed: set[ir.Node] = set()
    wanted = set(results)
    for node in reversed(nodes):
        if any(v in wanted for v in node.outputs):
            needed.add(node)
            wanted.update(v for v in node.inputs if v is not None)
    return needed


def _slice(x: Array, starts: Array, ends: Array, axes: Array, steps: Array) -> Array:
    index = [slice(None)] * x.ndim
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        index[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(index)]


def _evaluate(node: ir.Node, arrays: Sequence[Array]) -> Array:
    """One operator on arrays."""
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
    """The result of an operator on constants: at once for integers, lazily for weights."""
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
        load=lambda: _evaluate(node, [w.load() for w in weights]),
    )
