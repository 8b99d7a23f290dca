"""The GPU check runs anywhere as a trial: what it cannot do is a row with the reason."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import PE_TINY, PLM_TINY

from benchmarks import gpu_check
from benchmarks.flops import decoder_bytes, decoder_weights
from benchmarks.gpu import engines, timing
from perception_rt import archs
from perception_rt.errors import ExportError
from perception_rt.export import ExportOptions
from perception_rt.package.reader import open_package


def test_a_trial_has_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch, "compile", lambda run, **_: run)
    file = tmp_path / "gpu.json"
    assert gpu_check.main(["--quick", "--out", str(file)]) == 0
    rows = json.loads(file.read_text())["rows"]
    towers = [row for row in rows if "images_per_s" in row]
    decoders = [row for row in rows if "tokens_per_s" in row]
    assert [row["how"] for row in towers] == ["eager", "torch.compile"]
    assert all(row["cosine"] > 0.999 for row in towers)
    assert len(decoders) == 2 and all(row["same_tokens"] for row in decoders)
    if not torch.cuda.is_available():
        failed = {row["how"]: row["failed"] for row in rows if "failed" in row}
        # Of both demos, but for the language model in fp32.
        assert len([row for row in rows if "failed" in row]) == 2 * len(failed) - 1 == 7
        assert "CUDAExecutionProvider is not in this ONNX Runtime" in failed["onnxruntime fp32"]
        for precision in ("fp16", "fp8"):
            assert "there is no NVIDIA driver" in failed[f"tensorrt {precision}"]
    table = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(table) == len(rows) + 2


def test_engines_are_measured_and_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the CPU, which a backend of ours has too."""
    monkeypatch.setitem(archs.PE_MODELS, "PE-Tiny", PE_TINY)
    monkeypatch.setitem(archs.PLM_MODELS, "PLM-Tiny", PLM_TINY)
    bench = timing.Bench(device=torch.device("cpu"), quick=True, deadline=0)
    encoder, answers = (
        row
        for model in ("PE-Tiny", "PLM-Tiny")
        for row in engines.engine_rows(
            bench,
            engines.Engine(model=model, backend="onnxruntime", precision="fp16"),
            tmp_path / model,
            {"flops": 1e12, "bytes_per_s": 1e10},
            device="cpu",
        )
    )
    assert encoder["cosine"] > 0.999 and encoder["images_per_s"] > 0
    assert answers["same_tokens"] == answers["of_tokens"] > 0 and answers["load_to_first_s"] > 0
    assert answers["tokens_per_s"] > 0
    assert 0 < encoder["share_of_peak"] < 1
    # The decoder's products and head in float16, and its norms.
    with open_package(tmp_path / "PLM-Tiny") as package:
        read = decoder_bytes(package.manifest.content)
    assert read == pytest.approx(2 * decoder_weights(PLM_TINY.decoder), rel=0.05)


def test_the_clock_is_read_after_each_row(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "nvidia_smi", lambda query: "1980 MHz")
    assert timing.sm_clock() == 1980
    monkeypatch.setattr(timing, "nvidia_smi", lambda query: "[N/A]")
    assert timing.sm_clock() is None
    monkeypatch.setattr(gpu_check, "limits", lambda bench: {"flops": 1, "bytes_per_s": 1})
    monkeypatch.setattr(
        gpu_check, "attempts", lambda *_: [({"model": "m"}, lambda: iter([{"model": "m"}]))]
    )
    bench = timing.Bench(device=torch.device("cpu"), quick=True, deadline=float("inf"))
    monkeypatch.setattr(timing, "nvidia_smi", lambda query: "1410 MHz")
    saved: list[Any] = []
    rows = gpu_check.run(bench, lambda result: saved.append(len(result["rows"])))["rows"]
    assert rows == [{"model": "m", "sm_mhz": 1410}] and saved == [1]


def test_an_export_that_fails_says_why_and_is_tried_unfused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried: list[ExportOptions] = []

    def export(options: ExportOptions, on_progress: object) -> None:
        tried.append(options)
        raise ExportError("no fused kernel")

    monkeypatch.setattr(engines, "export", export)
    monkeypatch.setattr(engines, "import_module", lambda name: SimpleNamespace(check_device=id))
    bench = timing.Bench(device=torch.device("cpu"), quick=True, deadline=0)
    for backend, times in (("tensorrt", 2), ("onnxruntime", 1)):
        tried.clear()
        engine = engines.Engine(model="PE-Demo", backend=backend, precision="fp16")
        with pytest.raises(ExportError, match=r"^no fused kernel$"):
            next(engines.engine_rows(bench, engine, tmp_path, {}))
        assert [options.allow_unfused for options in tried] == [False, True][:times]


def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_check.main([]) == 2
    assert "torch finds no GPU" in capsys.readouterr().err
