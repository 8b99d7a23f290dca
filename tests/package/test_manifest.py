"""PKG-03, PKG-04, PKG-09: the strict schema of manifest.json."""

import copy
import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from perception_rt.errors import PackageError
from perception_rt.limits import Limits
from perception_rt.package.manifest import Manifest, canonical_json, check_path, parse

HEX = "ab" * 32


@pytest.fixture(scope="module")
def valid(tools):
    return tools.Tiny().manifest()


def test_round_trip_is_exact(valid):
    data = valid.to_bytes()
    assert parse(data) == valid
    assert parse(data).to_bytes() == data
    assert data.isascii() and data.endswith(b"}\n")


def test_id_depends_on_content_only(tools, valid):
    slower = Manifest.create(tools.Tiny().content(), record={"latency_ms": 99})
    other = Manifest.create(tools.Tiny(seed=1).content(), record=valid.record)
    assert slower.id == valid.id and slower.digest != valid.digest
    assert other.id != valid.id


def test_created_equals_what_a_reader_sees(tools):
    # JSON turns tuples into lists, so the manifest in memory must hold lists already.
    manifest = Manifest.create(tools.Tiny().content(), record={"runs": (1, 2)})
    assert manifest.record == {"runs": [1, 2]}
    assert parse(manifest.to_bytes()) == manifest


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_is_found(valid, bit):
    data = valid.to_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << bit
        with pytest.raises(PackageError):
            parse(bytes(changed))


CHANGES = {
    "schema missing": (lambda m: m.pop("schema"), "missing fields: 'schema'"),
    "schema 0": (lambda m: m.update(schema=0), "schema must be 1"),
    "schema true": (lambda m: m.update(schema=True), "schema must be 1"),
    "schema 1.0": (lambda m: m.update(schema=1.0), "schema must be 1"),
    "schema 2": (lambda m: m.update(schema=2, more=1), "newer version of perception_rt .schema 2"),
    "unknown top": (lambda m: m.update(extra=1), "unknown fields: 'extra'"),
    "unknown content": (lambda m: m["content"].update(extra=1), "unknown fields: 'extra'"),
    "missing content": (lambda m: m["content"].pop("weights"), "missing fields: 'weights'"),
    "content list": (lambda m: m.update(content=[]), "content must be an object"),
    "record null": (lambda m: m.update(record=None), "record must be an object"),
    "family": (lambda m: m["content"].update(family="clip"), "family 'clip'"),
    "name": (lambda m: m["content"].update(name=""), "content.name must be 1 to 128"),
    "name newline": (lambda m: m["content"].update(name="a\nb"), "printable"),
    "name long": (lambda m: m["content"].update(name="a" * 129), "1 to 128"),
    "target": (lambda m: m["content"]["target"].pop("backend"), "missing fields: 'backend'"),
    "options": (lambda m: m["content"]["target"].update(options=1), "options must be an object"),
    "processing": (lambda m: m["content"]["processing"].pop("text"), "missing fields: 'text'"),
    "image": (lambda m: m["content"]["processing"].update(image=None), "image must be an object"),
    "weights nested": (lambda m: m["content"]["weights"].update(a=[1]), "'a' must be a scalar"),
    "versions": (lambda m: m["content"]["versions"].update(a=1), "'a' must be a string"),
    "no graphs": (lambda m: m["content"].update(graphs={}), "graphs must not be empty"),
    "graph file": (lambda m: graph(m).update(file="other.onnx"), "needs 'other.onnx'"),
    "graph data": (lambda m: graph(m).update(data=["other.bin"]), "needs 'other.bin'"),
    "graph data twice": (
        lambda m: graph(m).update(data=["weights.bin"] * 2),
        "names a file twice",
    ),
    "graph missing": (lambda m: graph(m).pop("data"), "must have the keys data, file, inputs"),
    "graph unknown": (lambda m: graph(m).update(device="cpu"), "may have backend and kind, and"),
    "graph backend null": (lambda m: graph(m).update(backend=None), "backend must be 1 to 64"),
    "graph backend empty": (lambda m: graph(m).update(backend=""), "backend must be 1 to 64"),
    "graph backend own": (
        lambda m: graph(m).update(backend=m["content"]["target"]["backend"]),
        "must leave out its backend, which is the package's own",
    ),
    "graph kind": (lambda m: graph(m).update(kind=7), "kind must be 1 to 64 characters"),
    "graph kind newline": (lambda m: graph(m).update(kind="native\n"), "kind must be 1 to 64"),
    "graph kind long": (lambda m: graph(m).update(kind="n" * 65), "kind must be 1 to 64"),
    "graph kind onnx": (lambda m: graph(m).update(kind="onnx"), "must leave out its kind"),
    "graph dtype": (lambda m: graph(m)["inputs"][0].update(dtype="object"), "dtype"),
    "graph listed": (lambda m: m["content"]["files"].pop("vision.onnx"), "needs 'vision.onnx'"),
    "hash upper": (lambda m: entry(m).update(sha256=HEX.upper()), "64 lower-case hex"),
    "hash short": (lambda m: entry(m).update(sha256=HEX[:-1]), "64 lower-case hex"),
    "hash newline": (lambda m: entry(m).update(sha256=HEX + "\n"), "64 lower-case hex"),
    "hash type": (lambda m: entry(m).update(sha256=1), "must be a string"),
    "size negative": (lambda m: entry(m).update(bytes=-1), "non-negative"),
    "size float": (lambda m: entry(m).update(bytes=640.0), "non-negative"),
    "size bool": (lambda m: entry(m).update(bytes=True), "non-negative"),
    "entry extra": (lambda m: entry(m).update(md5="x"), "unknown fields: 'md5'"),
    "surrogate": (lambda m: m["record"].update(a="\ud800"), "lone surrogate"),
    "surrogate key": (lambda m: m["record"].update({"\udfff": 1}), "lone surrogate"),
    "int 2^63": (lambda m: m["record"].update(a=2**63), "outside 64 bits"),
    "int -2^63-1": (lambda m: m["record"].update(a=-(2**63) - 1), "outside 64 bits"),
    "int 4001 digits": (lambda m: m["record"].update(a=10**4000), "outside 64 bits"),
    "case": (lambda m: m["content"]["files"].update({"WEIGHTS.bin": entry(m)}), "in conflict"),
    "case folder": (lambda m: m["content"]["files"].update({"Text/b": entry(m)}), "in conflict"),
    "file and folder": (lambda m: m["content"]["files"].update({"text": entry(m)}), "in conflict"),
    "itself": (lambda m: m["content"]["files"].update({"manifest.json": entry(m)}), "file path"),
}


