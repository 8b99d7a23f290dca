"""Export of detection backbones: from an encoder, from a detector, at several sizes."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import perception_rt as prt
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.checkpoint.write import save_checkpoint
from perception_rt.config import PeConfig
from perception_rt.errors import CheckpointError, InputError, PackageError
from perception_rt.export.build import export
from perception_rt.export.components.detection import backbone_config
from perception_rt.export.options import ExportOptions, parse_global_blocks
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.package.manifest import Manifest
from perception_rt.processing.image import load_image, normalize

SIZES = ((96, 96), (80, 112))
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 120, 3), np.uint8)
LEVELS = ("p2", "p3", "p4", "p5", "p6")


def state_of(source: RandomWeights, config: PeConfig) -> dict[str, Tensor]:
    with torch.device("meta"):
        names = PerceptionEncoder(config).state_dict()
    return {name: source.load(name) for name in names}


@pytest.fixture(scope="module")
def encoder(tiny_config: PeConfig, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Options for a whole CLIP in the reference layout."""
    folder = tmp_path_factory.mktemp("encoder")
    weights = state_of(RandomWeights(tiny_config, 5), tiny_config)
    save_checkpoint(weights, folder / "encoder.safetensors")
    (folder / "architecture.json").write_text(json.dumps(tiny_config.to_dict()))
    return {"checkpoint": folder / "encoder.safetensors", "config": folder / "architecture.json"}


def made(out: Path, **more: Any) -> Manifest:
    values = {"detection": True, "window": 4, "global_blocks": (1,), "image_size": SIZES}
    return export(ExportOptions(out=out, **(values | more)))


def expected(config: PeConfig, state: dict[str, Tensor], package: Path) -> list[list[Tensor]]:
    """Levels of eager at each size."""
    model = PerceptionEncoder(config).eval()
    model.load_state_dict(state)
    with prt.load(package) as embedder:
        spec = embedder.image_spec
    results = []
    for height, width in SIZES:
        at_size = replace(spec, height=height, width=width)
        pixels = normalize(load_image(PICTURE, at_size)[None], at_size)
        with torch.no_grad():
            results.append(model.encode_pyramid(torch.from_numpy(pixels)))
    return results


def check_levels(package: Path, wanted: list[list[Tensor]]) -> None:
    with prt.load(package) as embedder:
        assert embedder.image_sizes == SIZES
        for size, levels in zip(SIZES, wanted, strict=True):
            found = embedder.pyramid([PICTURE, PICTURE], size=size)
            assert tuple(found) == LEVELS
            for level, eager in zip(found.values(), levels, strict=True):
                np.testing.assert_allclose(level[1:], eager.numpy(), rtol=0, atol=1e-4)


def test_an_encoder_becomes_a_backbone(
    encoder: dict[str, Path], tiny_config: PeConfig, tmp_path: Path
) -> None:
    """Its patch kernel is resized and its class token dropped, as the reference does."""
    manifest = made(tmp_path / "p", **encoder, seed=7)
    config = PeConfig.from_dict(manifest.content.architecture)
    assert config.detection is not None and config.vision.patch_size == 16
    assert "random" in manifest.content.weights["note"]
    assert tuple(manifest.content.graphs) == ("pyramid", "pyramid_80x112")
    state = state_of(RandomWeights(config, 7), config)
    theirs = state_of(RandomWeights(tiny_config, 5), tiny_config)
    state |= {name: theirs[name] for name in state if not name.startswith("pyramid.")} | {
        "visual.conv1.weight": F.interpolate(
            theirs["visual.conv1.weight"], size=(16, 16), mode="bicubic"
        ),
        "visual.positional_embedding": theirs["visual.positional_embedding"][1:],
    }
    check_levels(tmp_path / "p", expected(config, state, tmp_path / "p"))


def test_a_detector_gives_its_backbone(tiny_config: PeConfig, tmp_path: Path) -> None:
    options = ExportOptions(
        out=tmp_path, model="PE-Demo", detection=True, window=4, global_blocks=(1,)
    )
    config = backbone_config(tiny_config, options)
    state = state_of(RandomWeights(config, 9), config)
    stored = {}
    for name, tensor in state.items():
        key = name.replace("visual.", "backbone.net.").replace("pyramid.", "backbone.")
        stored[key] = tensor[None] if name.endswith("positional_embedding") else tensor
    stored["backbone.net.rope_win.freqs_cos"] = torch.zeros(16, 32)
    stored["roi_heads.box_head.fc1.weight"] = torch.zeros(4, 4)
    file = tmp_path / "detector.pth"
    torch.save({"model": stored, "iteration": 7}, file)
    (tmp_path / "encoder.json").write_text(json.dumps(tiny_config.to_dict()))
    more = {"checkpoint": file, "config": tmp_path / "encoder.json"}
    manifest = made(tmp_path / "p", **more)
    assert manifest.content.weights["layout"] == "detectron2"
    assert manifest.content.weights["note"] == "dropped 2 tensors of the detector's heads"
    check_levels(tmp_path / "p", expected(config, state, tmp_path / "p"))
    with pytest.raises(CheckpointError, match="holds a detector: --detection"):
        export(ExportOptions(out=tmp_path / "q", **more))
    del stored["backbone.simfp_3.0.bias"]
    torch.save({"model": stored}, file)
    with pytest.raises(CheckpointError, match=r"1 missing \(backbone\.simfp_3\.0\.bias\)"):
        made(tmp_path / "q", **more)


