"""Conformance to timm, open_clip and transformers themselves; skipped where they are missing.

The test environment has no timm: run this file by name in one that has these libraries.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from golden_data import GOLDEN
from hf_folder import HF, copy_folder
from safetensors.torch import load_file, save_file

from perception_rt.evaluation.conformance.report import ConformanceReport
from perception_rt.evaluation.conformance.run import conform
from perception_rt.export import ExportOptions, export

pytest.importorskip("torchvision")
timm = pytest.importorskip("timm")
open_clip = pytest.importorskip("open_clip")
pytest.importorskip("transformers")

SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)
START, END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
# The format of the training, as a template of transformers.
TEMPLATE = (
    "<|begin_of_text|>"
    f"{START}system{END}\n\n{SYSTEM}{EOT}"
    "{% for message in messages %}"
    f"{START}user{END}\n\n"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|image|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    f"{EOT}"
    "{% endfor %}"
    # A template loses the line break at its end.
    f"{START}assistant{END}{{{{ '\\n\\n' }}}}"
)


def check(
    source: Path, library: str, out: Path, weights: Path | None = None, **options: Any
) -> ConformanceReport:
    """Exports a folder, and compares the package with the library on it, or on other weights."""
    export(ExportOptions(checkpoint=source, out=out, **options))
    return conform(out, library, weights or source)


def changed(folder: Path, out: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A copy of a folder whose weights differ."""
    shutil.copytree(folder, out)
    file = next(out.glob("*.safetensors"))
    weights = load_file(file)
    change(weights)
    save_file(weights, file, {"format": "pt"})
    return out


@pytest.mark.parametrize("name", ["timm_core", "timm_avg", "timm_spatial"])
def test_timm(name: str, tmp_path: Path) -> None:
    report = check(GOLDEN / name, "timm", tmp_path / "package")
    assert report.faithful, report.verdict


@pytest.mark.parametrize("block", [0, 1])
def test_a_changed_block_of_timm(block: int, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights[f"blocks.{block}.mlp.fc1.weight"][0] += 1

    folder = changed(GOLDEN / "timm_core", tmp_path / "changed", change)
    report = check(folder, "timm", tmp_path / "package", GOLDEN / "timm_core")
    assert not report.faithful
    assert report.comparison.location.startswith(f"block {block} (cosine ")


def test_another_mean_of_timm(tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(GOLDEN / "timm_core", folder)
    config = json.loads((folder / "config.json").read_text())
    config["pretrained_cfg"]["mean"] = [0.5, 0.5, 0.5]
    (folder / "config.json").write_text(json.dumps(config))
    report = check(folder, "timm", tmp_path / "package", GOLDEN / "timm_core")
    assert "differs from timm" in report.verdict and report.verdict.endswith("in preprocessing")
    assert conform(tmp_path / "package", "timm", GOLDEN / "timm_core", model_only=True).faithful


def test_weights_of_the_reference_without_pooling(tmp_path: Path) -> None:
    """The package returns all tokens, where timm pools; the weights are one file."""
    model = timm.create_model("vit_pe_spatial_tiny_patch16_512").eval()
    file = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), file)
    out = tmp_path / "package"
    export(ExportOptions(model="PE-Spatial-T16-512", weights=file, out=out))
    report = conform(out, "timm", file, model_only=True)
    assert report.faithful, report.verdict


def test_a_file_of_open_clip_has_the_released_preprocessing(tmp_path: Path) -> None:
    file, out = tmp_path / "weights.safetensors", tmp_path / "package"
    torch.manual_seed(0)
    model = open_clip.create_model("PE-Core-T-16-384", load_weights=False)
    save_file(model.state_dict(), file)
    export(ExportOptions(model="PE-Core-T16-384", weights=file, out=out))
    report = conform(out, "open_clip", file)
    assert report.faithful, report.verdict


@pytest.fixture(scope="module")
def open_clip_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest encoder with a short text tower, as open_clip saves it."""
    folder = tmp_path_factory.mktemp("open_clip")
    config = open_clip.get_model_config("PE-Core-T-16-384")
    config["text_cfg"] |= {"width": 64, "heads": 2, "layers": 2}
    preprocess = {
        "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "resize_mode": "squash"
    }  # fmt: skip
    content = {"model_cfg": config, "preprocess_cfg": preprocess}
    (folder / "open_clip_config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    arguments = {key: value for key, value in config.items() if key != "custom_text"}
    model = open_clip.CustomTextCLIP(**arguments)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_open_clip(precision: str, open_clip_folder: Path, tmp_path: Path) -> None:
    report = check(open_clip_folder, "open_clip", tmp_path / "package", precision=precision)
    assert report.faithful, report.verdict
    assert {check.part for check in report.comparison.checks} == {
        "preprocessing", "vision tower", "tokenizer", "text tower", "logit scale",
    }  # fmt: skip


def test_a_changed_text_tower_of_open_clip(open_clip_folder: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        weights["text.transformer.resblocks.1.mlp.c_proj.weight"] *= 10

    folder = changed(open_clip_folder, tmp_path / "changed", change)
    report = check(folder, "open_clip", tmp_path / "package", open_clip_folder)
    assert report.verdict.endswith("in text tower")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_transformers(precision: str, tmp_path: Path) -> None:
    folder = copy_folder(tmp_path / "folder")
    shutil.copyfile(HF / "tokenizer_config.json", folder / "tokenizer_config.json")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    report = check(folder, "transformers", tmp_path / "package", precision=precision)
    assert report.faithful, report.verdict
    names = [check.name for check in report.comparison.checks]
    assert {"token ids, text", "token ids, picture", "image features"} < set(names)
    assert ("greedy tokens, picture" in names) == (precision == "fp32")


@pytest.mark.parametrize(
    ("key", "location"),
    [
        ("language_model.layers.1.mlp.down_proj.weight", "values of decoder layer 2 (cosine "),
        ("language_model.layers.1.self_attn.v_proj.weight", "values of decoder layer 1 (cosine "),
        ("blocks.1.mlp.fc1.weight", "image features (cosine "),
    ],
)
def test_a_changed_weight_of_transformers(key: str, location: str, tmp_path: Path) -> None:
    def change(weights: dict[str, torch.Tensor]) -> None:
        (name,) = (name for name in weights if key in name)
        weights[name][:3] += weights[name].std()

    reference = copy_folder(tmp_path / "folder")
    shutil.copyfile(HF / "tokenizer_config.json", reference / "tokenizer_config.json")
    folder = changed(reference, tmp_path / "changed", change)
    report = check(folder, "transformers", tmp_path / "package", reference)
    assert not report.faithful
    assert report.comparison.location.startswith(location), report.comparison.location
