"""`perception-export` with wrapped weights and adapters, and its list of models."""

import json
from pathlib import Path

import pytest
import torch
from golden_data import golden
from one_line import fails
from safetensors.torch import save_file

from perception_rt.archs import PE_MODELS, PLM_MODELS
from perception_rt.cli import export_main, main
from perception_rt.package.reader import read_manifest

PATH = "visual.transformer.resblocks.1.mlp.c_fc"


@pytest.fixture
def config(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(golden("pe_core_cls").config_dict()))
    return str(tmp_path / "config.json")


def files(package: Path) -> dict[str, object]:
    """Digests of the graphs and weights, which do not depend on provenance."""
    return dict(read_manifest(package).content.files)


def adapter(folder: Path, seed: int = 0) -> torch.Tensor:
    """Writes an adapter for one layer and returns its merged update."""
    rows, columns = golden("pe_core_cls").weights[f"{PATH}.weight"].shape
    generator = torch.Generator().manual_seed(seed)
    a, b = torch.randn(2, columns, generator=generator), torch.randn(rows, 2, generator=generator)
    folder.mkdir()
    save_file(
        {f"base_model.model.{PATH}.lora_{n}.weight": t for n, t in (("A", a), ("B", b))},
        folder / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 0.5}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return 0.25 * (b @ a)


def test_adapter_and_averaged_weights_on_export_and_refit(
    tmp_path: Path, config: str, capsys
) -> None:
    weights = golden("pe_core_cls").weights
    other = {key: tensor * 1.01 for key, tensor in weights.items()}
    checkpoint, lora = str(tmp_path / "last.pth.tar"), str(tmp_path / "lora")
    torch.save({"state_dict": other, "state_dict_ema": weights}, checkpoint)
    merged = {**weights, f"{PATH}.weight": weights[f"{PATH}.weight"] + adapter(tmp_path / "lora")}
    save_file(merged, tmp_path / "merged.safetensors")
    export = ["--config", config, "--taps", "none", "--out"]
    expected, made = tmp_path / "expected", tmp_path / "made"
    merged_file = str(tmp_path / "merged.safetensors")
    assert export_main(["--checkpoint", merged_file, *export, str(expected)]) == 0
    chosen = ["--ema", "--adapter", lora]
    assert export_main(["--checkpoint", checkpoint, *chosen, *export, str(made)]) == 0
    assert "note: averaged weights (EMA)\n" in capsys.readouterr().err
    assert files(made) == files(expected)
    facts = read_manifest(made).content.weights
    assert facts["adapter"] == "lora" and facts["file"] == "last.pth.tar"
    refitted = tmp_path / "refitted"
    refit = ["refit", str(expected), "--weights", checkpoint, "--adapter", lora, "--out"]
    assert main([*refit, str(refitted)]) == 0
    printed = capsys.readouterr().err
    assert "note: left out EMA weights, which --ema selects: state_dict_ema\n" in printed
    assert files(refitted) != files(expected)


def test_wrong_weight_options(tmp_path: Path, capsys) -> None:
    adapter(tmp_path / "lora")
    out = ["--out", str(tmp_path / "x")]
    bad = ["--checkpoint", str(tmp_path / "lora"), *out]
    fails(capsys, bad, "is a LoRA adapter, not a whole model: pass its base model, and --adapter")
    random = ["--model", "PE-Demo", "--weights", "random", *out]
    fails(capsys, [*random, "--ema"], "--ema is for a checkpoint")
    fails(capsys, [*random, "--adapter", str(tmp_path)], "pass one of its folders lora")
    assert not (tmp_path / "x").exists()


def test_the_list_of_models(capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        export_main(["--list"])
    assert ended.value.code == 0
    header, *lines = capsys.readouterr().out.splitlines()
    assert header.split() == ["model", "parameters", "image", "text", "towers"]
    rows = {line.split()[0]: " ".join(line.split()[1:]) for line in lines}
    assert rows.keys() == {*PE_MODELS, *PLM_MODELS, "PE-Demo", "PLM-Demo"}
    assert rows["PE-Core-L14-336"] == "671 M 336x336 32 tokens vision, text"
    assert rows["PE-Spatial-T16-512"] == "5.68 M 512x512 - vision"
    assert rows["PLM-8B"] == "9.79 B 448x448 11520 tokens vision, decoder"
    assert all(len(line) < 80 for line in lines)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("PE-Core-L14", "PE-Core-L14-336"),
        ("pe-core-l14-336", "PE-Core-L14-336"),
        ("PLM1B", "PLM-1B"),
        ("pe_demo", "PE-Demo"),
        ("PLM-Dmo", "PLM-Demo"),
        ("facebook/Perception-LM-3", "PLM-3B"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name: str, nearest: str, tmp_path, capsys) -> None:
    arguments = ["--model", name, "--out", str(tmp_path / "x")]
    line = fails(capsys, arguments, f"unknown model '{name}'; did you mean ")
    hint = line.partition("did you mean ")[2].partition("?")[0]
    assert nearest in hint.split(" or ")
    assert line.endswith("PE-Demo, PLM-Demo")
