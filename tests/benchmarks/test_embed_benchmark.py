"""The benchmark's arithmetic, its options, and one whole run on a tiny tower."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import PE_TINY

from benchmarks import embed, limits
from benchmarks.encoder.report import summarize
from benchmarks.encoder.runners import BASELINE, Row, rows_for
from benchmarks.encoder.worker import perform
from benchmarks.flops import vision_flops, vision_macs
from benchmarks.rounds import Measured, Task
from benchmarks.timing import least_cosine, measure
from perception_rt import archs
from perception_rt.errors import BackendError
from perception_rt.memory import peak_rss_bytes

# What timm counts for these models.
GMACS = {
    "PE-Core-T16-384": 4.74,
    "PE-Core-S16-384": 15.69,
    "PE-Core-B16-224": 17.82,
    "PE-Core-L14-336": 192.33,
    "PE-Core-G14-448": 2060.12,
    "PE-Lang-L14-448": 346.99,
    "PE-Spatial-B16-512": 107.13,
}

# A process where torch cannot be imported.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from benchmarks.encoder.worker import perform
print(json.dumps(perform(json.loads(sys.argv[1]))))
"""


@pytest.mark.parametrize("name", GMACS)
def test_macs_equal_published_counts(name: str) -> None:
    assert vision_macs(archs.get_config(name).vision) / 1e9 == pytest.approx(GMACS[name], rel=5e-3)


def test_measure_walks_over_all_inputs_and_leaves_warm_up_out() -> None:
    seen = []

    def run(batch: np.ndarray) -> np.ndarray:
        seen.append(batch[:, 0].tolist())
        return np.where(batch == 2, -batch, batch)  # one input of five comes out opposite

    inputs = np.arange(5.0)[:, None] + [[0.0, 0.0]]
    inputs[0] = 9.0
    samples = measure(run, inputs, inputs, batch=2, repeats=3)
    assert seen == [[9, 1], [2, 3], [4, 9], [1, 2], [3, 4]]
    assert len(samples.ms) == 3
    assert min(samples.ms) > 0
    assert samples.cosine == pytest.approx(-1)
    assert 1 << 20 < samples.peak_rss_bytes <= peak_rss_bytes()


def test_least_cosine_is_of_the_worst_row() -> None:
    a = np.array([[[1.0, 0.0], [1.0, 1.0]]], np.float32)
    b = np.array([[[2.0, 0.0], [0.0, 1.0]]], np.float32)
    assert least_cosine(a, b) == pytest.approx(np.sqrt(0.5))


def sample(ms: list[float], cosine: float, peak: int) -> dict:
    return {"2": {"ms": ms, "cosine": cosine, "peak_rss_bytes": peak}}


def test_summary_pools_rounds() -> None:
    fast = Row(name="fast", kind="plain", limit="int8")
    samples = {
        BASELINE.name: [sample([90.0, 100.0], 1.0, 10), sample([110.0], 1.0, 10)],
        "fast": [sample([10.0, 20.0], 0.9, 5), sample([30.0], 0.8, 7)],
    }
    best = {"fp32": 1e9, "int8": 1e3 * vision_flops(PE_TINY.vision)}
    first, second = summarize(PE_TINY.vision, [BASELINE, fast], samples, best)
    assert (first["p50_ms"], first["speed_up"]) == (100.0, 1.0)
    assert second["batch"] == 2
    assert (second["p50_ms"], second["p90_ms"]) == (20.0, pytest.approx(28.0))
    assert second["images_per_s"] == pytest.approx(100)
    assert second["speed_up"] == pytest.approx(5)
    assert (second["cosine"], second["peak_rss_bytes"]) == (0.8, 7)
    assert second["share"] == pytest.approx(0.1)
    assert second["ms"] == [[10.0, 20.0], [30.0]]


def test_summary_leaves_out_ratios_to_what_is_unavailable() -> None:
    slow, fast = (Row(name=name, kind="plain", limit="int8") for name in ("slow", "fast"))
    samples = {"fast": [sample([10.0], 0.9, 5)]}
    (record,) = summarize(PE_TINY.vision, [BASELINE, slow, fast], samples, {"fp32": 1e9})
    assert (record["row"], record["images_per_s"]) == ("fast", 200)
    assert not {"share", "speed_up"} & set(record)


