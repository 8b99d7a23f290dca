"""An unmodified PerceptionLM folder of transformers becomes a package with its results."""

import json
from pathlib import Path

import numpy as np
import pytest
from hf_folder import HF, copy_folder, make_old, put

import perception_rt as prt
from perception_rt.checkpoint.locate import find_config, find_tiles
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.cli import export_main, main
from perception_rt.export import ExportOptions, export
from perception_rt.export.architecture import find_architecture
from perception_rt.export.build import export_package
from perception_rt.export.plan import PlmPlan
from perception_rt.package.reader import read_manifest
from perception_rt.plm_config import PlmConfig

TEXTS = ("t0", "t3", "t9", "multi")
IMAGE = "img_tall.png"
ARABIC = "\u0627\u0644\u0639\u0631\u0628\u064a\u0629"
UNUSUAL = f"\U0001f600 \u6f22\u5b57 {ARABIC} e\u0301 \u200b zero"


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hf") / "package"
    assert export_main(["--checkpoint", str(HF), "--out", str(out)]) == 0
    return out


@pytest.fixture(scope="module")
def expected() -> dict[str, np.ndarray]:
    with np.load(HF / "expected.npz") as stored:
        return dict(stored)


@pytest.mark.parametrize("case", [*TEXTS, IMAGE])
def test_logits_and_tokens_are_those_of_transformers(
    package: Path, expected: dict[str, np.ndarray], case: str
) -> None:
    ids, pixels = expected[f"{case}/ids"].ravel(), expected.get(f"{case}/pixels")
    if pixels is not None:
        pixels = pixels.reshape(-1, *pixels.shape[-3:])
    wanted, greedy = expected[f"{case}/logits"].ravel(), expected[f"{case}/greedy"].ravel()
    with prt.load(package) as plm:
        assert isinstance(plm, prt.Generator)
        logits = plm.prefill_logits(ids, pixels)
        assert np.abs(logits.ravel() - wanted).max() < 1e-3
        tokens = plm.generate_tokens(ids, pixels, max_new_tokens=len(greedy))
    assert tokens == greedy.tolist()


@pytest.mark.parametrize(
    ("case", "question", "history"),
    [
        ("t0", "Hello", []),
        ("t3", UNUSUAL, []),
        ("t9", "tab\there   spaces\n\n\nmany", []),
        ("multi", "And now?", [prt.Exchange(prompt="Hi", answer="Hello there!")]),
    ],
)
def test_questions_are_those_of_the_processor(
    package: Path,
    expected: dict[str, np.ndarray],
    case: str,
    question: str,
    history: list[prt.Exchange],
) -> None:
    """The chat template of transformers gives the same prompt."""
    greedy = expected[f"{case}/greedy"].ravel().tolist()
    with prt.load(package) as plm:
        assert isinstance(plm, prt.Generator)
        result = plm.generate(question, history=history, max_new_tokens=len(greedy))
    assert list(result.tokens) == greedy
    assert result.timings.prompt_tokens == expected[f"{case}/ids"].size


def test_the_manifest_has_the_processor_and_the_tokenizer(package: Path) -> None:
    content = read_manifest(package).content
    assert content.name == "hf_plm" and content.weights["layout"] == "hf"
    assert content.image["tile_size"] == 56 and content.image["max_tiles"] == 36
    assert content.text is not None and content.text["kind"] == "hf"
    assert "end_ids" not in content.text  # those of the tokenizer itself


def test_another_end_token_and_a_chat_template(tmp_path: Path) -> None:
    """The tokenizer's own end tokens are then ordinary ones."""
    folder = make_old(copy_folder(tmp_path / "model"))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    put(folder, "generation_config.json", "eos_token_id", 1009)
    lines: list[str] = []
    manifest = export(ExportOptions(checkpoint=folder, out=tmp_path / "p"), lines.append)
    assert manifest.content.text is not None and manifest.content.text["end_ids"] == [1009]
    assert any(line.startswith("the chat template of chat_template.jinja") for line in lines)
    with prt.load(tmp_path / "p") as plm:
        assert isinstance(plm, prt.Generator)
        assert plm.generate("Hello", max_new_tokens=2).tokens


def test_a_configuration_may_be_named(tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "model")
    weights = (folder / "model.safetensors").rename(tmp_path / "weights.safetensors")
    options = ExportOptions(checkpoint=weights, config=folder / "config.json", out=tmp_path / "p")
    assert find_architecture(options) == find_config(folder)


def test_heads_that_are_wider_than_their_share(tmp_path: Path) -> None:
    """The gate of the export compares the engines with eager."""
    folder = copy_folder(tmp_path / "model", weights=False)
    put(folder, "config.json", "text_config.head_dim", 32)
    config = find_config(folder)
    assert isinstance(config, PlmConfig) and config.decoder.head_dim == 32
    plan = PlmPlan(
        name="wide",
        config=config,
        backend="onnxruntime",
        precision="fp32",
        tiles=find_tiles(folder, config.vision.image_size),
    )
    manifest = export_package(plan, RandomWeights(config, 0), tmp_path / "p")
    assert PlmConfig.from_dict(manifest.content.architecture) == config
    with prt.load(tmp_path / "p") as plm:
        assert isinstance(plm, prt.Generator)
        assert len(plm.generate_tokens([1, 2, 3], max_new_tokens=4)) == 4


def test_contradictions_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = copy_folder(tmp_path / "model"), tmp_path / "out"
    mine = tmp_path / "mine.json"
    config = find_config(folder)
    assert config is not None
    mine.write_text(json.dumps(config.to_dict() | {"n_heads": 4, "n_kv_heads": 1}))
    for arguments in (
        ["--checkpoint", str(folder), "--config", str(mine)],
        ["--model", "PLM-Demo", "--weights", str(folder)],
    ):
        assert export_main([*arguments, "--out", str(out)]) == 2
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1 and "config.json (text_config.num_attention_heads)" in lines[0]
        assert not out.exists()


def test_a_refit_reads_the_configuration_too(
    package: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, out = copy_folder(tmp_path / "model"), str(tmp_path / "refitted")
    put(folder, "config.json", "text_config.rope_parameters.rope_theta", 1e4)
    refit = ["refit", str(package), "--weights", str(folder), "--out", out]
    assert main(refit) == 2
    message = "rope_theta is 500000.0 in package 'hf_plm' and 10000.0 in config.json"
    assert message in capsys.readouterr().err
    put(folder, "config.json", "text_config.rope_parameters.rope_theta", 5e5)
    assert main(refit) == 0
