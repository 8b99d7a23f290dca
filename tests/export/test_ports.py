"""Folders as timm and open_clip save them, exported unmodified: outputs are those of the library.

`golden/timm_core`, `timm_spatial` and `open_clip` hold small models with random weights and what
timm 1.0.31 and open_clip make of two pictures.
"""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import perception_rt as prt
from perception_rt.errors import CheckpointError, InputError
from perception_rt.export import ExportOptions, export
from perception_rt.processing.image import load_image, normalize
from perception_rt.runtime.embedder import Embedder

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = {"rtol": 0, "atol": 1e-5}


@contextmanager
def exported(out: Path, **options: Any) -> Iterator[Embedder]:
    export(ExportOptions(out=out, **options))
    with prt.load(out) as embedder:
        assert isinstance(embedder, Embedder)
        yield embedder


def expected(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / name / "expected.npz") as file:
        return dict(file)


def unit(rows: np.ndarray) -> np.ndarray:
    return rows / np.linalg.norm(rows, axis=-1, keepdims=True)


def check_pictures(embedder: Embedder, golden: dict[str, np.ndarray], output: str) -> None:
    """Pixels, raw outputs and unit vectors of the pictures equal the port's."""
    pictures = [golden["picture0"], golden["picture1"]]
    spec = embedder.image_spec
    pixels = np.stack([normalize(load_image(picture, spec), spec) for picture in pictures])
    np.testing.assert_allclose(pixels, golden["pixels"], **TOLERANCE)
    found = embedder.encode_pixels(golden["pixels"])
    np.testing.assert_allclose(found, golden[output], **TOLERANCE)
    np.testing.assert_allclose(embedder.embed_images(pictures), unit(golden[output]), **TOLERANCE)


@pytest.mark.parametrize("name", ["timm_core", "timm_avg", "timm_spatial"])
def test_a_folder_of_timm(name: str, tmp_path: Path) -> None:
    golden = expected(name)
    with exported(tmp_path / "package", checkpoint=GOLDEN / name) as embedder:
        check_pictures(embedder, golden, "output")
        assert embedder.manifest.content.name == name
        architecture = embedder.manifest.content.architecture
        assert architecture["text"] is None
        assert architecture["vision"].get("proj_bias", False) == (name != "timm_spatial")
        if name == "timm_spatial":
            pictures = [golden["picture0"], golden["picture1"]]
            tokens = embedder.features(pictures).reshape(2, 9, 32)
            np.testing.assert_allclose(tokens, golden["tokens"][:, 1:], **TOLERANCE)


def test_a_folder_of_open_clip(tmp_path: Path) -> None:
    golden = expected("open_clip")
    with exported(tmp_path / "package", checkpoint=GOLDEN / "open_clip") as embedder:
        check_pictures(embedder, golden, "image")
        text = embedder.encode_tokens(golden["tokens"])
        np.testing.assert_allclose(text, golden["text"], **TOLERANCE)
        images = embedder.embed_images([golden["picture0"], golden["picture1"]])
        logits = embedder.logit_scale * images @ unit(text).T
        np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)


def test_only_the_vision_tower(tmp_path: Path) -> None:
    folder = tmp_path / "vision-only"
    shutil.copytree(GOLDEN / "open_clip", folder)
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["model_cfg"]["text_cfg"] = {"hf_model_name": "another"}
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    with exported(tmp_path / "p", checkpoint=folder, towers="vision") as embedder:
        check_pictures(embedder, expected("open_clip"), "image")
        assert embedder.manifest.content.text is None
        assert "text" not in embedder.manifest.content.graphs
        assert "dropped" in str(embedder.manifest.content.weights["note"])


def test_a_configuration_elsewhere(tmp_path: Path) -> None:
    golden = GOLDEN / "open_clip"
    weights = tmp_path / "weights.bin"
    shutil.copy(golden / "open_clip_pytorch_model.bin", weights)
    options = {"checkpoint": weights, "config": golden / "open_clip_config.json", "taps": ()}
    with exported(tmp_path / "p", **options) as embedder:
        check_pictures(embedder, expected("open_clip"), "image")


def test_options_override_the_folder(tmp_path: Path) -> None:
    options = {"checkpoint": GOLDEN / "open_clip", "towers": "vision", "taps": ()}
    with exported(tmp_path / "p", **options, center_crop=True, image_size=(16, 32)) as embedder:
        assert (embedder.image_spec.height, embedder.image_spec.width) == (16, 32)
        assert (embedder.image_spec.resize, embedder.image_spec.interpolation) == (
            "center_crop", "bilinear",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"towers": "text"}, InputError, "--towers must be one of .*'all', 'vision'.*not 'text'"),
        ({"towers": 1}, InputError, "towers must be text, not 1"),
    ],
)
def test_unusable_towers(
    options: dict[str, Any], error: type[Exception], message: str, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(ExportOptions(checkpoint=GOLDEN / "open_clip", out=tmp_path / "p", **options))
    assert not any(tmp_path.iterdir())


def test_a_vision_only_checkpoint_of_a_model_with_text(tmp_path: Path) -> None:
    with exported(tmp_path / "a", model="PE-Demo", towers="vision", taps=()) as embedder:
        assert set(embedder.manifest.content.graphs) == {"vision", "pixels"}
    with pytest.raises(InputError, match="--model PE-Demo contradicts the configuration"):
        export(ExportOptions(model="PE-Demo", weights=GOLDEN / "timm_core", out=tmp_path / "b"))
    shutil.copy(GOLDEN / "timm_core" / "model.safetensors", tmp_path / "c.safetensors")
    with pytest.raises(CheckpointError, match="--towers vision exports the vision tower alone"):
        export(
            ExportOptions(model="PE-Demo", weights=tmp_path / "c.safetensors", out=tmp_path / "d")
        )