@pytest.mark.parametrize(
    ("backend", "precision"),
    [("onnxruntime", "fp16"), ("onnxruntime", "int8"), ("tensorrt", "fp16")],
)
def test_every_level_passes_the_gate(
    backend: str, precision: str, encoder: dict[str, Path], tmp_path: Path
) -> None:
    target = () if backend == "tensorrt" else None
    more = {"backend": backend, "precision": precision, "target": target, "window": 3}
    manifest = made(tmp_path / "p", **(encoder | more))
    names = {f"{graph}.{level}" for graph in manifest.content.graphs for level in LEVELS}
    assert set(manifest.record["fidelity"]) == names
    assert min(f["cosine"] for f in manifest.record["fidelity"].values()) > 0.995


@pytest.fixture(scope="module")
def backbone(
    encoder: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Manifest]:
    """A package for images of 64 x 64 pixels; shared, so copy it to change it."""
    folder = tmp_path_factory.mktemp("backbone") / "p"
    return folder, made(folder, **encoder, image_size=64)


def test_images_keep_their_ratio_at_the_top_left(backbone: tuple[Path, Manifest]) -> None:
    """As in the reference's detectors: padded to a square with the mean, which becomes zero."""
    folder, manifest = backbone
    with prt.load(folder) as embedder:
        spec = embedder.image_spec
        pixels = normalize(load_image(np.full((20, 40, 3), 254, np.uint8), spec), spec)
        batch = embedder.pyramid([], batch_size=2)
    assert np.allclose(pixels[:, :32], 1) and np.allclose(pixels[:, 32:], 0)
    assert batch["p4"].shape == (0, 256, 4, 4)
    assert manifest.content.image["resize"] == "pad"


def test_default_windows_and_global_blocks(tiny_config: PeConfig, tmp_path: Path) -> None:
    def blocks(layers: int) -> tuple[int, ...]:
        vision = replace(tiny_config.vision, layers=layers)
        options = ExportOptions(out=tmp_path, model="PE-Demo", detection=True)
        detection = backbone_config(PeConfig(vision=vision), options).detection
        assert detection is not None and detection.window == vision.grid
        return detection.global_blocks

    assert blocks(12) == (2, 5, 8, 11)
    assert blocks(50) == (12, 24, 36, 49)
    assert blocks(2) == (0, 1)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"image_size": (96, 100)}, "96x100 is not a multiple of the patch size 16"),
        ({"image_size": (16, 96)}, "a pyramid needs 32 pixels a side"),
        ({"global_blocks": (0, 9)}, "global block 9 is out of range: the tower has blocks 0 to"),
        ({"window": 0}, "window must be from 1"),
        ({"taps": (0,)}, "--taps is for features"),
        ({"detection": False}, "--window needs --detection"),
        ({"detection": False, "window": None}, "--global-blocks needs --detection"),
        ({"window": "3"}, "window must be an integer"),
        ({"model": "PLM-Demo", "image_size": None}, "--detection is for an encoder"),
    ],
)
def test_refused_options(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        made(tmp_path / "p", **({"model": "PE-Demo", "weights": "random"} | more))
    assert not (tmp_path / "p").exists()


def test_global_blocks_on_the_command_line() -> None:
    assert parse_global_blocks("12,24") == (12, 24)
    with pytest.raises(InputError, match="--global-blocks must be integers, not 'all'"):
        parse_global_blocks("all")


def test_a_backbone_is_no_encoder(backbone: tuple[Path, Manifest], tiny_package: Path) -> None:
    with prt.load(backbone[0]) as embedder:
        for call in (
            lambda: embedder.embed_images([PICTURE]),
            lambda: embedder.features([PICTURE]),
            lambda: embedder.attention_maps([PICTURE]),
            lambda: embedder.encode_pixels(np.zeros((1, 3, 64, 64), np.float32)),
        ):
            with pytest.raises(InputError, match=r"exported as a detection backbone; use pyramid"):
                call()
        with pytest.raises(InputError, match="size must be one of this package, 64x64"):
            embedder.pyramid([PICTURE], size=(32, 32))
    with (
        prt.load(tiny_package) as encoder,
        pytest.raises(InputError, match="no detection backbone: perception-export --detection"),
    ):
        encoder.pyramid([PICTURE])


def test_a_graph_that_does_not_fit_is_refused(
    backbone: tuple[Path, Manifest], tmp_path: Path
) -> None:
    folder, manifest = backbone
    shutil.copytree(folder, tmp_path / "p")
    architecture = dict(manifest.content.architecture)
    architecture["detection"] = {**architecture["detection"], "channels": 255}
    content = replace(manifest.content, architecture=architecture)
    forged = Manifest.create(content, record=manifest.record)
    (tmp_path / "p" / "manifest.json").write_bytes(forged.to_bytes())
    with pytest.raises(PackageError, match="output 'p2' of graph 'pyramid' must be"):
        prt.load(tmp_path / "p", expect=forged.id)
