"""TensorRT engines, built ahead of time on a machine without a GPU, of graphs equal to eager.

The depth is cut, and all widths, grids and head sizes are the released models' own. The slow tests
build whole encoders and the widest one; `make engines` runs most of them. Between them, the tests
build both precisions for both GPUs, but few models for both.
"""

import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from PIL import Image

from perception_rt import tensorrt_library
from perception_rt.archs import get_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.cli import export_main
from perception_rt.config import PeConfig
from perception_rt.errors import BackendError, ExportError, InputError
from perception_rt.export.backends import tensorrt_engines
from perception_rt.export.backends.tensorrt_engines import (
    build_engine,
    check_engines,
    operator_counts,
)
from perception_rt.export.backends.tensorrt_profiles import profiles
from perception_rt.export.build import export_package
from perception_rt.export.plan import HERE, ExportPlan, PlmPlan
from perception_rt.export.quantization.calibration import images
from perception_rt.package.contract import GraphSpec, TensorSpec
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.tensorrt_library import TensorRt, find_tensorrt

pytest.importorskip("tensorrt_rtx_bindings", reason="TensorRT for RTX has wheels for x86-64 only")

BOTH = ("sm89", "sm120")
Export = Callable[..., Manifest]


@pytest.fixture
def export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Export:
    """`export(config, precision, *gpus)`: publishes a package with random weights."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))

    def run(config: PeConfig | PlmConfig, precision: str, *gpus: str) -> Manifest:
        size = config.vision.image_size
        common = {
            "name": "shape", "backend": "tensorrt", "precision": precision, "engines": gpus,
            # One image and not eight: ranges are found as well, in an eighth of the time.
            "calibration": one_image(tmp_path, size) if precision == "fp8" else None,
        }  # fmt: skip
        plan: ExportPlan | PlmPlan
        if isinstance(config, PlmConfig):
            tiles = TileSpec(tile_size=size)
            plan = PlmPlan(config=config, tiles=tiles, **common)  # type: ignore[arg-type]
        else:
            image = ImageSpec(height=size, width=size, resize="squash")
            plan = ExportPlan(config=config, image=image, taps=(), **common)  # type: ignore[arg-type]
        return export_package(plan, RandomWeights(config, 0), tmp_path / "package")

    return run


def one_image(folder: Path, size: int) -> Path:
    """A folder with one calibration image."""
    pictures = folder / "pictures"
    pictures.mkdir()
    Image.fromarray(images(1, size, size)[0]).save(pictures / "picture.png")
    return pictures


def shallow(name: str, layers: int = 2) -> PeConfig | PlmConfig:
    """A released model with fewer layers; an encoder without its text tower."""
    config = get_config(name)
    vision = replace(config.vision, layers=layers)
    if isinstance(config, PlmConfig):
        # A short context, since ONNX Runtime holds its keys and values for the gate.
        decoder = replace(config.decoder, n_layers=layers, max_seqlen=2048, vocab_size=4096)
        return replace(config, vision=vision, decoder=decoder, image_token_id=4000)
    return replace(config, vision=vision, text=None)


def check_fusion(manifest: Manifest, graph: str, layers: Counter[str]) -> None:
    """Checks layers and costs in the records of a graph's engines."""
    for gpu in manifest.content.target.options["engines"]:
        record = manifest.record["engines"][f"{graph}.{gpu}.engine"]
        found = {name: record["layers"].get(name, 0) for name in layers}
        assert found == dict(layers)
        assert record["bytes"] > 1000 and record["seconds"] > 0 and record["peak_rss_bytes"] > 0


@pytest.mark.parametrize(
    ("name", "precision", "gpus"),
    [
        ("PE-Core-B16-224", "fp16", BOTH),
        ("PE-Core-B16-224", "fp8", ("sm89",)),
        pytest.param("PE-Core-G14-448", "fp16", ("sm120",), marks=pytest.mark.slow),
        pytest.param("PE-Core-G14-448", "fp8", ("sm89",), marks=pytest.mark.slow),
    ],
)
def test_encoders_of_released_shapes_build(
    export: Export, name: str, precision: str, gpus: tuple[str, ...]
) -> None:
    """The second has heads of 96 channels."""
    config = shallow(name)
    manifest = export(config, precision, *gpus)
    pooled = int(config.vision.pool_type == "attn")
    layers = Counter(ATTENTION_OUTPUT=2 + pooled, ROTARY_EMBEDDING=4)
    check_fusion(manifest, "vision", layers)