@pytest.fixture
def torch_threads() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("torch_threads")
def test_whole_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_task = embed.run_task
    started: set[str] = set()

    def run(task: dict) -> object:
        # Processes cost seconds; one shows that they work, one that engines need no torch.
        kind = task["row"]["kind"] if task["do"] == "row" else ""
        if kind in started:
            return perform(task)
        started.add(kind)
        if kind == "pixels":
            return run_task(task)
        if kind == "images":
            command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(task)]
            return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return perform(task)

    def run_limit(task: dict) -> object:
        try:
            return limits.perform(task)
        except RuntimeError as error:  # no bf16 on this processor
            raise BackendError(str(error)) from None

    monkeypatch.setitem(archs.PE_MODELS, "PE-Tiny", PE_TINY)
    monkeypatch.setattr(embed, "run_task", run)
    monkeypatch.setattr(embed, "run_limit", run_limit)
    out = tmp_path / "result.json"
    arguments = "--model PE-Tiny --quick --rounds 2 --repeats 1 --precision int8 --threads 1"
    status = embed.main([*arguments.split(), "--batch=1", "--batch=3", f"--out={out}"])
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(out.read_text())
    (model,) = result["models"]
    rows = {(r["row"], r["batch"]): r for r in model["rows"]}
    assert list(rows) == [(r.name, b) for r in rows_for(PE_TINY.vision, ["int8"]) for b in (1, 3)]
    assert model["unavailable"] == {}
    for (name, _), record in rows.items():
        assert [len(ms) for ms in record["ms"]] == [1, 1]
        assert record["cosine"] > (0.999999 if "fp32" in name else 0.99), name
        if record["limit"] not in result["unavailable_limits"]:
            assert 0 < record["share"] < 2
        assert record["peak_rss_bytes"] > 10 << 20
    assert set(result["unavailable_limits"]) <= {"bf16"}
    assert set(result["limits"]) | set(result["unavailable_limits"]) == set(limits.LIMITS)
    assert all(rate > 0 for rate in result["limits"].values())
    assert all(len(rates) == 2 for rates in result["limit_samples"].values())
    assert result["settings"]["threads"] == 1
    assert printed.out.count("\n| ") == 1 + len(rows)
    assert "nan" not in printed.out


