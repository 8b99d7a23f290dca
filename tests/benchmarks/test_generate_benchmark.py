"""The generation benchmark's arithmetic, its options, and one whole run on a tiny model."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_models import PLM_TINY

from benchmarks import generate
from benchmarks.flops import decoder_bytes, decoder_weights, prefill_macs, vision_flops
from benchmarks.generation.prepare import QUESTION, prepare, small_tokenizer
from benchmarks.generation.report import (
    again_record,
    decoder_records,
    lookup_records,
    photo_record,
    ratio_records,
    together_records,
)
from benchmarks.generation.runners import BASELINE, PEERS, engine_row
from benchmarks.generation.worker import measure_decoder, perform
from perception_rt import archs
from perception_rt.archs import PLM_MODELS
from perception_rt.errors import BackendError
from perception_rt.package.reader import open_package
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.llm_tokenizer import open_tokenizer
from perception_rt.processing.prompt import Turn, encode_prompt

SHORT = ("--no-peers", "--quick", "--prompt=8")

# What the released Llamas have, norms left out: two per layer and the last.
WEIGHTS = {
    "PLM-1B": 1_235_814_400 - 33 * 2048,
    "PLM-3B": 3_212_749_824 - 57 * 3072,
    "PLM-8B": 8_030_261_248 - 65 * 4096 - 128256 * 4096,  # an embedding of its own
}

# A process where torch cannot be imported.
WITHOUT_TORCH = """
import json, sys
sys.modules["torch"] = None
from benchmarks.generation.worker import perform
print(json.dumps(perform(json.loads(sys.argv[1]))))
"""


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_equal_published_counts(name: str) -> None:
    assert decoder_weights(PLM_MODELS[name].decoder) == WEIGHTS[name]


def test_a_prompt_attends_to_what_was_before() -> None:
    one, three = (prefill_macs(PLM_TINY.decoder, tokens) for tokens in (1, 3))
    assert (
        one == decoder_weights(PLM_TINY.decoder) + 2 * 2 * 64
    )  # two layers, each token sees itself
    layers = decoder_weights(PLM_TINY.decoder) - 64 * 2048
    assert three == 3 * layers + 64 * 2048 + 2 * 2 * 64 * (1 + 2 + 3)


class Counted:
    """A decoder that notes what it is asked."""

    read_bytes = 0

    def __init__(self) -> None:
        self.calls: list[int] = []

    def prefill(self, ids: np.ndarray, steps: int) -> None:
        self.calls.append(len(ids))

    def step(self) -> None:
        self.calls.append(0)


def test_the_first_prompt_and_its_steps_are_not_timed() -> None:
    runner = Counted()
    result = measure_decoder(runner, np.arange(7), [4, 7], 2)
    assert runner.calls == [4, 0, 0, *[4] * 3, 0, 0, *[7] * 3, 0, 0]
    assert {k: (len(v["prefill_ms"]), len(v["token_ms"])) for k, v in result.items()} == {
        "4": (3, 2),
        "7": (3, 2),
    }


def test_photo_figures() -> None:
    def sample(ttft: float, vision: float, tokens: list[float]) -> dict:
        warm = {"ttft_ms": ttft, "preprocess_ms": 5.0, "vision_ms": vision, "prefill_ms": 30.0}
        warm |= {"token_ms": tokens, "image_tiles": 2, "prompt_tokens": 9}
        first = {"ttft_ms": 10 * ttft}
        records = {"first": first, "warm": warm}
        return {"records": records, "load_ms": 7.0, "peak_rss_bytes": int(ttft)}

    samples = [sample(100.0, 40.0, [10.0, 20.0]), sample(200.0, 60.0, [30.0])]
    record = photo_record(PLM_TINY, 4 * 2 * vision_flops(PLM_TINY.vision) * 1e3 / 50, samples)
    assert (record["ttft_ms"], record["first_ttft_ms"], record["vision_ms"]) == (150, 1500, 50)
    assert record["vision_share"] == pytest.approx(0.25)
    assert (record["token_p50_ms"], record["tokens"], record["peak_rss_bytes"]) == (20, 3, 200)
    assert record["token_p90_ms"] == pytest.approx(28)
    assert record["tokens_per_s"] == pytest.approx(50)


def test_second_question_figures() -> None:
    def sample(first: float, second: float) -> dict:
        asked = {"image_tiles": 1, "prompt_tokens": 9, "cached_tokens": 4}
        records = {"first": {"ttft_ms": first}, "second": {"ttft_ms": second, **asked}}
        return {"records": records, "peak_rss_bytes": 3}

    record = again_record([sample(100, 10), sample(300, 40)])
    assert (record["first_ttft_ms"], record["second_ttft_ms"]) == (200, 25)
    assert record["ratio"] == pytest.approx(0.125)


def test_lookup_figures() -> None:
    def run(ms: list[float], steps: int, identical: bool) -> dict:
        return {"token_ms": ms, "steps": steps, "identical": identical}

    plain = run([10.0] * 4, 4, True)
    records = {"plain": plain, "prompt": run([12.0] * 4, 4, True)}
    bad = {"records": {**records, "answer": run([20.0, 0.0, 0.0, 0.0], 1, False)}}
    good = {"records": {**records, "answer": run([20.0, 0.0, 0.0, 0.0], 1, True)}}
    prompt, answer = lookup_records([good, bad])
    assert prompt["speed_up"] == pytest.approx(40 / 48)
    assert (prompt["accepted"], prompt["identical"]) == (0, True)
    assert (answer["accepted"], answer["steps"], answer["identical"]) == (3, 1, False)
    assert (answer["speed_up"], answer["ms_per_token"], answer["plain_ms_per_token"]) == (2, 5, 10)


def test_batch_figures() -> None:
    def sample(scale: float) -> dict:
        runs = {"1": {"tokens": 10, "ms": 1000.0}, "4": {"tokens": 40, "ms": 2000.0 * scale}}
        return {"records": runs}

    one, four = together_records([sample(1), sample(3)])
    assert (one["tokens_per_s"], one["ms_per_step"], one["gain"]) == (10, 100, 1)
    assert (four["requests"], four["tokens_per_s"], four["gain"]) == (4, 10, 1)
    assert four["ms_per_step"] == 400


def test_decoder_figures_and_ratios() -> None:
    operations = 2 * prefill_macs(PLM_TINY.decoder, 8)
    limits = {"int8": operations * 100.0, "bf16": 1e9, "read": 1e6}

    def sample(prefill: list[float], tokens: list[float], peak: int) -> dict:
        lengths = {"8": {"prefill_ms": prefill, "token_ms": tokens}}
        return {"lengths": lengths, "read_bytes": 500, "peak_rss_bytes": peak}

    ours = [sample([10.0, 30.0], [1.0, 2.0], 5), sample([20.0], [3.0], 7)]
    theirs = [sample([10.0], [5.0], 1)]
    row = engine_row("int4")
    (engine,) = decoder_records(PLM_TINY, row, limits, ours)
    assert (engine["prefill_ms"], engine["prefill_tokens_per_s"]) == (20, 400)
    assert engine["prefill_share"] == pytest.approx(0.5)
    assert (engine["token_p50_ms"], engine["read_share"]) == (2, pytest.approx(0.25))
    assert engine["peak_rss_bytes"] == 7
    records = [engine, *decoder_records(PLM_TINY, BASELINE, limits, theirs)]
    (ratio,) = ratio_records(records, row.name)
    assert (ratio["peer"], ratio["prompt_tokens"]) == (BASELINE.name, 8)
    assert ratio["token_ratio"] == pytest.approx(0.4)
    assert ratio["prefill_ratio"] == pytest.approx(0.5)


@pytest.mark.parametrize("config", [PLM_TINY, PLM_MODELS["PLM-1B"]])
def test_prompts_are_about_as_long_as_with_the_real_tokenizer(config: PlmConfig) -> None:
    spec, data = small_tokenizer(config)
    tokenizer = open_tokenizer(spec, data)
    prompt = encode_prompt(tokenizer, [Turn("user", (QUESTION,))], 4)
    assert 60 <= len(prompt.ids) <= 90  # one token for each word and each mark of the format
    assert prompt.ids.max() < config.decoder.vocab_size


def limit(task: dict) -> float:
    return 1e9


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("work")
    prepare(PLM_TINY, work, name="PLM-Tiny", precision="int4", blocks="int4")
    return work / "package"


def test_whole_run(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    made = []
    run_task = generate.run_task

    def run(task: dict) -> object:
        if task["do"] == "prepare":
            made.append(task)
            return shutil.copytree(exported, Path(task["work"]) / "package")
        # Processes cost seconds; one shows that they work, one that engines need no torch.
        if task["do"] == "again" and task["max_tiles"] == 0:
            return run_task(task)
        if task["do"] == "decoder":
            command = [sys.executable, "-c", WITHOUT_TORCH, json.dumps(task)]
            return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
        return perform(task)

    monkeypatch.setitem(archs.PLM_MODELS, "PLM-Tiny", PLM_TINY)
    monkeypatch.setattr(generate, "run_task", run)
    monkeypatch.setattr(generate, "run_limit", limit)
    out = tmp_path / "result.json"
    arguments = "--model PLM-Tiny --quick --no-peers --threads 1 --batch 1 --batch 3"
    arguments += " --prompt 20 --prompt 150 --layers 1"
    assert generate.main([*arguments.split(), f"--out={out}"]) == 0
    printed = capsys.readouterr()
    result = json.loads(out.read_text())
    assert (made[0]["model"], made[0]["config"]["n_layers"]) == ("PLM-Tiny cut to 1 layers", 1)
    assert (made[0]["precision"], made[0]["blocks"]) == ("int4", "int8")
    assert result["model"]["precision"] == "int4 (int4 blocks)"
    assert "\n## PLM-Tiny, int4 (int4 blocks); weights: random\n" in printed.out
    assert [r["image_tiles"] for r in result["photo"]] == [1, 5]
    for record in result["photo"]:
        parts = sum(record[f"{part}_ms"] for part in ("preprocess", "vision", "prefill"))
        assert 0 < parts <= record["ttft_ms"]
        assert record["tokens"] == 16
    for record in result["again"]:
        assert 0 < record["cached_tokens"] < record["prompt_tokens"]
    prompt, answer = result["lookup"]
    assert prompt["identical"]
    assert answer["identical"]
    assert (answer["steps"], answer["accepted"]) == (2, 14)  # 8 guesses and a token, 6 and one
    assert [r["requests"] for r in result["together"]] == [1, 3]
    assert [r["prompt_tokens"] for r in result["decoder"]] == [20, 150]
    assert result["decoder"][0]["read_bytes"] > 64 * 2048 / 2
    assert (result["ratios"], result["peers"]) == ([], [])
    assert (result["unavailable"], result["unavailable_limits"]) == ({}, {})
    assert printed.out.count("\n| ") == 6 + 13 + 2 + 2 + 2 + 2 + 2
    assert "nan" not in printed.out
    assert str(Path.home()) not in out.read_text()


def canned(task: dict) -> object:
    """Results without any work; one of the peers has broken down."""
    if task["do"] == "build genai":
        raise BackendError("No module named 'onnxruntime_genai'")
    assert task["do"] == "decoder"
    if task["row"]["dtype"] == "float32":
        raise BackendError("ended by signal 9: out of memory?")
    times = {"prefill_ms": [2.0], "token_ms": [1.0, 1.0]}
    lengths = {str(length): times for length in task["prompts"]}
    return {"lengths": lengths, "read_bytes": 9, "peak_rss_bytes": 9}


@contextmanager
def without_tokenizer(path: Path) -> Iterator[SimpleNamespace]:
    with open_package(path) as package:
        manifest = package.manifest
    yield SimpleNamespace(manifest=replace(manifest, content=replace(manifest.content, text=None)))


def no_bf16(task: dict) -> float:
    if task["limit"] == "bf16":
        raise BackendError("bf16 path needs the cpu support")
    return 1e9


def test_what_cannot_be_measured_is_unavailable_with_its_reason(
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(generate, "open_package", without_tokenizer)
    monkeypatch.setattr(generate, "run_task", canned)
    monkeypatch.setattr(generate, "run_limit", no_bf16)
    out = tmp_path / "result.json"
    arguments = f"--package {exported} --prompt 8 --rounds 2 --out {out}"
    assert generate.main(arguments.split()) == 0
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "Unavailable: requests: the package has no tokenizer" in lines
    for name, reason in (
        ("onnxruntime-genai int4", "No module named 'onnxruntime_genai'"),
        ("transformers fp32", "ended by signal 9: out of memory?"),
    ):
        for columns in (5, 8):
            assert f"| {name} | unavailable: {reason} |{' - |' * (columns - 2)}" in lines
    assert "unavailable limit: bf16: bf16 path needs the cpu support  " in lines
    assert "bf16 unavailable, int8 1 GFLOP/s" in printed.out
    result = json.loads(out.read_text())
    assert {name: len(samples) for name, samples in result["samples"].items()} == {
        "engine": 2,
        BASELINE.name: 2,
    }
    assert set(result["unavailable"]) == {
        "requests",
        "onnxruntime-genai int4",
        "transformers fp32",
    }
    assert result["unavailable_limits"] == {"bf16": "bf16 path needs the cpu support"}
    assert set(result["limits"]) == {"fp32", "int8", "read"}
    engine, peer = result["decoder"]
    assert {"prefill_share", "read_share"} <= set(engine)
    assert "prefill_share" not in peer and "read_share" in peer
    assert "1.00 (wanted: <= 0.40) | 1.00 (wanted: >= 0.60) |" in printed.out
    assert printed.err.count("transformers fp32") == 1  # and not in the second round


def test_without_the_photograph_other_requests_are_measured(
    exported: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def no_photo(name: str) -> Path:
        raise BackendError("pip install scikit-learn")

    def run(task: dict) -> object:
        if task["do"] == "lookup":
            answer = {"token_ms": [1.0], "steps": 1, "identical": True}
            return {"records": dict.fromkeys(("plain", "prompt", "answer"), answer)}
        if task["do"] == "together":
            return {"records": {"1": {"tokens": 1, "ms": 1.0}}}
        return canned(task)

    monkeypatch.setattr(generate, "sample_photo", no_photo)
    monkeypatch.setattr(generate, "run_task", run)
    monkeypatch.setattr(generate, "run_limit", limit)
    assert generate.main(["--package", str(exported), *SHORT]) == 0
    printed = capsys.readouterr().out
    assert "Unavailable: photo: pip install scikit-learn\n" in printed
    assert "### A photograph" not in printed
    assert "### Prompt lookup" in printed and "### Concurrent requests" in printed


@pytest.mark.parametrize("failing", ["lookup", "decoder"])
def test_an_engine_that_fails_stops_the_benchmark(
    failing: str,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run(task: dict) -> object:
        if task["do"] == failing:
            raise BackendError("TypeError: no")
        return {}

    monkeypatch.setattr(generate, "run_task", run)
    monkeypatch.setattr(generate, "run_limit", limit)
    assert generate.main(["--package", str(exported), *SHORT]) == 1
    name = "engine" if failing == "decoder" else failing
    assert capsys.readouterr().err.endswith(f"error: {name} failed: TypeError: no\n")


@pytest.mark.parametrize("library", ["tokenizers", None])
def test_a_package_whose_tokenizer_cannot_be_read_has_no_requests(
    library: str | None,
    exported: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if library is not None:
        monkeypatch.setitem(sys.modules, library, None)
    with open_package(exported) as package:
        reason = generate.why_no_requests(package)
    assert (reason is not None and "tokenizers" in reason) == (library is not None)


def test_a_token_reads_the_decoders_weights_and_no_others(exported: Path) -> None:
    with open_package(exported) as package:
        content = package.manifest.content
    assert decoder_bytes(content) == content.files["decoder_0.data"].size_bytes
    assert {"embed.data", "vision.data"} < set(content.files)


def test_a_failed_engine_task_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    task = {
        "do": "decoder",
        "row": asdict(PEERS[0]),
        "config": replace(PLM_TINY, image_token_id=5).to_dict() | {"dim": "x"},
    }
    with pytest.raises(BackendError, match="dim must be int"):
        generate.run_task(task)
    assert generate.main(["--package", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--model PLM-2B", "unknown model 'PLM-2B'"),
        ("--model PE-Core-B16-224", "is no language model"),
        ("--layers 17", "--layers must be 1 to 16, not 17"),
        ("--precision fp7", "unknown precision 'fp7'"),
        ("--precision int8 --blocks int4", "--blocks is for --precision int4"),
        ("--package x --layers 2", "leave out --layers"),
        ("--batch 0", "--batch must be 1 to 256, not 0"),
        ("--batch 8 --tokens 9", "--tokens must be 10 to 10000, not 9"),
        ("--max-tiles -1", "--max-tiles must be 0 to 1024, not -1"),
        ("--prompt 11500", "--prompt and --steps are 11524 tokens; the model has 11520"),
        ("--steps two", "invalid int value: 'two'"),
        ("--out x.csv", "--out must be a .json file"),
    ],
)
def test_wrong_options_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert generate.main(arguments.split()) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert message in printed.err
    assert printed.err.count("\n") == 1
