"""Checks the bytes of an ONNX model before they are loaded, without the onnx library.

Reads the few protobuf fields that matter: operators with their integer attributes, opsets, names of
inputs and outputs, and every reference to data outside the model. Encodings that two parsers could
read differently (a singular field twice, a wrong wire type) are refused.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from perception_rt.errors import PackageError
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.manifest import FileEntry

_MAX_DEPTH = 8  # graphs inside graphs
_MAX_RANK = 32
_VARINT, _FIXED64, _LEN, _FIXED32 = 0, 1, 2, 5
_EXTERNAL = 1  # TensorProto.DataLocation
_EXTERNAL_KEYS = frozenset({"location", "offset", "length", "checksum"})
_NUMBER = re.compile(r"0|[1-9][0-9]{0,18}")

# Values of TensorProto.DataType by bits per element, without types that cannot be external.
_TYPES_BY_BITS = {
    2: (25, 26),
    4: (21, 22, 23),
    8: (2, 3, 9, 17, 18, 19, 20, 24),
    16: (4, 5, 10, 16),
    32: (1, 6, 12),
    64: (7, 11, 13, 14),
    128: (15,),
}
_ELEMENT_BITS = {kind: bits for bits, kinds in _TYPES_BY_BITS.items() for kind in kinds}

# Wire types of the fields that are read, by message; None where `dims` may come packed or not.
_MODEL = {7: _LEN, 8: _LEN, 20: _LEN, 25: _LEN}
_GRAPH = {1: _LEN, 5: _LEN, 11: _LEN, 12: _LEN, 15: _LEN}
_FUNCTION = {7: _LEN, 11: _LEN}
_NODE = {4: _LEN, 5: _LEN, 7: _LEN}
_ATTRIBUTE = {1: _LEN, 3: _VARINT, 5: _LEN, 6: _LEN, 10: _LEN, 11: _LEN, 22: _LEN, 23: _LEN}
_SPARSE = {1: _LEN, 2: _LEN}
_TENSOR = {1: None, 2: _VARINT, 8: _LEN, 13: _LEN, 14: _VARINT}
_OPSET = {1: _LEN, 2: _VARINT}
_ENTRY = {1: _LEN, 2: _LEN}
_VALUE_INFO = {1: _LEN, 2: _LEN}
_TYPE = {1: _LEN}
_TENSOR_TYPE = {1: _VARINT, 2: _LEN}
_SHAPE = {1: _LEN}
_DIMENSION = {1: _VARINT}
# Values of TensorProto.DataType by the dtypes of inputs and outputs.
_KINDS = {"uint8": 2, "int8": 3, "int32": 6, "int64": 7, "float16": 10, "float32": 1}


@dataclass(frozen=True, slots=True, kw_only=True)
class ExternalTensor:
    """A tensor whose elements are in another file.

    Attributes:
        name: name of the tensor in the model.
        kind: value of TensorProto.DataType.
        shape: sizes of the dimensions.
        entries: the tensor's external data entries, such as location, offset and length.
    """

    name: str
    kind: int
    shape: tuple[int, ...]
    entries: Mapping[str, str]

    @property
    def size_bytes(self) -> int:
        """Size of the elements in bytes."""
        return (math.prod(self.shape) * _ELEMENT_BITS[self.kind] + 7) // 8


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueType:
    """An input or output of a model.

    Attributes:
        name: name in the model.
        kind: value of TensorProto.DataType; 0 if it is not given.
        shape: sizes, None for each dynamic one; None if it is not given.
    """

    name: str
    kind: int
    shape: tuple[int | None, ...] | None

    def fits(self, spec: TensorSpec) -> bool:
        """Whether a tensor of the spec is one of this type; what is not given fits."""
        if self.kind not in (0, _KINDS[spec.dtype]):
            return False
        if self.shape is None:
            return True
        return len(self.shape) == len(spec.shape) and all(
            size is None or size == wanted
            for size, wanted in zip(self.shape, spec.shape, strict=True)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphScan:
    """Operators, tensors and names of a model, including its subgraphs and functions.

    Attributes:
        opsets: (domain, version) of each opset import.
        nodes: (op_type, domain) of each node; the default domain is "".
        integers: integer attributes of each of `nodes` by name, as unsigned 64-bit values.
        externals: all tensors with data outside the model.
        inputs: inputs of the main graph, in order.
        outputs: outputs of the main graph, in order.
    """

    opsets: tuple[tuple[str, int], ...]
    nodes: tuple[tuple[str, str], ...]
    integers: tuple[Mapping[str, int], ...]
    externals: tuple[ExternalTensor, ...]
    inputs: tuple[ValueType, ...]
    outputs: tuple[ValueType, ...]


def scan_graph(data: bytes) -> GraphScan:
    """Lists operators, tensors and names of the ONNX model in `data`.

    Raises:
        PackageError: `data` is not an ONNX model, or is ambiguous.
    """
    model = _Message(memoryview(data), "model", _MODEL)
    if 20 in model.fields:
        raise PackageError("ONNX model: training graphs are not allowed")
    opsets = []
    for view in model.messages(8):
        opset = _Message(view, "opset import", _OPSET)
        opsets.append((_domain(opset), opset.integer(2)))
    graph = model.one(7)
    if graph is None:
        raise PackageError("ONNX model: no graph")
    walk = _Walk()
    inputs, outputs = walk.graph(graph, 1)
    for view in model.messages(25):
        function = _Message(view, "function", _FUNCTION)
        walk.nodes_of(function.messages(7), 1)
        for attribute in function.messages(11):
            walk.attribute(attribute, 1)
    return GraphScan(
        opsets=tuple(opsets),
        nodes=tuple(walk.nodes),
        integers=tuple(walk.integers),
        externals=tuple(walk.externals),
        inputs=inputs,
        outputs=outputs,
    )


def check_graph(
    data: bytes,
    spec: GraphSpec,
    files: Mapping[str, FileEntry],
    *,
    domains: frozenset[str] | None,
) -> None:
    """Refuses a model that could read outside the package or does not match `spec`.

    Args:
        data: bytes of the ONNX model.
        spec: the graph's record in the manifest.
        files: files of the package.
        domains: allowed operator domains ("" is ONNX's own); None allows all.

    Raises:
        PackageError: names the first operator, tensor or name that is wrong.
    """
    scan = scan_graph(data)
    for op_type, domain in scan.nodes:
        if op_type == "EPContext":
            raise PackageError(f"graph {spec.file!r}: EPContext nodes are not allowed")
        if domains is not None and domain not in domains:
            raise PackageError(
                f"graph {spec.file!r}: operator {op_type!a:.80} is of domain {domain!a:.80}; "
                f"allowed are {sorted(domains)}"
            )
    for what, found, wanted in (
        ("inputs", scan.inputs, spec.inputs),
        ("outputs", scan.outputs, spec.outputs),
    ):
        names = [tensor.name for tensor in wanted]
        have = [value.name for value in found]
        if have != names:
            raise PackageError(f"graph {spec.file!r}: {what} are {have!a:.200}, not {names!a:.200}")
        for value, tensor in zip(found, wanted, strict=True):
            if not value.fits(tensor):
                raise PackageError(
                    f"graph {spec.file!r}: {tensor.name!r} is of another type or shape than "
                    f"{tensor.dtype} {tensor.shape}"
                )
    if scan.externals and "/" in spec.file:
        # A location is relative to the model's folder, so only at the top it is a path in `files`.
        raise PackageError(f"graph {spec.file!r}: with external data it must be at the top level")
    _check_overlaps([_external_range(t, spec, files) for t in scan.externals], spec.file)


def _external_range(
    tensor: ExternalTensor, spec: GraphSpec, files: Mapping[str, FileEntry]
) -> tuple[str, int, int]:
    """The checked (file, start, end) of an external tensor."""
    where = f"graph {spec.file!r}: tensor {tensor.name!a:.80}"
    unknown = sorted(set(tensor.entries) - _EXTERNAL_KEYS)
    if unknown:
        raise PackageError(f"{where} has the external data key {unknown[0]!a:.80}")
    location = tensor.entries.get("location")
    if location not in spec.data or location not in files:
        raise PackageError(
            f"{where} has data in {location!a:.80}, which is not a file of the graph"
        )
    offset = _number(tensor.entries.get("offset", "0"), f"{where}: offset")
    length = _number(tensor.entries.get("length", str(tensor.size_bytes)), f"{where}: length")
    if length != tensor.size_bytes:
        raise PackageError(
            f"{where} has {length} bytes of external data; its shape needs {tensor.size_bytes}"
        )
    if offset + length > files[location].size_bytes:
        raise PackageError(
            f"{where} ends at byte {offset + length} of {location!r}, which has "
            f"{files[location].size_bytes}"
        )
    return location, offset, offset + length


def _check_overlaps(ranges: list[tuple[str, int, int]], file: str) -> None:
    """PackageError if two different ranges share bytes."""
    reached: dict[str, int] = {}
    for location, start, end in sorted(set(ranges)):
        if start < end and start < reached.get(location, 0):
            raise PackageError(f"graph {file!r}: tensors overlap at byte {start} of {location!r}")
        reached[location] = max(end, reached.get(location, 0))


def _number(text: str, where: str) -> int:
    if not _NUMBER.fullmatch(text):
        raise PackageError(f"{where} {text!a:.40} is not a non-negative 64-bit integer")
    return int(text)


@dataclass(slots=True)
class _Walk:
    """Collects nodes and external tensors over all graphs of a model."""

    nodes: list[tuple[str, str]] = field(default_factory=list)
    integers: list[dict[str, int]] = field(default_factory=list)
    externals: list[ExternalTensor] = field(default_factory=list)

    def graph(
        self, view: memoryview, depth: int
    ) -> tuple[tuple[ValueType, ...], tuple[ValueType, ...]]:
        """Walks one graph; returns its inputs and outputs."""
        if depth > _MAX_DEPTH:
            raise PackageError(f"ONNX model: more than {_MAX_DEPTH} graphs inside each other")
        graph = _Message(view, "graph", _GRAPH)
        self.nodes_of(graph.messages(1), depth)
        for tensor in graph.messages(5):
            self.tensor(tensor)
        for sparse in graph.messages(15):
            self.sparse_tensor(sparse)
        inputs, outputs = map(_value, graph.messages(11)), map(_value, graph.messages(12))
        return tuple(inputs), tuple(outputs)

    def nodes_of(self, views: list[memoryview], depth: int) -> None:
        for view in views:
            node = _Message(view, "node", _NODE)
            self.nodes.append((node.text(4), _domain(node, 7)))
            integers: dict[str, int] = {}
            self.integers.append(integers)  # before the nodes of subgraphs, as in `nodes`
            for view in node.messages(5):
                attribute = self.attribute(view, depth)
                if 3 in attribute.fields:
                    integers[attribute.text(1)] = attribute.integer(3)

    def attribute(self, view: memoryview, depth: int) -> "_Message":
        """Walks the tensors and graphs of an attribute; returns the attribute."""
        attribute = _Message(view, "attribute", _ATTRIBUTE)
        for number in (5, 6, 22):
            attribute.one(number)  # refuses a repeated field
        for tensor in attribute.messages(5) + attribute.messages(10):
            self.tensor(tensor)
        for sparse in attribute.messages(22) + attribute.messages(23):
            self.sparse_tensor(sparse)
        for graph in attribute.messages(6) + attribute.messages(11):
            self.graph(graph, depth + 1)
        return attribute

    def sparse_tensor(self, view: memoryview) -> None:
        sparse = _Message(view, "sparse tensor", _SPARSE)
        for part in (sparse.one(1), sparse.one(2)):
            if part is not None:
                self.tensor(part)

    def tensor(self, view: memoryview) -> None:
        tensor = _Message(view, "tensor", _TENSOR)
        name, location = tensor.text(8), tensor.integer(14)
        entries: dict[str, str] = {}
        for item in tensor.messages(13):
            entry = _Message(item, "external data entry", _ENTRY)
            key = entry.text(1)
            if key in entries:
                raise PackageError(f"ONNX model: tensor {name!a:.80} has {key!a:.80} twice")
            entries[key] = entry.text(2)
        if location not in (0, _EXTERNAL) or bool(entries) != (location == _EXTERNAL):
            raise PackageError(
                f"ONNX model: tensor {name!a:.80} has data location {location} and "
                f"{len(entries)} external data entries"
            )
        if entries:
            shape, kind = _shape(tensor, name), tensor.integer(2)
            self.externals.append(
                ExternalTensor(name=name, kind=kind, shape=shape, entries=entries)
            )


def _shape(tensor: "_Message", name: str) -> tuple[int, ...]:
    """Shape of a tensor; PackageError if its type has no size."""
    dims: list[int] = []
    for value in tensor.fields.get(1, []):
        if isinstance(value, int):
            dims.append(value)
            continue
        position = 0
        while position < len(value) and len(dims) <= _MAX_RANK:
            size, position = _varint(value, position)
            dims.append(size)
    sized = tensor.integer(2) in _ELEMENT_BITS
    if not sized or len(dims) > _MAX_RANK or any(size >= 2**63 for size in dims):
        raise PackageError(f"ONNX model: tensor {name!a:.80} has an unusable type or shape")
    return tuple(dims)


def _value(view: memoryview) -> ValueType:
    """Name, type and shape of an input or output; a type that is no tensor's has kind 0."""
    value = _Message(view, "value", _VALUE_INFO)
    kind, shape = value.one(2), None
    tensor = None if kind is None else _Message(kind, "type", _TYPE).one(1)
    if tensor is None:
        return ValueType(name=value.text(1), kind=0, shape=None)
    message = _Message(tensor, "tensor type", _TENSOR_TYPE)
    dims = message.one(2)
    if dims is not None:
        found = _Message(dims, "shape", _SHAPE).messages(1)
        sizes = [_Message(dim, "dimension", _DIMENSION) for dim in found]
        shape = tuple(size.integer(1) if 1 in size.fields else None for size in sizes)
    return ValueType(name=value.text(1), kind=message.integer(1), shape=shape)


def _domain(message: "_Message", number: int = 1) -> str:
    """Value of a domain field; "ai.onnx" is another spelling of the default domain."""
    domain = message.text(number)
    return "" if domain == "ai.onnx" else domain


class _Message:
    """The wanted fields of one protobuf message; other fields are skipped."""

    __slots__ = ("fields", "kind")

    def __init__(self, view: memoryview, kind: str, wires: Mapping[int, int | None]) -> None:
        self.kind = kind
        self.fields: dict[int, list[int | memoryview]] = {}
        for number, wire, value in _read_fields(view):
            if number not in wires:
                continue
            if wire != wires[number] and (wires[number] is not None or wire not in (_VARINT, _LEN)):
                raise PackageError(f"ONNX model: {kind} field {number} has wire type {wire}")
            self.fields.setdefault(number, []).append(value)

    def messages(self, number: int) -> list[memoryview]:
        """Values of a length-delimited field."""
        return [v for v in self.fields.get(number, []) if isinstance(v, memoryview)]

    def one(self, number: int) -> memoryview | None:
        """Value of a singular length-delimited field; None if it is absent."""
        self._refuse_repeats(number)
        values = self.messages(number)
        return values[0] if values else None

    def text(self, number: int) -> str:
        """Value of a string field; "" if it is absent."""
        view = self.one(number)
        try:
            return "" if view is None else str(view, "utf-8")
        except UnicodeDecodeError:
            raise PackageError(f"ONNX model: {self.kind} field {number} is not UTF-8") from None

    def integer(self, number: int) -> int:
        """Value of an integer field; 0 if it is absent."""
        self._refuse_repeats(number)
        value = self.fields.get(number, [0])[0]
        assert isinstance(value, int)  # the wire types above ensure it
        return value

    def _refuse_repeats(self, number: int) -> None:
        if len(self.fields.get(number, [])) > 1:
            raise PackageError(f"ONNX model: {self.kind} field {number} occurs twice")


def _read_fields(view: memoryview) -> Iterator[tuple[int, int, int | memoryview]]:
    """Yields (field number, wire type, value) of a message; fixed-size values are skipped."""
    position = 0
    while position < len(view):
        tag, position = _varint(view, position)
        number, wire = tag >> 3, tag & 7
        value: int | memoryview
        if wire == _VARINT:
            value, position = _varint(view, position)
        elif wire in (_FIXED64, _FIXED32, _LEN):
            size = {_FIXED64: 8, _FIXED32: 4}.get(wire, 0)
            if wire == _LEN:
                size, position = _varint(view, position)
            if size > len(view) - position:
                raise PackageError("ONNX model: a field is longer than the message around it")
            value = view[position : position + size]
            position += size
        else:
            raise PackageError(f"ONNX model: wire type {wire} does not occur in ONNX")
        if not 0 < number < 2**29:
            raise PackageError(f"ONNX model: field number {number} does not exist")
        yield number, wire, value


def _varint(view: memoryview, position: int) -> tuple[int, int]:
    """Reads the variable-length 64-bit integer at `position`; returns it and the end position."""
    value = 0
    for shift in range(0, 70, 7):
        if position >= len(view):
            raise PackageError("ONNX model: ends inside an integer")
        byte = view[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            if value >= 2**64:
                break
            return value, position
    raise PackageError("ONNX model: an integer is longer than 64 bits")
