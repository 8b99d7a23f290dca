"""The commands: their output and files, and one clear line for each bad input."""

import json
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
from golden_data import golden
from one_line import fails
from PIL import Image
from safetensors.torch import save_file

from perception_rt.cli import export_main, main
from perception_rt.evaluation.tasks import TaskOptions, flag


@pytest.fixture
def checkpoint(tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in the reference's names, and its configuration."""
    data = golden("pe_core_cls")
    file, config = tmp_path / "weights.safetensors", tmp_path / "config.json"
    save_file({k.removeprefix("visual."): v for k, v in data.weights.items()}, file)
    config.write_text(json.dumps(data.config_dict()))
    return file, config


@pytest.fixture(scope="module")
def photo(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("photo") / "photo.jpg"
    rng = np.random.default_rng(0)
    small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    small.resize((200, 150)).save(path)
    return str(path)


def _json(capsys: pytest.CaptureFixture[str]) -> dict:
    return json.loads(capsys.readouterr().out)


def test_export_inspect_verify(checkpoint, tmp_path: Path, capsys) -> None:
    file, config = checkpoint
    out = str(tmp_path / "package")
    arguments = ["--checkpoint", str(file), "--config", str(config), "--out", out]
    assert export_main([*arguments, "--image-size", "70x84", "--json"]) == 0
    exported = _json(capsys)
    assert main(["verify", out, "--json", "--expect", exported["id"]]) == 0
    assert _json(capsys)["ok"] is True
    assert main(["inspect", out, "--json"]) == 0
    manifest = _json(capsys)
    assert manifest["id"] == exported["id"]
    assert manifest["content"]["processing"]["image"]["height"] == 70
    assert manifest["content"]["weights"]["layout"] == "reference"
    assert main(["inspect", out]) == 0
    assert "fidelity    vision.embedding: cosine" in capsys.readouterr().out
    assert main(["doctor", out]) == 0
    printed = capsys.readouterr().out
    assert "onnxruntime: cpu" in printed or "'onnxruntime': 'cpu" in printed
    assert "intact" in printed


def test_pt_checkpoint_gives_the_same_engine(checkpoint, tmp_path: Path, capsys) -> None:
    _, config = checkpoint
    weights = golden("pe_core_cls").weights
    nested = {"state_dict": {f"module.{k}": v for k, v in weights.items()}}
    torch.save(nested, tmp_path / "weights.pt")
    out = str(tmp_path / "package")
    arguments = ["--checkpoint", str(tmp_path / "weights.pt"), "--config", str(config)]
    assert export_main([*arguments, "--out", out]) == 0


def test_embed_classify_features(tiny_package: Path, photo: str, tmp_path: Path, capsys) -> None:
    package = str(tiny_package)
    npy = tmp_path / "rows.npy"
    embed = ["embed", package, "--image", photo, "--text", "a cat", "--out", str(npy)]
    assert main(embed) == 0
    assert "  a cat" in (table := capsys.readouterr().out) and table.count("1.000") == 2
    assert np.load(npy).shape == (2, 32)
    assert main(["embed", package, "--text", "a cat", "--json"]) == 0
    result = _json(capsys)
    assert result["dim"] == 32 and len(result["embeddings"][0]) == 32
    classify = ["classify", package, "--image", photo, "--label", "cat", "dog"]
    assert main([*classify, "--template", "a {}", "--json"]) == 0
    (result,) = _json(capsys)
    assert result["image"] == photo
    assert sum(result["probabilities"].values()) == pytest.approx(1, abs=1e-5)
    assert main(classify) == 0
    assert "%" in capsys.readouterr().out
    picture = tmp_path / "features.png"
    assert main(["features", package, "--image", photo, "--out", str(picture)]) == 0
    with Image.open(picture) as image:
        assert image.size == (2 * 597 + 8, 448)
        right = np.asarray(image)[:, 605:]
    assert len(np.unique(right.reshape(-1, 3), axis=0)) > 8


def test_bad_exports_leave_nothing(checkpoint, tmp_path: Path, capsys) -> None:
    file, config = checkpoint
    here = tmp_path / "out"
    here.mkdir()
    out = str(here / "p")
    good = ["--checkpoint", str(file), "--config", str(config)]
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(file.read_bytes()[:-1000])
    broken_pt = tmp_path / "broken.pt"
    broken_pt.write_bytes(b"PK\x03\x04" + bytes(100))
    other = tmp_path / "other.json"
    other.write_text(json.dumps(golden("pe_core_nocls_mlp").config_dict()))
    typo = tmp_path / "typo.json"
    typo.write_text(json.dumps({**golden("pe_core_cls").config_dict(), "widht": 3}))
    not_json = tmp_path / "not.json"
    not_json.write_text("{")
    nan = tmp_path / "nan.json"
    nan.write_text(json.dumps(golden("pe_core_cls").config_dict() | {"mlp_ratio": float("nan")}))
    a_file = tmp_path / "file"
    a_file.write_text("")
    folder = here / "folder"
    folder.mkdir()
    (folder / "keep.txt").write_text("mine")
    for arguments, message in (
        (["--model", "PE-Core-X", "--out", out], "unknown model 'PE-Core-X'"),
        (["--checkpoint", "absent.pt", "--config", str(config), "--out", out], "absent.pt"),
        (["--checkpoint", str(file), "--out", out], "--config"),
        ([*good, "--weights", "random", "--out", out], "--weights is for --model; --checkpoint"),
        (
            ["--model", "PE-Core-B16-224", "--config", "x.json", "--out", out],
            "--config is for --checkpoint",
        ),
        ([*good[:3], "absent.json", "--out", out], "absent.json"),
        (["--checkpoint", str(truncated), *good[2:], "--out", out], "truncated.safetensors"),
        (["--checkpoint", str(broken_pt), *good[2:], "--out", out], "broken.pt"),
        ([*good[:3], str(other), "--out", out], "class_embedding"),
        ([*good[:3], str(typo), "--out", out], "widht"),
        ([*good[:3], str(not_json), "--out", out], "is not JSON"),
        ([*good, "--out", str(a_file / "p")], "cannot make the folder"),
        ([*good, "--precision", "int4", "--out", str(here / "a" / "b")], "int4"),
        (
            ["--checkpoint", "x" * 300, *good[2:], "--out", str(here / "a" / "b")],
            "1 to 128 characters",
        ),
        ([*good, "--out", str(a_file)], "file"),
        ([*good, "--out", str(folder)], "folder"),
        ([*good, "--out", str(folder), "--force"], "folder"),
        ([*good[:3], str(nan), "--out", out], "mlp_ratio"),
        ([*good, "--image-size", "57x56", "--out", out], "multiple of the patch size 14"),
        ([*good, "--image-size", "big", "--out", out], "HxW"),
        ([*good, "--fp8", "--backend", "onnxruntime", "--out", out], "precision fp8 is not for"),
        (
            [*good, "--target", "sm89", "--out", out],
            "onnxruntime has no engines to build for 'sm89'",
        ),
        ([*good, "--precision", "int4", "--out", out], "int4 is for language models"),
        ([*good, "--blocks", "int4", "--out", out], "--blocks is for a language model"),
        ([*good, "--tokenizer", "t.model", "--out", out], "--tokenizer is for a language model"),
        ([*good, "--backend", "tensorflow", "--out", out], "unknown backend 'tensorflow'"),
        (
            [*good, "--backend", "tensorrt", "--precision", "fp32", "--out", out],
            "precision fp32 is not for backend tensorrt; it has fp16, fp8",
        ),
        ([*good, "--taps", "0,9", "--out", out], "layer 9 is out of range"),
    ):
        fails(capsys, arguments, message)
        assert sorted(p.name for p in here.iterdir()) == ["folder"]
        assert [p.name for p in folder.iterdir()] == ["keep.txt"]


def test_missing_parents_are_made_and_an_empty_folder_will_do(
    checkpoint, tmp_path: Path, capsys
) -> None:
    file, config = checkpoint
    good = ["--checkpoint", str(file), "--config", str(config)]
    assert export_main([*good, "--out", str(tmp_path / "a" / "b" / "p")]) == 0
    (tmp_path / "empty").mkdir()
    assert export_main([*good, "--out", str(tmp_path / "empty")]) == 0
    assert main(["verify", str(tmp_path / "empty")]) == 0


def test_existing_output_needs_force(checkpoint, tmp_path: Path, capsys) -> None:
    file, config = checkpoint
    arguments = ["--checkpoint", str(file), "--config", str(config), "--out", str(tmp_path / "p")]
    assert export_main(arguments) == 0
    capsys.readouterr()
    before = (tmp_path / "p" / "manifest.json").read_bytes()
    fails(capsys, arguments, "exists")
    assert (tmp_path / "p" / "manifest.json").read_bytes() == before
    assert export_main([*arguments, "--precision", "int8", "--force"]) == 0
    assert (tmp_path / "p" / "manifest.json").read_bytes() != before


def test_bad_uses_are_one_line(tiny_package: Path, photo: str, tmp_path: Path, capsys) -> None:
    package = str(tiny_package)
    for arguments, message in (
        (["embed", "absent", "--image", photo], "absent"),
        (["embed", package], "nothing to embed"),
        (["embed", package, "--image", "absent.jpg"], "absent.jpg"),
        (["embed", package, "--image", photo, "--out", "rows.txt"], ".npy"),
        (["embed", package, "--image", photo, "--backend", "none"], "unknown backend"),
        (["features", package, "--image", photo, "--out", "/nowhere/x.png"], "cannot write"),
        (["features", package, "--image", photo, "--layer", "7", "--out", "x.png"], "layer 7"),
        (["verify", str(tmp_path)], "manifest"),
        (["inspect", photo], "photo.jpg"),
    ):
        fails(capsys, arguments, message, run=main)


def test_damage_is_found(tiny_package: Path, tmp_path: Path, capsys) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_package, copy)
    data = copy / "text.data"
    data.chmod(0o644)
    content = bytearray(data.read_bytes())
    content[1000] ^= 1
    data.write_bytes(content)
    fails(capsys, ["verify", str(copy)], "text.data is damaged", run=main)
    fails(capsys, ["embed", str(copy), "--text", "a"], "text.data is damaged", run=main)
    assert main(["doctor", str(copy)]) == 2
    assert "damaged: " in capsys.readouterr().out


def test_python_dash_m(tiny_package: Path) -> None:
    command = [sys.executable, "-m", "perception_rt", "inspect", str(tiny_package), "--json"]
    result = subprocess.run(command, capture_output=True, check=True, text=True)
    assert json.loads(result.stdout)["content"]["name"] == "tiny"


def options_of(capsys, command, *arguments: str) -> set[str]:
    """Returns the options in the usage of a command."""
    with pytest.raises(SystemExit):
        command([*arguments, "--help"])
    usage = capsys.readouterr().out.partition("\n\n")[0]
    return set(re.findall(r"(?<![\w-])--?[a-z][a-z0-9-]*", usage)) - {"-h"}


def test_the_set_of_options_is_frozen(capsys) -> None:
    """New options must be added here as well."""
    assert options_of(capsys, export_main) == {
        "--model", "--checkpoint", "--config", "--weights", "--seed", "--precision",
        "--fp8", "--backend", "--target", "--allow-unfused", "--refittable", "--route",
        "--calibration", "--calibrator", "--image-size", "--center-crop", "--taps", "--blocks",
        "--detection", "--window", "--global-blocks",
        "--max-length", "--tokenizer", "--out", "--force", "--json", "--version", "--list",
        "--ema", "--adapter", "--ignore-exif", "--towers", "--eval-data", "--eval-task",
        "--eval-option",
    }  # fmt: skip
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert commands == [
        "demo", "embed", "classify", "features", "match", "track", "search", "index", "generate",
        "chat", "eval", "conform", "inspect", "verify", "refit", "doctor", "push", "pull", "serve",
    ]  # fmt: skip
    options = {name: options_of(capsys, main, name) for name in commands}
    package = {"--backend", "--device", "--threads", "--expect", "--formats", "--background"}
    question = {
        "--image", "--video", "--max-tiles", "--num-frames", "--max-new-tokens", "--temperature",
        "--top-p", "--top-k", "--seed", "--stop", "--lookup", "--cache-dir", "--no-cache",
        "--literal", "--repetition-penalty",
    }  # fmt: skip
    assert options["generate"] == package | question | {"--prompt", "--stream", "--json"}
    assert options["chat"] == package | question | {"--json"}
    assert options["demo"] == {"--out", "--json"}
    assert options["embed"] == package | {
        "--image", "--text", "--video", "--num-frames", "--out", "--json", "--from", "--column",
        "--dtype", "--resume", "--skip-errors", "--part", "--shard-size", "--batch-size",
        "--workers", "--ray",
    }  # fmt: skip
    assert options["classify"] == package | {"--image", "--label", "--template", "--json"}
    assert options["features"] == package | {
        "--image", "--layer", "--attention", "--shared", "--smooth", "--height", "--out", "--json",
    }  # fmt: skip
    assert options["match"] == package | {"--layer", "--out", "--lines", "--height", "--json"}
    assert options["track"] == package | {
        "--mask", "--out", "--layer", "--context-frames", "--radius", "--top-k", "--temperature",
        "--json",
    }  # fmt: skip
    assert options["search"] == package | {
        "--package", "--image", "-k", "--html", "--column", "--exact", "--approximate", "--json",
    }  # fmt: skip
    assert options["index"] == {"--queries", "--expansion", "--threads", "--json"}
    assert options["eval"] == package | set(map(flag, (f.name for f in fields(TaskOptions)))) | {
        "--task", "--data", "--against", "--out", "--json",
    }  # fmt: skip
    assert options["conform"] == {
        "--against",
        "--weights",
        "--model-only",
        "--backend",
        "--threads",
        "--expect",
        "--json",
    }
    assert options["doctor"] == {"--json"}
    assert options["inspect"] == options["verify"] == {"--expect", "--json"}
    assert options["push"] == {"--private", "--message", "--json"}
    assert options["pull"] == {"--out", "--expect", "--json"}
    assert options["refit"] == {
        "--weights", "--out", "--force", "--expect", "--calibration", "--json",
        "--ema", "--adapter",
    }  # fmt: skip