@pytest.mark.parametrize(("precision", "gpu"), [("fp16", "sm89"), ("fp8", "sm120")])
def test_a_language_model_of_released_shape_builds(
    export: Export, precision: str, gpu: str
) -> None:
    manifest = export(shallow("PLM-1B"), precision, gpu)
    check_fusion(manifest, "vision", Counter(ATTENTION_OUTPUT=2, ROTARY_EMBEDDING=4))
    decoder = Counter(ATTENTION_OUTPUT=2, ROTARY_EMBEDDING=4, KV_CACHE_UPDATE=4)
    check_fusion(manifest, "decoder_0", decoder)
    record = manifest.record["engines"][f"decoder_0.{gpu}.engine"]["layers"]
    assert bool(record.get("QUANTIZE", 0)) == (precision == "fp8")
    assert f"pixels.{gpu}.engine" not in manifest.record["engines"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "precision", "gpu"),
    [
        ("PE-Core-B16-224", "fp16", "sm89"),
        ("PE-Core-B16-224", "fp8", "sm120"),
        ("PE-Core-L14-336", "fp16", "sm120"),
        ("PE-Core-L14-336", "fp8", "sm89"),
        ("PE-Lang-L14-448", "fp16", "sm89"),
        ("PE-Lang-L14-448", "fp8", "sm120"),
    ],
)
def test_whole_encoders_build(export: Export, name: str, precision: str, gpu: str) -> None:
    config = get_config(name)
    manifest = export(config, precision, gpu)
    pooled = int(config.vision.pool_type == "attn")
    depth = config.vision.layers
    check_fusion(
        manifest, "vision", Counter(ATTENTION_OUTPUT=depth + pooled, ROTARY_EMBEDDING=2 * depth)
    )


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp16", "fp8"])
def test_a_whole_language_model_builds(export: Export, precision: str) -> None:
    config = get_config("PLM-1B")
    manifest = export(config, precision, "sm89")
    assert isinstance(config, PlmConfig)
    depth = config.decoder.n_layers
    parts = [n for n in manifest.content.graphs if n.startswith("decoder")]
    built = Counter[str]()
    for part in parts:
        built.update(manifest.record["engines"][f"{part}.sm89.engine"]["layers"])
    assert (built["ATTENTION_OUTPUT"], built["KV_CACHE_UPDATE"]) == (depth, 2 * depth)


