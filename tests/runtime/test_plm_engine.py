"""Engine calls of a language model: state in place, checks of the graphs, the reference backend."""

import mmap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import psutil
import pytest
from fake_plm import CONFIG, graph_specs, write_plm
from onnx import TensorProto, helper

from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.package import contract
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.manifest import Target
from perception_rt.package.reader import Package, open_package
from perception_rt.runtime.backends import onnxruntime as backend
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.session import Session, open_session

_TARGET = Target(backend="onnxruntime", precision="fp32", options={})


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plm(tmp_path_factory.mktemp("plm") / "package")


def open_engine(directory: Path) -> PlmEngine:
    return PlmEngine(open_package(directory), backend="reference", device="cpu", threads=None)


@pytest.fixture
def engine(directory: Path):
    engine = open_engine(directory)
    yield engine
    engine.close()


def predict(
    engine: PlmEngine, block: CacheBlock, row: int, ids: list[int], past: int
) -> np.ndarray:
    """Appends ids to a row; returns the logits after each, (T, V)."""
    hidden = engine.embed(np.array(ids))[None]
    where = np.arange(len(ids))[None]
    return engine.forward(hidden, np.array([past], np.int32), block, slice(row, row + 1), where)[0]


# The engine: a layer of grouped-query attention in ONNX, made by hand.


def attention_model(kv_heads: int, head_dim: int, heads: int) -> bytes:
    """One cached attention layer whose keys and values are the first channels of its input."""
    width = kv_heads * head_dim
    cache = ["batch", kv_heads, "slots", head_dim]
    tensors = [
        helper.make_tensor("start", TensorProto.INT64, [1], [0]),
        helper.make_tensor("stop", TensorProto.INT64, [1], [width]),
        helper.make_tensor("axis", TensorProto.INT64, [1], [2]),
        helper.make_tensor("one", TensorProto.INT32, [1], [1]),
    ]
    nodes = [
        helper.make_node("Shape", ["hidden"], ["length"], start=1, end=2),
        helper.make_node("Cast", ["length"], ["length_i32"], to=TensorProto.INT32),
        helper.make_node("Add", ["past_lengths", "length_i32"], ["totals"]),
        helper.make_node("Sub", ["totals", "one"], ["last"]),
        helper.make_node("ReduceMax", ["totals"], ["most"], keepdims=0),
        helper.make_node("Slice", ["hidden", "start", "stop", "axis"], ["kv"]),
        helper.make_node(
            "GroupQueryAttention",
            ["hidden", "kv", "kv", "key_cache_0", "value_cache_0", "last", "most"],
            [contract.HIDDEN_OUT, "key_cache_0_out", "value_cache_0_out"],
            domain="com.microsoft",
            num_heads=heads,
            kv_num_heads=kv_heads,
        ),
    ]
    float32, hidden = TensorProto.FLOAT, ["batch", "length", heads * head_dim]
    graph = helper.make_graph(
        nodes,
        "attention",
        [
            helper.make_tensor_value_info("hidden", float32, hidden),
            helper.make_tensor_value_info("past_lengths", TensorProto.INT32, ["batch"]),
            helper.make_tensor_value_info("key_cache_0", float32, cache),
            helper.make_tensor_value_info("value_cache_0", float32, cache),
        ],
        [
            helper.make_tensor_value_info(contract.HIDDEN_OUT, float32, hidden),
            helper.make_tensor_value_info("key_cache_0_out", float32, cache),
            helper.make_tensor_value_info("value_cache_0_out", float32, cache),
        ],
        tensors,
    )
    domains = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    model: onnx.ModelProto = helper.make_model(graph, opset_imports=domains, ir_version=10)
    return model.SerializeToString()