def canned(task: dict) -> object:
    """Results without any work, on a machine that has no bf16 and no exporter of torch's."""
    if task["do"] == "export plain":
        raise BackendError("No module named 'onnxscript'")
    if task["do"] == "row" and task["row"]["limit"] == "bf16":
        raise BackendError("mkldnn_linear: bf16 path needs the cpu support avx512bw | avx512vl")
    return {str(batch): sample([2.0], 1.0, 9)["2"] for batch in task.get("batches", ())}


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the variables limit x86 processors")
def test_what_the_machine_cannot_run_is_unavailable(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tried: list[str] = []

    def run(task: dict) -> object:
        tried.append(task["row"]["name"] if task["do"] == "row" else task["do"])
        return canned(task)

    measure = embed.run_limit
    monkeypatch.setenv("ATEN_CPU_CAPABILITY", "avx2")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    monkeypatch.setattr(
        embed, "run_limit", lambda task: measure(task) if task["limit"] == "bf16" else 1e9
    )
    monkeypatch.setattr(embed, "run_task", run)
    monkeypatch.setitem(archs.PE_MODELS, "PE-Tiny", PE_TINY)
    out = tmp_path / "result.json"
    arguments = f"--model PE-Tiny --quick --rounds 2 --precision int8 --batch 1 --out {out}"
    status = embed.main(arguments.split())
    printed = capsys.readouterr()
    assert status == 0, printed.err
    result = json.loads(out.read_text())
    (model,) = result["models"]
    assert [r["row"] for r in model["rows"]] == [
        "PyTorch fp32",
        "engine int8",
        "embed_images, int8",
    ]
    assert all(record["speed_up"] == 1 and record["share"] > 0 for record in model["rows"])
    lacks = "mkldnn_linear: bf16 path needs the cpu support avx512bw | avx512vl"
    assert model["unavailable"] == {
        "plain ONNX export, fp32": "No module named 'onnxscript'",
        "PyTorch bf16 autocast": lacks,
        "PyTorch bf16": lacks,
    }
    assert set(result["limits"]) == {"fp32", "int8", "read"}
    assert list(result["unavailable_limits"]) == ["bf16"]
    reason = result["unavailable_limits"]["bf16"]
    assert "bf16 path needs the cpu support" in reason
    lines = [line.rstrip() for line in printed.out.splitlines()]
    rates = "fp32 1, bf16 unavailable, int8 1 GFLOP/s; read 1.0 GB/s"
    assert f"measured limits (a quick trial: small operands): {rates}" in lines
    assert f"unavailable limit: bf16: {reason}" in lines
    dashes = " - |" * 7
    escaped = lacks.replace("|", "\\|")
    assert f"| PyTorch bf16 | unavailable: {escaped} |{dashes}" in lines
    assert (
        f"| plain ONNX export, fp32 | unavailable: No module named 'onnxscript' |{dashes}" in lines
    )
    # Neither is tried again in the second round, nor is a row whose export failed.
    assert tried.count("PyTorch bf16") == 1
    assert tried.count("plain ONNX export, fp32") == 0
    assert tried.count("engine int8") == 2


@pytest.mark.parametrize("failing", ["prepare", "engine int8", "embed_images, int8"])
def test_an_engine_that_fails_stops_the_benchmark(
    failing: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(task: dict) -> object:
        if failing == (task["row"]["name"] if task["do"] == "row" else task["do"]):
            raise BackendError("KeyError: 'pixels'")
        return canned(task)

    monkeypatch.setattr(embed, "run_limit", lambda task: 1e9)
    monkeypatch.setattr(embed, "run_task", run)
    monkeypatch.setitem(archs.PE_MODELS, "PE-Tiny", PE_TINY)
    assert embed.main(["--model", "PE-Tiny", "--quick", "--precision", "int8"]) == 1
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith(f"error: PE-Tiny: {failing} failed: KeyError: 'pixels'\n")


def test_stamp_names_no_host_and_no_user() -> None:
    stamp = embed.environment()
    assert {"cpu", "cores", "flags", "torch", "onnxruntime", "perception_rt"} <= set(stamp)
    assert str(Path.home()) not in json.dumps(stamp)
    with_name = subprocess.run(["uname", "-n"], capture_output=True, text=True, check=True)
    assert with_name.stdout.strip() not in stamp.values()


def test_failed_task_names_its_row(tmp_path: Path) -> None:
    values = {
        "do": "row",
        "row": {"name": "engine int8", "kind": "pixels", "limit": "int8", "precision": "int8"},
        "work": str(tmp_path),
        "config": PE_TINY.to_dict(),
    }
    measured = Measured(run=embed.run_task, label="PE-Tiny")
    with pytest.raises(BackendError, match=r"PE-Tiny: engine int8 failed: .*No such file"):
        measured.try_task(Task(name="engine int8", values=values, ours=True))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "--model"),
        ("--model PE-Core-X", "unknown model 'PE-Core-X'"),
        ("--model PE-Core-B16-224 --batch 0", "--batch must be 1 to 256, not 0"),
        ("--model PE-Core-B16-224 --batch two", "invalid int value: 'two'"),
        ("--model PE-Core-B16-224 --threads 0", "--threads must be 1 to 1024, not 0"),
        ("--model PE-Core-B16-224 --repeats 0", "--repeats must be 1 to 1000, not 0"),
        ("--model PE-Core-B16-224 --precision fp7", "unknown precision 'fp7'"),
        ("--model PE-Core-B16-224 --out missing/x.json", "--out must be a .json file"),
        ("--model PE-Core-B16-224 --out x.csv", "--out must be a .json file"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert embed.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