def attention_graph(folder: Path, dtype: int) -> tuple[Path, GraphSpec]:
    """One attention; TensorRT has a fused kernel for it in float16 and none in float32."""
    shape = ["batch", 4, 64, 64]
    values = [helper.make_tensor_value_info(n, dtype, shape) for n in ("q", "k", "v", "y")]
    node = helper.make_node("Attention", ["q", "k", "v"], ["y"])
    graph = helper.make_graph([node], "g", values[:3], values[3:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    file = folder / "attention.onnx"
    onnx.save(model, file)
    name = np.dtype(helper.tensor_dtype_to_np_dtype(dtype)).name
    specs = [TensorSpec(name=n, dtype=name, shape=("batch", 4, 64, 64)) for n in "qkvy"]
    spec = GraphSpec(file=file.name, data=(), inputs=tuple(specs[:3]), outputs=tuple(specs[3:]))
    return file, spec


def test_attention_without_a_fused_kernel_is_refused(tmp_path: Path) -> None:
    file, spec = attention_graph(tmp_path, TensorProto.FLOAT)
    arguments = (find_tensorrt(), file, spec, operator_counts(file))
    ranges = profiles("vision", 1)
    with pytest.raises(ExportError, match=r"cannot build attention\.onnx for sm89: .*"):
        build_engine(*arguments, capability="sm89", profiles=ranges)
    built = build_engine(*arguments, capability="sm89", profiles=ranges, allow_unfused=True)
    assert built.data.nbytes > 0


def older(*lost: str) -> TensorRt:
    """A TensorRT whose networks lack some layers."""
    library = find_tensorrt()
    api = library.api

    kept = {name: None for name in dir(api.INetworkDefinition) if name not in lost}

    class Api:
        INetworkDefinition = SimpleNamespace(**kept)

        def __getattr__(self, name: str) -> Any:
            return getattr(api, name)

    return replace(library, api=Api(), version="10.13")


def test_operators_without_a_layer_in_an_older_tensorrt_are_inlined(tmp_path: Path) -> None:
    out = tmp_path / "package"
    plan = ["--model", "PE-Demo", "--backend", "tensorrt", "--target", "none", "--taps", "none"]
    assert export_main([*plan, "--out", str(out)]) == 0
    with open_package(out) as package:
        spec = package.graph("vision")
    file = out / "vision.onnx"
    arguments: dict[str, Any] = {"capability": "sm89", "profiles": profiles("vision", 1)[:1]}
    operators = operator_counts(file)
    library = older("add_attention", "add_rotary_embedding")
    message = (
        r"10\.13 has no layers for Attention, RotaryEmbedding of vision\.onnx; --allow-unfused"
    )
    with pytest.raises(ExportError, match=message):
        build_engine(library, file, spec, operators, **arguments)
    built = build_engine(library, file, spec, operators, **arguments, allow_unfused=True)
    assert built.layers["SOFTMAX"] == operators["Attention"]
    assert "ATTENTION_OUTPUT" not in built.layers and "ROTARY_EMBEDDING" not in built.layers
    # The inlined graph computes the same.
    copy = tmp_path / "copy"
    shutil.copytree(out, copy)
    copy.chmod(0o700)
    (copy / "simple.onnx").write_bytes(
        tensorrt_engines.inlined(file, list(tensorrt_engines.DECOMPOSABLE))
    )
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    mine, theirs = (
        ort.InferenceSession(str(copy / name)).run(None, {"images": images})[0]
        for name in ("simple.onnx", "vision.onnx")
    )
    np.testing.assert_allclose(mine, theirs, atol=5e-3)


def test_a_tensorrt_without_caches_builds_no_decoder(tmp_path: Path) -> None:
    file, spec = attention_graph(tmp_path, TensorProto.FLOAT16)
    message = r"10\.13 has no layers for TensorScatter of attention\.onnx; it is too old"
    with pytest.raises(ExportError, match=message):
        build_engine(
            older("add_kv_cache_update", "add_rotary_embedding"), file, spec,
            {"Attention": 1, "TensorScatter": 2, "RotaryEmbedding": 2}, capability="sm89",
            profiles=profiles("vision", 1), allow_unfused=True,
        )  # fmt: skip


def test_a_layer_that_is_missing_is_named(tmp_path: Path) -> None:
    file, spec = attention_graph(tmp_path, TensorProto.FLOAT16)
    with pytest.raises(ExportError, match=r"1 ATTENTION_OUTPUT layers, not 2; --allow-unfused"):
        build_engine(
            find_tensorrt(), file, spec, {"Attention": 2}, capability="sm89",
            profiles=profiles("vision", 1),
        )  # fmt: skip


def test_tensorrt_s_message_is_quoted(tmp_path: Path) -> None:
    file, spec = attention_graph(tmp_path, TensorProto.FLOAT16)
    file.write_bytes(b"not a graph")
    message = r"tensorrt_rtx [0-9.]+ cannot read attention\.onnx: .*DESERIAL"
    with pytest.raises(ExportError, match=message):
        build_engine(
            find_tensorrt(), file, spec, {}, capability="sm89", profiles=profiles("vision", 1)
        )


def test_targets_are_checked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    library = find_tensorrt()
    check_engines(library, BOTH)
    with pytest.raises(BackendError, match=r"does not build for sm90, out of sm75, .*sm121"):
        check_engines(library, ("sm89", "sm90"))
    monkeypatch.setattr(tensorrt_engines, "gpu_capability", lambda: None)
    with pytest.raises(BackendError, match=r"no GPU to build for; name .* --target, out of sm75"):
        check_engines(library, (HERE,))
    # This library has no kernels for the machine's GPU; NVIDIA's tensorrt may have.
    monkeypatch.setattr(tensorrt_engines, "gpu_capability", lambda: "sm90")
    with pytest.raises(BackendError, match=r"not build for this machine's GPU, sm90, out of .*"):
        check_engines(library, (HERE,))
    monkeypatch.setattr(tensorrt_engines, "gpu_capability", lambda: "sm89")
    check_engines(library, (HERE,))
    for plan, message in (
        ({"engines": ("89",)}, "a compute capability is like sm89, not '89'"),
        ({"engines": ("sm89", "sm89")}, "occurs twice"),
        ({"engines": ("sm89",), "backend": "onnxruntime"}, "onnxruntime has no engines"),
        ({"precision": "fp32"}, "precision fp32 is not for backend tensorrt"),
    ):
        settings = {"backend": "tensorrt", "precision": "fp16", **plan}
        with pytest.raises(InputError, match=message):
            ExportPlan(
                name="x", config=shallow("PE-Core-B16-224"),
                image=ImageSpec(height=224, width=224, resize="squash"), **settings,
            )  # fmt: skip


def test_without_tensorrt_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    tensorrt_library.installed.cache_clear()
    for name in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_libs"):
        monkeypatch.setitem(sys.modules, name, None)
    try:
        with pytest.raises(BackendError, match=r"pip install 'perception_rt\[tensorrt\]'"):
            find_tensorrt()
    finally:
        tensorrt_library.installed.cache_clear()


def test_a_tensorrt_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> Any:
        raise ImportError

    monkeypatch.setitem(
        tensorrt_library.LOADERS, "tensorrt", lambda: SimpleNamespace(__version__="10.12.0.36")
    )
    monkeypatch.setitem(tensorrt_library.LOADERS, "tensorrt_rtx", missing)
    tensorrt_library.installed.cache_clear()
    try:
        with pytest.raises(
            BackendError, match=r"tensorrt 10\.12\.0\.36 is too old, at least 10\.13"
        ):
            find_tensorrt()
    finally:
        tensorrt_library.installed.cache_clear()


def test_tensorrt_s_interface_is_inspected() -> None:
    class Old:
        """The interface of TensorRT 10 and 11."""

        class IBuilderConfig:
            pass

        class NetworkDefinitionCreationFlag:
            STRONGLY_TYPED = 1

    assert TensorRt(Old, "tensorrt", "11.0").capabilities == ()
    assert tensorrt_engines.strongly_typed_flag(Old) == 2
    flags = find_tensorrt().api.NetworkDefinitionCreationFlag
    typed = getattr(flags, "STRONGLY_TYPED", None)
    assert tensorrt_engines.strongly_typed_flag(find_tensorrt().api) == (
        1 << int(typed) if typed else 1
    )
    with pytest.raises(BackendError, match="only tensorrt_rtx builds ahead of time"):
        check_engines(TensorRt(Old, "tensorrt", "11.0"), ("sm89",))