@pytest.fixture(scope="module")
def session(tmp_path_factory: pytest.TempPathFactory):
    """Attention of 4 heads of 16 channels, 2 of keys and values, in ONNX Runtime."""
    cache = ("batch", 2, "slots", 16)
    hidden = ("batch", "length", 64)
    caches = [
        TensorSpec(name=name, dtype="float32", shape=cache)
        for name in (contract.key_cache(0), contract.value_cache(0))
    ]
    spec = GraphSpec(
        file="decoder_0.onnx",
        data=(),
        inputs=(
            TensorSpec(name=contract.HIDDEN, dtype="float32", shape=hidden),
            TensorSpec(name=contract.PAST_LENGTHS, dtype="int32", shape=("batch",)),
            *caches,
        ),
        outputs=(
            TensorSpec(name=contract.HIDDEN_OUT, dtype="float32", shape=hidden),
            *(replace(tensor, name=contract.updated(tensor.name)) for tensor in caches),
        ),
    )
    directory = write_plm(
        tmp_path_factory.mktemp("gqa") / "package",
        graphs={"decoder_0": spec},
        files={spec.file: attention_model(2, 16, 4)},
        target=_TARGET,
    )
    session = open_session(
        open_package(directory), "decoder_0", backend="onnxruntime", device="cpu", threads=1
    )
    yield session
    session.close()


def attend(session: Session, hidden: np.ndarray, past: int, state: dict[str, Any]) -> np.ndarray:
    inputs = {contract.HIDDEN: hidden, contract.PAST_LENGTHS: np.array([past], np.int32)}
    (out,) = session.run(inputs, [contract.HIDDEN_OUT], state)
    return out


def caches(*shape: int) -> dict[str, np.ndarray]:
    return {name: np.zeros(shape, np.float32) for name in ("key_cache_0", "value_cache_0")}


def test_state_is_updated_in_place_and_no_other_row_is_touched(session: Session) -> None:
    whole = caches(5, 2, 32, 16)
    for array in whole.values():
        array[...] = np.nan  # also in unused slots
    state = {name: array[3:4] for name, array in whole.items()}
    hidden = np.random.default_rng(0).standard_normal((1, 7, 64)).astype(np.float32)
    prefill = attend(session, hidden[:, :4], 0, state)
    steps = [attend(session, hidden[:, i : i + 1], i, state) for i in range(4, 7)]
    together = attend(session, hidden, 0, caches(1, 2, 7, 16))
    np.testing.assert_allclose(np.concatenate([prefill, *steps], axis=1), together, atol=1e-6)
    expected = hidden[0, :, :32].reshape(7, 2, 16).transpose(1, 0, 2)
    for array in whole.values():
        assert np.array_equal(array[3, :, :7], expected)
        assert np.isnan(array[3, :, 7:]).all()
        assert np.isnan(array[[0, 1, 2, 4]]).all()


def test_state_is_not_copied(session: Session) -> None:
    """256 MiB of state are neither copied nor touched."""
    pages = [mmap.mmap(-1, 2**27, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) for _ in range(2)]
    arrays = [np.frombuffer(page, np.float32).reshape(1, 2, 2**20, 16) for page in pages]
    state = dict(zip(("key_cache_0", "value_cache_0"), arrays, strict=True))
    hidden = np.ones((1, 1, 64), np.float32)
    before = psutil.Process().memory_info().rss
    for past in range(3):
        attend(session, hidden, past, state)
    assert psutil.Process().memory_info().rss - before < 2**25
    assert arrays[0][0, 0, :3].all() and not arrays[0][0, 0, 3:100].any()


def test_64_bindings_are_cheap() -> None:
    """Two caches for each of 16 layers, in and out, cost far less than a decode step."""
    names = [f"c{i}" for i in range(32)]
    tensor = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", 8]) for n in names]
    ends = [
        helper.make_tensor_value_info(contract.updated(n), TensorProto.FLOAT, ["n", 8])
        for n in names
    ]
    one = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 8])]
    nodes = [helper.make_node("Neg", [n], [contract.updated(n)]) for n in names]
    nodes.append(helper.make_node("Neg", ["c0"], ["y"]))
    model = helper.make_model(
        helper.make_graph(nodes, "many", tensor, one + ends),
        opset_imports=[helper.make_opsetid("", 20)],
        ir_version=10,
    )
    engine = backend.OnnxRuntimeEngine(
        backend.ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]),
        {},
    )
    state = {name: np.ones((1, 8), np.float32) for name in names}
    times = []
    for _ in range(50):
        start = time.perf_counter()
        engine.run({}, ["y"], state)
        times.append(time.perf_counter() - start)
    assert min(times) < 2e-3  # measured: 0.2 ms
    assert all((array == 1).all() for array in state.values())  # negated 50 times