def graph(manifest):
    return manifest["content"]["graphs"]["vision"]


def entry(manifest):
    return manifest["content"]["files"]["weights.bin"]


@pytest.mark.parametrize("case", CHANGES)
def test_a_change_is_named_even_with_fitting_digests(tools, valid, case):
    change, message = CHANGES[case]
    value = copy.deepcopy(valid.to_dict())
    change(value)
    with pytest.raises(PackageError, match=message):
        parse(tools.resign(value))


def test_boundaries_are_accepted(tools, valid):
    value = copy.deepcopy(valid.to_dict())
    value["record"] = {"a": 2**63 - 1, "b": -(2**63), "c": 1.7e308, "d": "\U0001f600", "e": None}
    value["content"]["name"] = "a" * 128
    assert parse(tools.resign(value)).record == value["record"]


def test_a_graph_may_name_a_backend_and_a_kind(tools, valid):
    value = copy.deepcopy(valid.to_dict())
    graph(value).update(backend="native", kind="native-weights")
    manifest = parse(tools.resign(value))
    spec = manifest.content.graphs["vision"]
    assert (spec.backend, spec.kind) == ("native", "native-weights")
    assert manifest.content.backend_of("vision") == "native"
    assert valid.content.backend_of("vision") == valid.content.target.backend
    assert parse(manifest.to_bytes()) == manifest
    assert manifest.id != valid.id


def test_graphs_without_backend_and_kind_have_the_four_keys_of_earlier_versions(valid):
    assert set(graph(valid.to_dict())) == {"file", "data", "inputs", "outputs"}


@pytest.mark.parametrize("field", ["id", "digest"])
@pytest.mark.parametrize(
    "digest", [f"sha256:{HEX}", f"sha512:{HEX}", f"SHA256:{HEX}", HEX, f"sha256:{HEX.upper()}", 7]
)
def test_wrong_id_or_digest(valid, field, digest):
    with pytest.raises(PackageError, match=f"manifest: {field} "):
        parse(canonical_json(valid.to_dict() | {field: digest}))


def test_id_of_other_content_is_refused_though_the_digest_fits(tools, valid):
    value = valid.to_dict() | {"id": f"sha256:{HEX}"}
    body = {key: item for key, item in value.items() if key != "digest"}
    value["digest"] = "sha256:" + hashlib.sha256(canonical_json(body)).hexdigest()
    with pytest.raises(PackageError, match="id does not match"):
        parse(canonical_json(value))


