"""Exports on a machine with a fake GPU: engines compared with eager, and refitted packages."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_gpu import CAPABILITY, FakeRefitter
from gpu_bench import PICTURE, Bench, install, plm_plan

import perception_rt as prt
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig
from perception_rt.errors import BackendError, ExportError
from perception_rt.export import build, gate, refit
from perception_rt.export.components.plm_decoder import GATE_STEPS
from perception_rt.export.plan import ExportPlan
from perception_rt.package.contract import CHUNK_TOKENS
from perception_rt.processing.image import ImageSpec
from perception_rt.runtime.backends import tensorrt


def test_engines_are_compared_with_eager_if_their_gpu_is_here(
    bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plm_plan("fp8")
    monkeypatch.setattr(build, "gpu_capability", lambda: CAPABILITY)
    trt = install(monkeypatch, bench, tmp_path / "package")
    manifest = build.export_package(plan, RandomWeights(plan.config, 0), tmp_path / "package")
    # The prompt is longer than an engine takes in one call.
    assert manifest.record["engine_latency"]["decoder_0"]["prompt_tokens"] > CHUNK_TOKENS
    found = manifest.record["engine_fidelity"]
    assert set(found) == set(manifest.record["fidelity"]) - {"pixels.image_features"}
    assert manifest.record["engine_latency"]["decoder_0"]["runs"] == GATE_STEPS
    assert bench.cuda.live == 0
    # One profile of six is wrong; the reference's two images do not use it.
    trt.broken_from = 17
    with pytest.raises(ExportError, match=r"not faithful to eager: cosine of vision"):
        build.export_package(plan, RandomWeights(plan.config, 0), tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_an_engine_that_picks_another_token_than_its_logits_is_refused() -> None:
    logits = np.array([[[0.5, 3.0, 2.0, 1.0], [4.0, 1.0, 2.0, 3.0]]], np.float32)
    # The largest logit may be the image token's, which is never picked.
    gate.check_picks(logits, np.array([[2.0, 3.0]], np.float32), np.array([[2, 3]]))
    gate.check_picks(logits, np.array([[3.0, 4.0]], np.float32), np.array([[1, 0]]))
    for top, ids in (([[1.0, 4.0]], [[3, 0]]), ([[3.0, 4.0]], [[2, 0]])):
        with pytest.raises(ExportError, match=r"likeliest tokens .* are not those of its logits"):
            gate.check_picks(logits, np.array(top, np.float32), np.array(ids))


@pytest.mark.parametrize("refittable", [True, False])
def test_new_weights_without_a_new_engine(
    bench: Bench,
    tiny_config: PeConfig,
    tuned: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    refittable: bool,
) -> None:
    trt = install(monkeypatch, bench, tmp_path / "new")
    plan = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16",
        image=ImageSpec(height=32, width=32), engines=(CAPABILITY,), refittable=refittable,
    )  # fmt: skip
    build.export_package(plan, RandomWeights(tiny_config, 0), tmp_path / "old")
    builds = trt.builds
    refit.refit_package(tmp_path / "old", tuned, tmp_path / "new")
    assert (trt.builds == builds) == refittable
    with prt.load(tmp_path / "new", backend="onnxruntime") as cpu:
        wanted = cpu.embed_images([PICTURE])
    with prt.load(tmp_path / "new", device="cuda") as gpu:
        np.testing.assert_allclose(gpu.embed_images([PICTURE]), wanted, atol=2e-3)
    monkeypatch.setattr(FakeRefitter, "refit_cuda_engine", lambda self: False)
    if refittable:
        with (
            prt.load(tmp_path / "new", device="cuda") as gpu,
            pytest.raises(BackendError, match="refuses the weights of graph 'vision'"),
        ):
            gpu.embed_images([PICTURE])
    assert bench.cuda.live == 0


def test_kept_engines_of_another_gpu_are_not_compared(
    bench: Bench, tiny_config: PeConfig, tuned: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    trt = install(monkeypatch, bench, tmp_path / "new")
    plan = ExportPlan(
        name="pe", config=tiny_config, backend="tensorrt", precision="fp16",
        image=ImageSpec(height=32, width=32), engines=(CAPABILITY,), refittable=True,
    )  # fmt: skip
    build.export_package(plan, RandomWeights(tiny_config, 0), tmp_path / "old")
    monkeypatch.setattr(build, "gpu_capability", lambda: CAPABILITY)
    library = replace(trt.library, version="9")
    monkeypatch.setattr(tensorrt, "find_tensorrt", lambda **_: library)
    lines: list[str] = []
    manifest = refit.refit_package(
        tmp_path / "old", tuned, tmp_path / "new", on_progress=lines.append
    )
    assert "engine_fidelity" not in manifest.record
    assert any("not compared: the engines were built by" in line for line in lines)