def test_state_that_does_not_fit_is_named(session: Session) -> None:
    good = caches(1, 2, 8, 16)
    hidden = np.ones((1, 1, 64), np.float32)
    locked = good["key_cache_0"].copy()
    locked.flags.writeable = False
    for state, message in (
        ({}, "input 'key_cache_0' is missing"),
        (good | {"value_cache_0": locked.astype(np.float16)}, "must be float32, not float16"),
        (good | {"key_cache_0": np.zeros((1, 2, 8, 12), np.float32)}, r"\(batch, 2, slots, 16\)"),
        (good | {"key_cache_0": np.zeros((1, 2, 16), np.float32)}, "must have shape"),
        (good | {"key_cache_0": np.zeros((1, 2, 16, 16), np.float32)[:, :, ::2]}, "C-contiguous"),
        (good | {"key_cache_0": locked}, "writeable"),
    ):
        with pytest.raises(InputError, match=message):
            attend(session, hidden, 0, state)
    with pytest.raises(PackageError, match="no output 'past_lengths_out'"):
        session.run(
            {contract.HIDDEN: hidden}, [], good | {contract.PAST_LENGTHS: np.zeros(1, np.int32)}
        )
    with pytest.raises(BackendError, match="not finite"):
        attend(session, hidden * np.nan, 0, good)