NOT_CANONICAL = {
    "bom": lambda t: b"\xef\xbb\xbf" + t.encode(),
    "utf-16": lambda t: t.encode("utf-16"),
    "utf-16 without mark": lambda t: t.encode("utf-16-le"),
    "compact": lambda t: json.dumps(json.loads(t)).encode(),
    "no newline": lambda t: t.rstrip("\n").encode(),
    "two newlines": lambda t: t.encode() + b"\n",
    "crlf": lambda t: t.replace("\n", "\r\n").encode(),
    "escape": lambda t: t.replace("PE-Tiny", "PE\\u002dTiny").encode(),
    "number": lambda t: t.replace("1.25", "1.250").encode(),
    "exponent": lambda t: t.replace("1.25", "125e-2").encode(),
    "twice": lambda t: t.replace('"schema": 1', '"schema": 1,\n  "schema": 1').encode(),
    "nan": lambda t: t.replace("1.25", "NaN").encode(),
    "infinity": lambda t: t.replace("1.25", "-Infinity").encode(),
    "5000 digits": lambda t: t.replace("1.25", "1" * 5000).encode(),
    "1e400": lambda t: t.replace("1.25", "1e400").encode(),
    "empty": lambda t: b"",
    "null": lambda t: b"null\n",
    "list": lambda t: b"[]\n",
    "half": lambda t: t[: len(t) // 2].encode(),
    "trailing": lambda t: t.encode() + b"{}",
    "nul": lambda t: t.encode() + b"\0",
}


@pytest.mark.parametrize("case", NOT_CANONICAL)
def test_other_serialisations_are_refused(valid, case):
    data = NOT_CANONICAL[case](valid.to_bytes().decode())
    assert data != valid.to_bytes()
    with pytest.raises(PackageError):
        parse(data)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'["\\"[",'])
def test_depth_is_refused_before_the_json_parser(opening):
    with pytest.raises(PackageError, match="nested more deeply than the limit of 16"):
        parse(opening * 100_000)


def test_limits_at_and_above(valid):
    data = valid.to_bytes()
    files = len(valid.content.files)
    assert parse(data, Limits(manifest_bytes=len(data), package_files=files, manifest_depth=7))
    with pytest.raises(PackageError, match=f"limit of {len(data) - 1}"):
        parse(data, Limits(manifest_bytes=len(data) - 1))
    with pytest.raises(PackageError, match=f"{files} files are more than the limit of {files - 1}"):
        parse(data, Limits(package_files=files - 1))
    with pytest.raises(PackageError, match="limit of 6"):
        parse(data, Limits(manifest_depth=6))


@pytest.mark.parametrize("quote", [b'"\\', b'"', b'\\"', b'"\\"'])
def test_scanning_unfinished_strings_takes_linear_time(quote):
    with pytest.raises(PackageError, match="not JSON"):
        parse(quote * (400_000 // len(quote)))


class Opaque:
    pass


@pytest.mark.parametrize(
    "value", [{1: 2}, {"a": Opaque()}, [float("nan")], {"a": {1, 2}}, b"x", 2**64, "\udc80", Path()]
)
def test_canonical_json_refuses_values_without_json_form(value):
    with pytest.raises(PackageError) as info:
        canonical_json(value)
    assert "0x" not in str(info.value)


def test_canonical_json_refuses_cycles():
    value: list = []
    value.append(value)
    with pytest.raises(PackageError, match="nested too deeply"):
        canonical_json(value)


@pytest.mark.parametrize("path", ["a", "vision.onnx", "a/b/c", "_x-1.y", "a" * 128, "a..b"])
def test_good_paths(path):
    check_path(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, derandomize=True, database=None)
@given(st.binary(max_size=200) | JSON.map(lambda v: json.dumps(v).encode()))
def test_only_package_errors_escape_from_arbitrary_bytes(data):
    with pytest.raises(PackageError):
        parse(data)


def paths_of(value, prefix=()):
    yield prefix
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in items if isinstance(value, dict | list) else ():
        if isinstance(item, dict | list):
            yield from paths_of(item, (*prefix, key))
        else:
            yield (*prefix, key)


@settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data(), value=JSON)
def test_only_package_errors_escape_from_a_replaced_part(tools, valid, data, value):
    whole = copy.deepcopy(valid.to_dict())
    path = data.draw(st.sampled_from(sorted(paths_of(whole), key=repr)))
    parent = whole
    for key in path[:-1]:
        parent = parent[key]
    if path:
        parent[path[-1]] = value
    else:
        whole["content"] = value
    try:
        manifest = parse(tools.resign(whole))
    except PackageError:
        return
    assert parse(manifest.to_bytes()) == manifest
