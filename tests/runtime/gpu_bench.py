"""Packages with engines, and a machine with a fake GPU and a fake TensorRT."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import CAPABILITY, FakeCuda, FakeTensorRt

from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig
from perception_rt.demo import language_model_path
from perception_rt.export import build
from perception_rt.export.backends import tensorrt_engines
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime.backends import tensorrt
from perception_rt.tensorrt_library import TensorRt

PICTURE = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)


class Bench:
    """Packages of an encoder and a language model, and the TensorRT and GPU they are for."""

    def __init__(self, folder: Path) -> None:
        self.plm, self.pe = folder / "plm", folder / "pe"
        self.trt = {name: FakeTensorRt(folder / name) for name in ("plm", "pe")}
        self.cuda = FakeCuda()


def plm_plan(precision: str) -> PlmPlan:
    """The plan of a language model with bytes as tokens: PLM-Demo with fewer layers."""
    demo = find_config(language_model_path())
    assert isinstance(demo, PlmConfig)
    config = replace(
        demo,
        decoder=replace(demo.decoder, n_layers=2, max_seqlen=320),
        vision=replace(demo.vision, layers=1),
        image_token_id=demo.image_token_id + 300,
    )
    tokens = TokenizerSpec(
        kind="bytes",
        vocab_size=config.decoder.vocab_size,
        image_token_id=config.image_token_id,
    )
    return PlmPlan(
        name="plm",
        config=config,
        backend="tensorrt",
        precision=precision,
        tiles=TileSpec(tile_size=config.vision.image_size),
        tokenizer=(tokens, None),
        engines=(CAPABILITY,),
    )


def make_bench(folder: Path, state: Path, tiny_config: PeConfig) -> Bench:
    """Exports both packages; `state` is the state directory that notes their exports."""
    bench = Bench(folder)
    plm = plm_plan("fp16")
    pe = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16",
        image=ImageSpec(height=32, width=32, resize="squash"), engines=(CAPABILITY,),
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_STATE_HOME", str(state))
        for plan, source, out in (
            (plm, RandomWeights(plm.config, 0), bench.plm),
            (pe, RandomWeights(tiny_config, 0), bench.pe),
        ):
            trt = bench.trt[out.name]
            patch.setattr(tensorrt_engines, "library_for", lambda *_, trt=trt, **__: trt.library)
            patch.setattr(tensorrt_engines, "build_engine", trt.build)
            build.export_package(plan, source, out)
    return bench


def use_bench(bench: Bench, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives the machine the GPU and the TensorRT that built the encoder's package."""
    monkeypatch.setenv("XDG_STATE_HOME", str(state))
    bench.cuda = FakeCuda()
    for trt in bench.trt.values():
        trt.cuda = bench.cuda
    monkeypatch.setattr(tensorrt, "open_cuda", lambda: bench.cuda)
    put(monkeypatch, bench, "pe")


def put(monkeypatch: pytest.MonkeyPatch, bench: Bench, name: str, **changes: str) -> None:
    """Installs the TensorRT that built a package, with other fields of `TensorRt`."""
    library: TensorRt = replace(bench.trt[name].library, **changes)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)


def install(monkeypatch: pytest.MonkeyPatch, bench: Bench, folder: Path) -> FakeTensorRt:
    """Installs a TensorRT that builds and runs the package to be published as `folder`."""
    trt = FakeTensorRt(folder)
    trt.cuda = bench.cuda
    for module in (tensorrt_engines, build):
        monkeypatch.setattr(module, "library_for", lambda *_, **__: trt.library)
    monkeypatch.setattr(tensorrt_engines, "build_engine", trt.build)
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: trt.library)
    return trt