def test_pages_of_weights_are_given_back_while_a_session_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise a session would hold the weights twice at its peak."""
    released: list[str] = []
    used: list[Any] = []  # session options
    make: Callable[..., Any] = backend.ort.InferenceSession

    def slow(*arguments: Any, **options: Any) -> Any:
        time.sleep(0.3)
        if options["providers"] == ["fails"]:
            raise RuntimeError
        assert len(released) >= 3
        used.append(arguments[1])
        return make(*arguments, **options)

    monkeypatch.setattr(backend.ort, "InferenceSession", slow)
    monkeypatch.setattr(Package, "release", lambda self, file: released.append(file))
    before = threading.enumerate()
    with open_package(weighted_package(tmp_path / "package")) as package:
        engine = backend.open_session(package, "add", device="cpu", threads=1)
        (options,) = used  # leave fp8 Q/DQ pairs in place
        assert options.get_session_config_entry("session.disable_quant_qdq") == "1"
        assert set(released) == {"weights.bin"}
        assert np.array_equal(engine.run({"x": np.ones(4, np.float32)}, ["y"], {})[0], [2] * 4)
        monkeypatch.setitem(backend.PROVIDERS, "cpu", ("fails",))
        with pytest.raises(BackendError, match="RuntimeError"):
            backend.open_session(package, "add", device="cpu", threads=1)
    assert set(threading.enumerate()) <= set(before)  # those of earlier tests may end meanwhile


def weighted_package(dest: Path) -> Path:
    """A package with the graph y = x + 1, with the ones in a weights file."""
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4])
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights.bin"), ("offset", "0"), ("length", "16")):
        weight.external_data.add(key=key, value=value)
    graph = helper.make_graph(
        [helper.make_node("Add", ["x", "w"], ["y"])],
        "add",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [4])],
        [weight],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    spec = GraphSpec(
        file="add.onnx",
        data=("weights.bin",),
        inputs=(TensorSpec(name="x", dtype="float32", shape=(4,)),),
        outputs=(TensorSpec(name="y", dtype="float32", shape=(4,)),),
    )
    files = {"add.onnx": model.SerializeToString(), "weights.bin": np.ones(4, "<f4").tobytes()}
    return write_plm(dest, graphs={"add": spec}, files=files, target=_TARGET)


# The engine, on the reference backend.


def test_attributes_are_of_the_package(engine: PlmEngine) -> None:
    assert engine.config == CONFIG
    assert (engine.max_length, engine.vocab_size) == (512, 320)
    shape = engine.cache_shape
    assert (shape.layers, shape.kv_heads, shape.head_dim, shape.dtype) == (2, 2, 4, "float32")
    assert shape.bytes_per_token == 2 * 2 * 2 * 4 * 4


def test_package_that_disagrees_with_itself_is_refused(tmp_path: Path) -> None:
    graphs = graph_specs()
    first = graphs["decoder_0"]
    halves = tuple(
        replace(t, dtype="float16") if t.name == "key_cache_0" else t for t in first.inputs
    )
    wide = replace(CONFIG, decoder=replace(CONFIG.decoder, dim=32))
    architecture = CONFIG.to_dict()
    int8 = graph_specs(cache_dtype="int8")
    for index, (changes, message) in enumerate(
        (
            ({"graphs": graphs, "architecture": wide.to_dict()}, "'embed' must be float32"),
            ({"architecture": architecture | {"pooling_ratio": 1}}, "'image_features' of graph"),
            ({"architecture": architecture | {"n_layers": 3}}, "no graph 'decoder_2'"),
            ({"architecture": architecture | {"n_layers": 1}}, "beyond its last layer"),
            ({"architecture": architecture | {"n_heads": 3}}, "not divisible"),
            ({"architecture": architecture | {"colour": 3}}, "unknown keys"),
            ({"graphs": {k: v for k, v in graphs.items() if k != "vision"}}, "no graph 'vision'"),
            ({"graphs": graphs | {"decoder_1": first}}, "must start with layer 1"),
            ({"graphs": graphs | {"decoder_0": graphs["decoder_1"]}}, "must start with layer 0"),
            ({"graphs": graphs | {"decoder_0": replace(first, inputs=halves)}}, "value_cache_0"),
            ({"graphs": graphs | {"embed": graphs["vision"]}}, "graph 'embed' has"),
            ({"graphs": int8}, "float32 or float16, not int8"),
        )
    ):
        dest = write_plm(tmp_path / str(index), **changes)
        with pytest.raises(PackageError, match=message):
            open_engine(dest)


def test_one_part_and_float16_caches_will_do(tmp_path: Path) -> None:
    graphs = graph_specs(parts=1, cache_dtype="float16")
    engine = open_engine(write_plm(tmp_path / "package", graphs=graphs))
    block = CacheBlock(engine.cache_shape, 2, 64)
    assert block.keys[0].dtype == np.float16
    whole = predict(engine, block, 0, [5, 6, 7], 0)
    assert np.array_equal(predict(engine, block, 0, [7], 2)[0], whole[2])


def test_embed_and_its_limits(engine: PlmEngine) -> None:
    hidden = engine.embed(np.array([3, 319, 0]))
    assert hidden.shape == (3, 16) and hidden.dtype == np.float32
    assert list(hidden[:, 0]) == [3, 319, 0]
    for bad in ([320], [-1]):
        with pytest.raises(InputError, match="not in 0 to 319"):
            engine.embed(np.array(bad))
    with pytest.raises(InputError, match="must be int64, not int32"):
        engine.embed(np.array([1], np.int32))
    with pytest.raises(InputError, match="must have shape"):
        engine.embed(np.zeros(0, np.int64))


def test_tiles_are_encoded_one_by_one(engine: PlmEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    tiles = np.random.default_rng(0).integers(0, 256, (3, 28, 28, 3), np.uint8)
    seen: list[int] = []
    run = Session.run

    def counted(self: Session, inputs: dict[str, np.ndarray], *rest: Any) -> list[np.ndarray]:
        seen.append(len(inputs[contract.IMAGES_U8]))
        return run(self, inputs, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Session, "run", counted)
        features = engine.encode_tiles(tiles)
    assert features.shape == (3, 1, 16) and features.dtype == np.float32
    assert seen == [1, 1, 1]
    assert np.array_equal(features[1:2], engine.encode_tiles(tiles[1:2]))
    assert len({float(f) for f in features[:, 0, 0]}) == 3
    pixels = tiles.transpose(0, 3, 1, 2).astype(np.float32)
    assert engine.encode_pixels(pixels).shape == (3, 1, 16)
    assert engine.encode_tiles(tiles[:0]).shape == (0, 1, 16)
    with pytest.raises(InputError, match="uint8, not float32"):
        engine.encode_tiles(pixels)


@pytest.mark.parametrize("cut", [1, 2, 7, 19])
def test_chunks_give_what_the_whole_gives(engine: PlmEngine, cut: int) -> None:
    """PAR-05 and GEN-02: unused slots are NaN and are never read."""
    ids = list(range(40, 60))
    block = CacheBlock(engine.cache_shape, 3, 64)
    for array in block.keys + block.values:
        array[...] = np.nan
    whole = predict(engine, block, 0, ids, 0)
    assert np.isfinite(whole).all() and len(set(whole.argmax(axis=1))) > 10
    parts = [predict(engine, block, 2, ids[:cut], 0), predict(engine, block, 2, ids[cut:], cut)]
    assert np.array_equal(np.concatenate(parts), whole)
    assert np.isnan(block.keys[0][1]).all() and np.isnan(block.keys[0][2, :, 20:]).all()


def test_a_row_does_not_depend_on_its_batch(engine: PlmEngine) -> None:
    """GEN-01: rows of other lengths, and a slice of a block."""
    prompts = [list(range(n, n + 5 * n)) for n in range(1, 6)]
    block = CacheBlock(engine.cache_shape, 8, 64)
    alone = []
    for row, ids in enumerate(prompts):
        predict(engine, block, row + 2, ids, 0)
        alone.append(predict(engine, block, row + 2, [9], len(ids))[0])
    past = np.array([len(ids) for ids in prompts], np.int32)
    hidden = engine.embed(np.full(5, 9))[:, None]
    together = engine.forward(hidden, past, block, slice(2, 7), np.zeros((5, 1), np.int64))
    assert np.array_equal(together[:, 0], np.stack(alone))


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("kind", ["keys", "values"])
def test_the_double_sees_every_mistake(engine: PlmEngine, layer: int, kind: str) -> None:
    ids = [11, 12, 13, 14, 15]
    block = CacheBlock(engine.cache_shape, 3, 32)
    for row, prompt in enumerate((ids, ids[::-1], ids)):
        predict(engine, block, row, prompt, 0)
    right = predict(engine, block, 2, [16], 5)
    good = block.read(0, 5)

    def differs() -> bool:
        wrong = not np.array_equal(predict(engine, block, 0, [16], 5), right)
        block.write(0, good, 5)
        return wrong

    array = getattr(block, kind)[layer]
    assert not differs()
    array[0, :, 3] = np.nan
    assert differs()
    array[0, 1, 4] = 0  # one head only
    assert differs()
    array[0] = array[1]  # another sequence
    assert differs()
    array[0, :, [1, 2]] = array[0, :, [2, 1]]
    assert differs()
    assert not np.array_equal(predict(engine, block, 0, [16], 4), right)


def test_wrong_calls_are_our_own_mistakes(engine: PlmEngine) -> None:
    block = CacheBlock(engine.cache_shape, 4, 16)
    hidden = engine.embed(np.zeros(17, np.int64))[None]
    past, first = np.zeros(1, np.int32), np.zeros((1, 1), np.int64)
    two = np.repeat(hidden[:, :2], 2, axis=0)
    for arguments in (
        (hidden, past, block, slice(0, 1), first),  # too long for the row
        (hidden[:, :1], past + 16, block, slice(0, 1), first),
        (hidden[:, :1], past, block, slice(0, 2), first),  # rows for one sequence
        (hidden[:, :1], past, block, slice(0, 1), first + 1),
        (two, np.array([0, 1], np.int32), block, slice(0, 2), np.zeros((2, 1), np.int64)),
    ):
        with pytest.raises(AssertionError):
            engine.forward(*arguments)
    assert not any(array.any() for array in block.keys)


def test_graphs_are_opened_once_and_by_any_thread(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CON-03 for one engine: eight threads, each with its row."""
    opened: list[str] = []
    real = open_session

    def slow(package: Package, graph: str, **options: Any) -> Session:
        opened.append(graph)
        time.sleep(0.01)
        return real(package, graph, **options)

    monkeypatch.setattr("perception_rt.runtime.session.open_session", slow)
    engine = open_engine(directory)
    assert opened == []
    block = CacheBlock(engine.cache_shape, 8, 32)
    with ThreadPoolExecutor(8) as pool:
        rows = list(pool.map(lambda row: predict(engine, block, row, [1, 2, 3], 0), range(8)))
    assert all(np.array_equal(row, rows[0]) for row in rows)
    assert sorted(opened) == ["decoder_0", "decoder_1", "embed"]
    engine.close()
    engine.close()
    with pytest.raises(BackendError, match="closed"):
        engine.embed(np.array([1]))
