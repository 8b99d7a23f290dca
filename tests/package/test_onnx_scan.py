"""PKG-07, PKG-08 and the wire format reader compared with onnx itself."""

import random

import numpy as np
import onnx
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from perception_rt.errors import ExportError, PackageError
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.manifest import FileEntry
from perception_rt.package.onnx_scan import check_graph, scan_graph
from perception_rt.package.reader import verify_package
from perception_rt.package.store import Stage

HERE = ("location", "weights.bin")


def test_field_numbers_are_those_of_onnx():
    numbers = {
        onnx.ModelProto: {"graph": 7, "opset_import": 8, "training_info": 20, "functions": 25},
        onnx.GraphProto: {
            "node": 1,
            "initializer": 5,
            "input": 11,
            "output": 12,
            "sparse_initializer": 15,
        },
        onnx.FunctionProto: {"node": 7, "attribute_proto": 11},
        onnx.NodeProto: {"op_type": 4, "attribute": 5, "domain": 7},
        onnx.AttributeProto: {
            "t": 5,
            "g": 6,
            "tensors": 10,
            "graphs": 11,
            "sparse_tensor": 22,
            "sparse_tensors": 23,
        },
        onnx.SparseTensorProto: {"values": 1, "indices": 2},
        onnx.TensorProto: {
            "dims": 1,
            "data_type": 2,
            "name": 8,
            "external_data": 13,
            "data_location": 14,
        },
        onnx.OperatorSetIdProto: {"domain": 1, "version": 2},
        onnx.StringStringEntryProto: {"key": 1, "value": 2},
        onnx.ValueInfoProto: {"name": 1},
    }
    for message, fields in numbers.items():
        for name, number in fields.items():
            assert message.DESCRIPTOR.fields_by_name[name].number == number


def test_fields_that_can_hold_tensors_or_graphs_are_all_known():
    """Fails for a release of onnx that adds a field with tensors."""
    kinds = {"TensorProto", "GraphProto", "SparseTensorProto", "NodeProto", "FunctionProto"}
    found = {
        f"{message.DESCRIPTOR.name}.{field.name}"
        for message in (
            *(onnx.ModelProto, onnx.GraphProto, onnx.FunctionProto, onnx.NodeProto),
            *(onnx.AttributeProto, onnx.SparseTensorProto, onnx.TensorProto, onnx.ValueInfoProto),
        )
        for field in message.DESCRIPTOR.fields
        if field.message_type is not None
        and field.message_type.name in kinds | {"AttributeProto", "TrainingInfoProto"}
    }
    assert found == {
        *("ModelProto.graph", "ModelProto.training_info", "ModelProto.functions"),
        *("GraphProto.node", "GraphProto.initializer", "GraphProto.sparse_initializer"),
        *("FunctionProto.attribute_proto", "FunctionProto.node", "NodeProto.attribute"),
        *("AttributeProto.t", "AttributeProto.g", "AttributeProto.tensors"),
        *("AttributeProto.graphs", "AttributeProto.sparse_tensor"),
        *("AttributeProto.sparse_tensors", "SparseTensorProto.values"),
        "SparseTensorProto.indices",
    }


def value(name):
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", 4])


def nested(depth, tensor):
    """A graph with nested Ifs and the tensor in the innermost."""
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    graph = helper.make_graph([node], "inner", [], [value("c")])
    for _ in range(depth - 1):
        node = helper.make_node("If", ["cond"], ["c"], then_branch=graph, else_branch=graph)
        graph = helper.make_graph([node], "outer", [], [value("c")])
    return graph


