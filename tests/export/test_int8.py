"""int8 with activation outliers: smoothing, layers in float, early refusal, and the log."""

import json
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import perception_rt as prt
from perception_rt.checkpoint.locate import find_config
from perception_rt.checkpoint.source import WeightSource, open_checkpoint
from perception_rt.config import PeConfig
from perception_rt.demo import config_path, language_model_path, weights_path
from perception_rt.errors import ExportError
from perception_rt.export import ExportOptions, build, export
from perception_rt.export.build import export_package
from perception_rt.export.components.pe import TextComponent, VisionComponent
from perception_rt.export.components.plm import TileComponent
from perception_rt.export.plan import ExportPlan, PlmPlan
from perception_rt.export.quantization import calibration
from perception_rt.export.quantization.sensitivity import (
    Measured,
    back_off,
    least_cosine,
    measure_layers,
    simulate,
)
from perception_rt.export.refit import refit_package
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import read_manifest
from perception_rt.plm_config import PlmConfig
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.tiles import TileSpec

CONFIG = PeConfig.from_dict(json.loads(config_path().read_text()))
SPEC = ImageSpec(height=CONFIG.vision.image_size, width=CONFIG.vision.image_size)
AFTER = {"ln_1": "attn.in_proj_weight", "ln_2": "mlp.c_fc.weight"}
Tensors = dict[str, Tensor]


def with_outliers(tensors: Tensors, channels: int, factor: float) -> Tensors:
    """The same function, but some outputs of each block's LayerNorms are larger by a factor."""
    changed = {name: tensor.clone() for name, tensor in tensors.items()}
    generator = torch.Generator().manual_seed(0)
    for gain in list(changed):
        prefix, _, leaf = gain.removesuffix(".weight").rpartition(".")
        if gain.endswith(".weight") and leaf in AFTER:
            chosen = torch.randperm(changed[gain].numel(), generator=generator)[:channels]
            for name in (gain, f"{prefix}.{leaf}.bias"):
                changed[name][chosen] *= factor
            changed[f"{prefix}.{AFTER[leaf]}"][:, chosen] /= factor
    return changed


def checkpoint(tensors: Tensors, file: Path) -> WeightSource:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, file)
    return open_checkpoint(file, CONFIG)


def plan(precision: str = "int8") -> ExportPlan:
    return ExportPlan(
        name="pe", config=CONFIG, backend="onnxruntime", precision=precision, image=SPEC, taps=()
    )


def least_fidelity(manifest: Manifest, graphs: Iterable[str]) -> float:
    found = manifest.record["fidelity"]
    return min(v["cosine"] for name, v in found.items() if name.partition(".")[0] in graphs)


@pytest.fixture(scope="module")
def tensors() -> Tensors:
    return load_file(weights_path())


