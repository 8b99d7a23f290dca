"""Several image sizes in one package, and the attention of the pooling probe."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import perception_rt as prt
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig
from perception_rt.errors import InputError, PackageError
from perception_rt.export import refit
from perception_rt.export.build import export_package
from perception_rt.export.options import ExportOptions, parse_image_sizes
from perception_rt.export.plan import ExportPlan
from perception_rt.models.vision import VisionTower
from perception_rt.package.reader import open_package
from perception_rt.processing.image import ImageSpec, load_image, normalize

SIZES = ((32, 32), (16, 40), (48, 24))
PICTURE = np.random.default_rng(0).integers(0, 256, (50, 60, 3), np.uint8)


def plan(config: PeConfig, **more: Any) -> ExportPlan:
    fields = {"name": "sizes", "backend": "onnxruntime", "precision": "fp32"}
    return ExportPlan(config=config, image=ImageSpec(height=32, width=32), **(fields | more))


@pytest.fixture(scope="module")
def config(tiny_config: PeConfig) -> PeConfig:
    return replace(tiny_config, text=None)


@pytest.fixture(scope="module")
def package(config: PeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes") / "p"
    export_package(plan(config, more_sizes=SIZES[1:]), RandomWeights(config, 0), folder)
    return folder


@pytest.fixture(scope="module")
def tower(config: PeConfig) -> VisionTower:
    tower = VisionTower(config.vision)
    weights = RandomWeights(config, 0)
    tower.load_state_dict({name: weights.load(f"visual.{name}") for name in tower.state_dict()})
    return tower.eval()


@pytest.mark.parametrize("size", SIZES)
def test_each_size_equals_eager(size: tuple[int, int], package: Path, tower: VisionTower) -> None:
    spec = ImageSpec(height=size[0], width=size[1])
    pixels = torch.from_numpy(normalize(load_image(PICTURE, spec)[None], spec))
    with torch.no_grad():
        tokens = tower.forward_features(pixels)
        embedding = tower(pixels).numpy()
        x = tower.ln_post(tokens)
    # Independent of our own formula: torch's attention returns its weights.
    pool = tower.attn_pool
    attention = nn.MultiheadAttention(64, pool.attn.heads, batch_first=True)
    attention.load_state_dict(pool.attn.state_dict())
    with torch.no_grad():
        _, maps = attention(pool.probe, x, x, average_attn_weights=False)
    with prt.load(package) as embedder:
        assert embedder.image_sizes == (SIZES[0], *sorted(SIZES[1:]))
        found = embedder.encode_pixels(pixels.numpy())
        dense = embedder.features([PICTURE], size=size)
        unit = embedder.embed_images([PICTURE], size=size)
        attended = embedder.attention_maps([PICTURE], size=size)
        if size == SIZES[0]:
            assert np.array_equal(dense, embedder.features([PICTURE]))
    np.testing.assert_allclose(found, embedding, rtol=0, atol=1e-4)
    np.testing.assert_allclose(unit[0], embedding[0] / np.linalg.norm(embedding), atol=1e-5)
    assert dense.shape == (1, size[0] // 8, size[1] // 8, 64)
    np.testing.assert_allclose(dense.reshape(-1, 64), tokens[0, 1:], rtol=0, atol=1e-4)
    assert attended.shape == (1, 2, size[0] // 8, size[1] // 8)
    np.testing.assert_allclose(attended.reshape(2, -1), maps[0, :, 0, 1:], rtol=0, atol=1e-5)


def test_sizes_share_the_weights(package: Path, config: PeConfig, tmp_path: Path) -> None:
    one = export_package(plan(config), RandomWeights(config, 0), tmp_path / "one")
    size = one.content.files["vision.data"].size_bytes
    tables = sum(4 * 64 * (1 + h * w // 64) * 2 + 1024 for h, w in SIZES[1:])
    assert size < (package / "vision.data").stat().st_size <= size + tables


def test_an_unknown_size_is_refused_by_name(package: Path) -> None:
    with prt.load(package) as embedder:
        for call in (embedder.embed_images, embedder.features, embedder.attention_maps):
            with pytest.raises(InputError, match=r"32x32, 16x40, 48x24, not \(64, 64"):
                call([PICTURE], size=(64, 64))
        with pytest.raises(InputError, match="pixels"):
            embedder.encode_pixels(np.zeros((1, 3, 64, 64), np.float32))


def test_packages_without_attention_maps_say_so(config: PeConfig, tmp_path: Path) -> None:
    export_package(plan(config, taps=(0,)), RandomWeights(config, 0), tmp_path / "p")
    old = Path(__file__).parents[1] / "compatibility" / "packages" / "pe"
    for path in (tmp_path / "p", old):
        with prt.load(path) as embedder, pytest.raises(InputError, match="no attention maps"):
            embedder.attention_maps([PICTURE])


def test_plans_refuse_sizes_that_do_not_fit(config: PeConfig) -> None:
    for sizes, words in (
        (((32, 32),), "32x32 occurs twice"),
        (((32, 30),), "32x30 is not a multiple of the patch size 8"),
    ):
        with pytest.raises(InputError, match=words):
            plan(config, more_sizes=sizes)


def test_options_take_one_size_or_several() -> None:
    assert parse_image_sizes("448x336,64") == ((448, 336), (64, 64))
    for given, sizes in (
        (None, ()),
        (64, ((64, 64),)),
        ((448, 336), ((448, 336),)),
        ([(448, 336), (64, 64)], ((448, 336), (64, 64))),
    ):
        options = ExportOptions(model="PE-Demo", out="p", image_size=given)
        assert options.image_sizes == sizes
    with pytest.raises(InputError, match="image_size must be a side"):
        ExportOptions(model="PE-Demo", out="p", image_size=[(448, 336), 64])  # type: ignore[list-item]


def test_a_refit_plans_the_same_sizes(package: Path) -> None:
    with open_package(package) as opened:
        found = refit.plan_of(opened)
        assert isinstance(found, ExportPlan) and found.more_sizes == tuple(sorted(SIZES[1:]))


def test_a_size_that_lacks_a_graph_is_refused(package: Path, tmp_path: Path) -> None:
    with open_package(package) as opened:
        graphs = dict(opened.manifest.content.graphs)
        architecture = PeConfig.from_dict(opened.manifest.content.architecture)
    from perception_rt.package.pe_graphs import check_graphs

    check_graphs(graphs, architecture, 32, 32)
    for name in ("pixels_16x40", "features_1_16x40", "attention_48x24"):
        less = {key: graph for key, graph in graphs.items() if key != name}
        with pytest.raises(PackageError, match=f"no graph '{name}'"):
            check_graphs(less, architecture, 32, 32)
    with pytest.raises(PackageError, match="16x40 occurs twice"):
        check_graphs(graphs, architecture, 16, 40)