def test_everything_is_found(tools):
    """Tensors in each field that can hold one, and operators in each kind of graph."""
    where = [HERE, ("offset", "0"), ("length", "16")]
    tensors = {name: tools.external(name, where, [4]) for name in "abcdefghi"}
    sparse = onnx.SparseTensorProto(values=tensors["b"], indices=tensors["c"], dims=[9])
    node = helper.make_node("Custom", ["x"], ["y"], domain="my.domain")
    node.attribute.append(onnx.AttributeProto(name="t", t=tensors["d"]))
    node.attribute.append(onnx.AttributeProto(name="ts", tensors=[tensors["e"]]))
    node.attribute.append(
        onnx.AttributeProto(name="s", sparse_tensor=onnx.SparseTensorProto(values=tensors["f"]))
    )
    node.attribute.append(onnx.AttributeProto(name="g", graphs=[nested(2, tensors["g"])]))
    inside = numpy_helper.from_array(np.ones(4, np.float32), "inside")
    graph = helper.make_graph([node], "g", [value("x")], [value("y")], [tensors["a"], inside])
    graph.sparse_initializer.append(sparse)
    function = helper.make_function(
        "f.domain",
        "F",
        ["i"],
        ["o"],
        [helper.make_node("Constant", [], ["o"], value=tensors["h"])],
        [helper.make_opsetid("", 20)],
    )
    opsets = [helper.make_opsetid("ai.onnx", 20), helper.make_opsetid("my.domain", 1)]
    function.attribute_proto.append(onnx.AttributeProto(name="default", t=tensors["i"]))
    model = helper.make_model(graph, functions=[function], opset_imports=opsets)
    scan = scan_graph(model.SerializeToString())
    assert sorted(t.name for t in scan.externals) == list("abcdefgghi")
    assert all(t.entries == dict(where) and t.size_bytes == 16 for t in scan.externals)
    assert scan.opsets == (("", 20), ("my.domain", 1))
    assert [value.name for value in scan.inputs + scan.outputs] == ["x", "y"]
    assert [value.shape for value in scan.inputs + scan.outputs] == [(None, 4), (None, 4)]
    assert sorted(scan.nodes) == [
        *([("Constant", "")] * 3),
        ("Custom", "my.domain"),
        ("If", ""),
    ]


def spec(**changes):
    fields = {
        "file": "vision.onnx",
        "data": ("weights.bin",),
        "inputs": (TensorSpec(name="x", dtype="float32", shape=("batch", 4)),),
        "outputs": (TensorSpec(name="y", dtype="float32", shape=("batch", 4)),),
    }
    return GraphSpec(**(fields | changes))


FILES = {
    "weights.bin": FileEntry(sha256="0" * 64, size_bytes=640),
    "other.bin": FileEntry(sha256="0" * 64, size_bytes=640),
}


def check(tools, *, tensors=None, nodes=None, domains=None, graph_spec=None):
    nodes = nodes or [helper.make_node("Add", ["x", "w"], ["y"])]
    graph = helper.make_graph(nodes, "g", [value("x")], [value("y")], tensors or [])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)])
    check_graph(model.SerializeToString(), graph_spec or spec(), FILES, domains=domains)


BAD_ENTRIES = {
    "parent": [("location", "../weights.bin")],
    "absolute": [("location", "/etc/passwd")],
    "dot": [("location", "./weights.bin")],
    "listed but not of the graph": [("location", "other.bin")],
    "not listed": [("location", "more.bin")],
    "memory marker": [("location", "*/_ORT_MEM_ADDR_/*"), ("offset", "140737488355328")],
    "no location": [("offset", "0"), ("length", "16")],
    "empty location": [("location", "")],
    "unknown key": [HERE, ("basepath", "/")],
    "dunder key": [HERE, ("__class__", "x")],
    "key twice": [HERE, HERE],
    "negative offset": [HERE, ("offset", "-1")],
    "negative length": [HERE, ("length", "-16")],
    "huge offset": [HERE, ("offset", str(2**62)), ("length", "16")],
    "huge length": [HERE, ("offset", "0"), ("length", str(2**62))],
    "overflowing": [HERE, ("offset", str(2**63 - 8)), ("length", "16")],
    "20 digits": [HERE, ("offset", "1" * 20)],
    "past the end": [HERE, ("offset", "625"), ("length", "16")],
    "past the end by shape": [HERE, ("offset", "625")],
    "shorter than the shape": [HERE, ("length", "8")],
    "zero length": [HERE, ("length", "0")],
    "hexadecimal": [HERE, ("offset", "0x0")],
    "space": [HERE, ("offset", " 0")],
    "underscore": [HERE, ("offset", "1_0")],
    "leading zero": [HERE, ("offset", "00")],
    "other digits": [HERE, ("offset", "\u0660")],
    "nothing": [],
}


@pytest.mark.parametrize("case", BAD_ENTRIES)
def test_bad_external_data(tools, case):
    """PKG-07."""
    with pytest.raises(PackageError):
        check(tools, tensors=[tools.external("w", BAD_ENTRIES[case], [4])])


@pytest.mark.parametrize(
    "entries",
    [
        [HERE],
        [HERE, ("offset", "624")],
        [HERE, ("offset", "0"), ("length", "16"), ("checksum", "da39")],
    ],
)
def test_good_external_data(tools, entries):
    check(tools, tensors=[tools.external("w", entries, [4])])