@pytest.fixture(scope="module")
def large(tensors: Tensors, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """PE-Demo with large channels in int8, and the lines of its export's log."""
    folder = tmp_path_factory.mktemp("large")
    source = checkpoint(with_outliers(tensors, 4, 20.0), folder / "w.safetensors")
    lines: list[str] = []
    export_package(plan(), source, folder / "package", on_progress=lines.append)
    return folder / "package", lines


@pytest.mark.parametrize(("channels", "factor"), [(0, 1.0), (1, 20.0), (2, 5.0), (8, 100.0)])
def test_both_towers_reach_the_target(
    channels: int, factor: float, tensors: Tensors, tmp_path: Path
) -> None:
    source = checkpoint(with_outliers(tensors, channels, factor), tmp_path / "w.safetensors")
    assert CONFIG.text is not None
    vision = VisionComponent(plan(), source).reference().measured
    text = TextComponent(plan(), CONFIG.text, source).reference().measured
    for measured in (vision, text):
        assert measured.cosine is not None and measured.cosine >= 0.999
        assert len(measured.excluded()) <= len(measured.errors) / 3
        assert measured.smoothed.isdisjoint(measured.excluded())
    assert vision.excluded() == []
    if channels == 0:  # a well-behaved tower stays as it is
        assert vision.smoothed == set()
    else:
        assert {f"visual.transformer.resblocks.{i}.mlp.c_fc.weight" for i in range(4)} <= (
            vision.smoothed
        )


def test_an_engine_with_large_channels_is_as_faithful(
    large: tuple[Path, list[str]], tensors: Tensors, tmp_path: Path
) -> None:
    package, lines = large
    manifest = read_manifest(package)
    options = manifest.content.target.options
    assert least_fidelity(manifest, ("vision", "pixels", "text")) >= 0.999
    for tower in ("visual.", "text."):
        assert any(name.startswith(tower) for name in options["balanced_layers"])
    assert any("have their channels smoothed: visual." in line for line in lines)
    floats = [line for line in lines if "stay in float" in line]
    assert bool(floats) == bool(options["float_layers"])
    # The same function as before, on images and texts that no decision was made on.
    export_package(plan("fp32"), checkpoint(tensors, tmp_path / "w.safetensors"), tmp_path / "p")
    images = list(calibration.images(16, SPEC.height, SPEC.width, seed=5))
    texts = ["a handwritten seven", "zero", "the number 4"]
    with prt.load(tmp_path / "p") as exact, prt.load(package) as int8:
        assert (exact.embed_images(images) * int8.embed_images(images)).sum(axis=1).min() >= 0.999
        assert (exact.embed_texts(texts) * int8.embed_texts(texts)).sum(axis=1).min() >= 0.999


def test_a_refit_keeps_smoothing_and_floats(
    large: tuple[Path, list[str]], tensors: Tensors, tmp_path: Path
) -> None:
    checkpoint(with_outliers(tensors, 6, 30.0), tmp_path / "w.safetensors")
    refitted = refit_package(large[0], tmp_path / "w.safetensors", tmp_path / "refitted")
    assert refitted.content.target == read_manifest(large[0]).content.target
    assert least_fidelity(refitted, ("vision", "pixels", "text")) >= 0.998


def test_a_language_models_tower_reaches_the_target(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    config = find_config(language_model_path())
    assert isinstance(config, PlmConfig)
    save_file(with_outliers(load_file(language_model_path() / file.name), 4, 20.0), file)
    settings = PlmPlan(
        name="plm", config=config, backend="onnxruntime", precision="int8",
        tiles=TileSpec(tile_size=config.vision.image_size),
    )  # fmt: skip
    component = TileComponent(settings, open_checkpoint(file, config))
    measured = component.reference().measured
    assert measured.cosine is not None and measured.cosine >= 0.999
    assert len(measured.excluded()) <= len(measured.errors) / 3
    assert any(
        name.endswith("in_proj_weight") for name in measured.smoothed & measured.norms.keys()
    )


def test_weights_that_int8_does_not_suit_are_refused_before_graphs_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(build, "MIN_COSINE", {"int8": 0.99999})
    lines: list[str] = []
    options = ExportOptions(model="PE-Demo", precision="int8", out=tmp_path / "package")
    with pytest.raises(ExportError, match=r"vision: its weights do not suit int8.*such as fp16"):
        export(options, lines.append)
    assert not any("writing" in line for line in lines)
    assert not (tmp_path / "package").exists()


class Chain(nn.Module):
    """Linear layers, some of which int8 harms: their inputs have values that dwarf the others."""

    def __init__(self, bad: Iterable[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(12)).requires_grad_(False)
        self.bad = frozenset(bad)

    def forward(self, x: Tensor) -> Tensor:
        for index, layer in enumerate(self.layers):
            # A large value in a different channel of each row: smoothing is no help.
            spike = 400.0 * float(index in self.bad) * torch.eye(64)[: len(x)]
            x = x + 0.3 * (layer(x + spike) - spike @ layer.weight.T)
        return x


@pytest.mark.parametrize(("bad", "reached"), [((2, 7), True), (range(12), False)])
def test_the_worst_layers_stay_in_float(bad: Iterable[int], reached: bool) -> None:
    torch.manual_seed(0)
    module, x = Chain(bad), torch.randn(48, 64)
    exact, measured = measure_layers(module, lambda: module(x), "int8")
    back_off(module, lambda: module(x), lambda: module(x), measured, 0.9995)
    excluded = measured.excluded()
    assert measured.cosine is not None and (measured.cosine >= 0.9995) == reached
    if reached:
        assert excluded == [f"layers.{index}.weight" for index in bad]
    rounded = simulate(module, lambda: module(x), measured, "int8")
    assert least_cosine(rounded, exact) == pytest.approx(measured.cosine)


def test_a_norm_that_makes_the_input_is_known() -> None:
    module = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 4)).requires_grad_(False)
    x = torch.randn(5, 8)
    _, measured = measure_layers(module, lambda: module[2](module[1](module[0](x)[1:])), "int8")
    assert measured.norms == {"1.weight": ("0.weight", "0.bias")}
    parent = Measured()
    parent.add(measured, "tower.")
    assert parent.norms == {"tower.1.weight": ("tower.0.weight", "tower.0.bias")}
