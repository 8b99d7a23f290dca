"""`--route torch-tensorrt`: the programs that the library gets, and errors without it."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import perception_rt as prt
from perception_rt.archs import get_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.cli import export_main
from perception_rt.config import PeConfig
from perception_rt.errors import BackendError, ExportError, InputError
from perception_rt.export.backends import tensorrt_engines, torch_tensorrt
from perception_rt.export.build import export_package
from perception_rt.export.components.pe import PeExport
from perception_rt.export.plan import HERE, ExportPlan, PlmPlan
from perception_rt.package.reader import open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.clip_bpe import ClipTokenizer
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.tensorrt_library import TensorRt

TEXTS = ["one", "two"]
PICTURES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def plan(config: PeConfig, **changes: Any) -> ExportPlan:
    options: dict[str, Any] = {
        "name": "pe", "config": config, "backend": "tensorrt", "precision": "fp16",
        "image": ImageSpec(height=32, width=32), "engines": (HERE,), "route": "torch-tensorrt",
    }  # fmt: skip
    return ExportPlan(**{**options, **changes})


@dataclass(frozen=True, kw_only=True)
class Range:
    """`torch_tensorrt.Input`."""

    min_shape: tuple[int, ...]
    opt_shape: tuple[int, ...]
    max_shape: tuple[int, ...]
    dtype: torch.dtype


class Library:
    """A Torch-TensorRT whose engines are the names of their outputs, with the CPU as its GPU."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: dict[str, tuple[Any, dict[str, Any]]] = {}
        self.error: Exception | None = None
        root, dynamo = ModuleType("torch_tensorrt"), ModuleType("torch_tensorrt.dynamo")
        vars(root)["Input"] = Range
        vars(dynamo)["convert_exported_program_to_serialized_trt_engine"] = self.compile
        monkeypatch.setitem(sys.modules, "torch_tensorrt", root)
        monkeypatch.setitem(sys.modules, "torch_tensorrt.dynamo", dynamo)
        monkeypatch.setattr(torch_tensorrt, "DEVICE", "cpu")
        monkeypatch.setattr(tensorrt_engines, "gpu_capability", lambda: "sm90")
        library = TensorRt(SimpleNamespace(IBuilderConfig=None), "tensorrt", "11.1")
        monkeypatch.setattr(torch_tensorrt, "find_tensorrt", lambda: library)

    def compile(self, program: Any, **options: Any) -> bytes:
        if self.error is not None:
            raise self.error
        names = options["output_binding_names"]
        names = (names,) if isinstance(names, str) else names
        assert len(program.graph_signature.user_outputs) == len(names)
        name = ",".join(names)
        self.calls[name] = program, options
        return name.encode()


def test_programs_map_bytes_to_the_towers_float32_outputs(
    tiny_config: PeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    library = Library(monkeypatch)
    package = tmp_path / "package"
    manifest = export_package(plan(tiny_config), RandomWeights(tiny_config, 0), package)
    assert manifest.content.target.options["route"] == "torch-tensorrt"
    assert manifest.content.target.options["builder"] == "tensorrt 11.1"
    with open_package(package) as opened:
        assert opened.read("vision.here.engine") == b"embedding"
    assert set(library.calls) == {
        "embedding",
        "block_0",
        "block_1",
        "attention_maps",
        "text_embedding",
    }
    with prt.load(package, backend="onnxruntime") as cpu:
        wanted = cpu.embed_images(list(PICTURES))
        texts = cpu.embed_texts(TEXTS)
        dense = cpu.features(list(PICTURES), -1)
        maps = cpu.attention_maps(list(PICTURES))
    program, options = library.calls["embedding"]
    found = program.module()(torch.from_numpy(PICTURES))
    assert found.dtype == torch.float32
    np.testing.assert_allclose(F.normalize(found), wanted, atol=5e-3)
    assert options["arg_inputs"] == (
        Range(min_shape=(1, 32, 32, 3), opt_shape=(37, 32, 32, 3), max_shape=(37, 32, 32, 3),
              dtype=torch.uint8),
    )  # fmt: skip
    assert options["arg_input_binding_names"] == ("images",)
    assert options["output_binding_names"] == "embedding"
    program, options = library.calls["text_embedding"]
    ids = torch.from_numpy(ClipTokenizer(context_length=16)(TEXTS))
    np.testing.assert_allclose(F.normalize(program.module()(ids)), texts, atol=5e-3)
    assert options["arg_inputs"][0].max_shape == (64, 16)
    hidden = torch.from_numpy(PICTURES)
    for name in ("block_0", "block_1"):
        program, options = library.calls[name]
        assert options["output_binding_names"] == (name,)
        (hidden,) = program.module()(hidden)
    assert hidden.dtype == torch.float32
    attended = library.calls["attention_maps"][0].module()(hidden)
    np.testing.assert_allclose(attended[..., 1:].reshape(maps.shape), maps, atol=1e-3)
    np.testing.assert_allclose(hidden[:, 1:].reshape(dense.shape), dense, atol=2e-2)


def test_torch_tensorrt_s_message_is_quoted(
    tiny_config: PeConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    library = Library(monkeypatch)
    library.error = RuntimeError("no converter\nfor aten.what")
    with pytest.raises(ExportError, match=r"cannot build .vision.: no converter for aten\.what"):
        export_package(
            plan(tiny_config, taps=()), RandomWeights(tiny_config, 0), tmp_path / "package"
        )
    assert not (tmp_path / "package").exists()


def test_a_missing_library_or_gpu_is_named(
    tiny_config: PeConfig, capsys: pytest.CaptureFixture[str], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = str(tmp_path / "package")
    command = ["--model", "PE-Demo", "--backend", "tensorrt", "--out", out]
    for module in ("torch_tensorrt", "torch_tensorrt.dynamo"):
        monkeypatch.setitem(sys.modules, module, None)
    assert export_main([*command, "--route", "torch-tensorrt"]) == 2
    assert "pip install torch-tensorrt" in capsys.readouterr().err
    Library(monkeypatch)
    monkeypatch.setattr(tensorrt_engines, "gpu_capability", lambda: None)
    with pytest.raises(BackendError, match="no GPU to build for"):
        pe = PeExport(plan(tiny_config), RandomWeights(tiny_config, 0))
        torch_tensorrt.TorchTensorRt(pe.plan.engines, pe.torch_module)


def test_other_plans_are_refused(tiny_config: PeConfig) -> None:
    for changes, words in (
        ({"engines": ("sm89",)}, "--target here"),
        ({"precision": "fp8"}, "is for fp16"),
        ({"refittable": True}, "no other options"),
        ({"route": "jit"}, "unknown route 'jit'; known are onnx, torch-tensorrt"),
    ):
        with pytest.raises(InputError, match=words):
            plan(tiny_config, **changes)
    config = get_config("PLM-1B")
    assert isinstance(config, PlmConfig)
    with pytest.raises(InputError, match="is for encoders"):
        PlmPlan(
            name="plm", config=replace(config), backend="tensorrt", precision="fp16",
            tiles=TileSpec(tile_size=448), engines=(HERE,), route="torch-tensorrt",
        )  # fmt: skip