@pytest.mark.parametrize("case", ["parent", "negative offset", "huge length", "unknown key"])
def test_refused_at_publish_and_at_load(tools, tmp_path, case):
    """PKG-07: with matching digests, which an attacker can compute."""
    tiny = tools.Tiny(tensor=tools.external("w", BAD_ENTRIES[case], [4]))
    with pytest.raises(PackageError, match="tensor 'w'"):
        tiny.publish(tmp_path / "published")
    assert not (tmp_path / "published").exists()
    forged = tiny.forge(tmp_path / "forged")
    with pytest.raises(PackageError, match="tensor 'w'"):
        verify_package(forged)


def test_domains_are_checked_when_sealing(tools, tmp_path):
    nodes = [helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain="com.microsoft")]
    tiny = tools.Tiny(nodes=nodes)
    with Stage.create(tmp_path / "tiny") as stage:
        manifest = tiny.fill(stage)
        stage.seal(manifest, domains=lambda backend: frozenset({"", "com.microsoft"}))
        with pytest.raises(PackageError, match="'FusedMatMul' is of domain"):
            stage.seal(manifest, domains=lambda backend: frozenset({""}))
        with pytest.raises(ExportError, match="only a sealed stage"):
            stage.publish()


@pytest.mark.parametrize(
    ("ranges", "good"),
    [
        ([(0, 4), (16, 4)], True),
        ([(0, 4), (0, 4)], True),
        ([(16, 4), (0, 4), (16, 4)], True),
        ([(8, 0), (0, 4)], True),
        ([(0, 4), (8, 4)], False),
        ([(0, 16), (16, 4)], False),
        ([(0, 4), (0, 8)], False),
        ([(0, 4), (15, 4)], False),
    ],
)
def test_overlapping_ranges(tools, ranges, good):
    """PKG-07: tied weights share a whole range or no byte."""
    tensors = [
        tools.external(f"w{i}", [HERE, ("offset", str(start)), ("length", str(4 * n))], [n])
        for i, (start, n) in enumerate(ranges)
    ]
    if good:
        check(tools, tensors=tensors)
    else:
        with pytest.raises(PackageError, match="overlap"):
            check(tools, tensors=tensors)


@pytest.mark.parametrize(
    ("data_type", "dims", "size"),
    [
        *((TensorProto.FLOAT16, [3, 5], 30), (TensorProto.INT4, [3], 2), (TensorProto.INT8, [], 1)),
        *((TensorProto.BFLOAT16, [0, 7], 0), (TensorProto.DOUBLE, [2, 2], 32)),
        *((TensorProto.STRING, [1], None), (99, [1], None), (TensorProto.FLOAT, [-1], None)),
        *((TensorProto.FLOAT, [2**62] * 33, None), (TensorProto.FLOAT, [1] * 33, None)),
    ],
)
def test_size_of_a_tensor(tools, data_type, dims, size):
    tensor = tools.external("w", [HERE], dims)
    tensor.data_type = data_type
    graph = helper.make_graph([], "g", [], [], [tensor])
    data = helper.make_model(graph).SerializeToString()
    if size is None:
        with pytest.raises(PackageError, match="unusable type or shape"):
            scan_graph(data)
    else:
        assert scan_graph(data).externals[0].size_bytes == size


def test_element_sizes_are_those_of_onnx(tools):
    for name, number in TensorProto.DataType.items():
        if name in ("UNDEFINED", "STRING") or name.startswith("FLOAT6"):
            continue
        tensor = tools.external("w", [HERE], [8])
        tensor.data_type = number
        data = helper.make_model(helper.make_graph([], "g", [], [], [tensor])).SerializeToString()
        array = np.zeros(8, helper.tensor_dtype_to_np_dtype(number))
        expected = len(numpy_helper.from_array(array, "w").raw_data)
        assert scan_graph(data).externals[0].size_bytes == expected, name


def test_location_flag_and_entries_must_agree(tools):
    for tensor in (tools.external("w", [HERE], [4]), tools.external("w", [], [4])):
        tensor.data_location = TensorProto.DEFAULT if tensor.external_data else TensorProto.EXTERNAL
        with pytest.raises(PackageError, match="data location"):
            check(tools, tensors=[tensor])


def test_operators(tools):
    """PKG-08."""
    node = helper.make_node("Attention", ["x"], ["y"], domain="com.microsoft")
    check(tools, nodes=[node])
    check(tools, nodes=[node], domains=frozenset({"com.microsoft"}))
    with pytest.raises(PackageError, match="'Attention' is of domain"):
        check(tools, nodes=[node], domains=frozenset({""}))
    check(tools, domains=frozenset({""}))
    spelled_out = helper.make_node("Add", ["x", "x"], ["y"], domain="ai.onnx")
    check(tools, nodes=[spelled_out], domains=frozenset({""}))
    for domain in ("com.microsoft", "", "x"):
        node = helper.make_node("EPContext", ["x"], ["y"], domain=domain)
        with pytest.raises(PackageError, match="EPContext"):
            check(tools, nodes=[node])
    hidden = helper.make_node("If", ["x"], ["y"])
    inner = helper.make_graph([node], "inner", [], [])
    hidden.attribute.append(helper.make_attribute("then_branch", inner))
    with pytest.raises(PackageError, match="EPContext"):
        check(tools, nodes=[hidden])


@pytest.mark.parametrize("field", ["inputs", "outputs"])
def test_names_must_be_those_of_the_contract(tools, field):
    """PKG-08."""
    wrong = TensorSpec(name="z", dtype="float32", shape=("batch", 4))
    for tensors in ((), (wrong,), (*getattr(spec(), field), wrong)):
        with pytest.raises(PackageError, match=f"'vision.onnx': {field} are"):
            check(tools, graph_spec=spec(**{field: tensors}))


def test_external_data_below_the_top_level(tools):
    nested_spec = spec(file="graphs/vision.onnx")
    check(tools, graph_spec=nested_spec)
    with pytest.raises(PackageError, match="top level"):
        check(tools, tensors=[tools.external("w", [HERE], [4])], graph_spec=nested_spec)


def test_depth_of_graphs(tools):
    def model(depth):
        tensor = tools.external("w", [HERE], [4])
        return helper.make_model(nested(depth, tensor)).SerializeToString()

    assert len(scan_graph(model(8)).externals) == 2**7
    with pytest.raises(PackageError, match="more than 8 graphs"):
        scan_graph(model(9))


def varint(number):
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, payload):
    return varint(number << 3 | 2) + varint(len(payload)) + payload


def test_a_graph_in_two_parts_is_refused(tools):
    """Some parsers merge repeated fields, others take the last."""
    data = tools.Tiny().model()
    extra = onnx.GraphProto(initializer=[tools.external("w", [HERE], [4])]).SerializeToString()
    with pytest.raises(PackageError, match="model field 7 occurs twice"):
        scan_graph(data + field(7, extra))
    with pytest.raises(PackageError, match="node field 4 occurs twice"):
        scan_graph(field(7, field(1, field(4, b"Add") + field(4, b"EPContext"))))


@pytest.mark.parametrize("number", [5, 6, 22])
def test_an_attribute_value_in_two_parts_is_refused(number):
    attribute = field(number, b"") + field(number, b"")
    with pytest.raises(PackageError, match=f"attribute field {number} occurs twice"):
        scan_graph(field(7, field(1, field(5, attribute))))


def test_truncated_enum_is_refused():
    """2^32 + 1 becomes EXTERNAL in a parser that cuts enums to 32 bits."""
    tensor = varint(14 << 3) + varint(2**32 + 1) + field(13, field(1, b"location"))
    with pytest.raises(PackageError, match="data location"):
        scan_graph(field(7, field(5, tensor)))


@pytest.mark.parametrize(
    "data",
    [
        *(b"", b"\0", b"\x3a", b"\x3a\x05abcd", b"\x80" * 11, b"\xff" * 9 + b"\x7f", b"\x3b\x3c"),
        *(b"\x38\x01", field(0, b""), field(2**29, b""), field(7, b"\x0b"), field(20, b"")),
        field(7, field(1, field(4, b"\xff"))),
        varint(7 << 3 | 2) + varint(2**63) + b"x",
        b"\x3a\x64",  # a graph of 100 bytes without the bytes
        field(7, b"") + b"\x08" + b"\xff" * 9 + b"\x7f",  # an integer of 70 bits
        field(7, b"") + field(20, b""),  # a training graph
    ],
)
def test_malformed_bytes(data):
    with pytest.raises(PackageError, match="ONNX model"):
        scan_graph(data)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=120).map(lambda data: field(7, field(1, data) + field(5, data))))
@example(field(7, field(5, varint(1 << 3 | 2) + varint(3) + b"\x80\x80\x80")))
def test_only_package_errors_escape_from_arbitrary_bytes(data):
    try:
        scan_graph(data)
    except PackageError as error:
        assert "0x" not in str(error)


def test_only_package_errors_escape_from_changed_models(tools):
    rng = random.Random(0)
    model = tools.Tiny().model()
    for _ in range(2000):
        data = bytearray(model)
        for _ in range(rng.randint(1, 3)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        try:
            check_graph(bytes(data), spec(), FILES, domains=None)
        except PackageError as error:
            assert "vision.onnx" in str(error) or "ONNX model" in str(error)
