"""The chain of graphs that returns block outputs: its cut, its cost and its numbers."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import perception_rt as prt
from perception_rt.checkpoint.random import RandomWeights
from perception_rt.config import PeConfig, VisionConfig
from perception_rt.export.build import export_package
from perception_rt.export.plan import ExportPlan
from perception_rt.models.pe import PerceptionEncoder
from perception_rt.package.pe_graphs import cut_taps
from perception_rt.processing.image import ImageSpec, normalize
from perception_rt.runtime import session

LAYERS = 10
CONFIG = PeConfig(
    vision=VisionConfig(
        patch_size=8, width=32, layers=LAYERS, heads=2, mlp_ratio=2.0, output_dim=16, image_size=32,
        use_cls_token=True, attn_pooler_heads=2,
    ),
    text=None,
)  # fmt: skip
SPEC = ImageSpec(height=32, width=32)
WEIGHTS = RandomWeights(CONFIG, 0)
IMAGES = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)


def export(folder: Path, precision: str = "fp32", **more: Any) -> dict[str, Any]:
    """Publishes the package; returns its record."""
    plan = ExportPlan(
        name="deep", config=CONFIG, backend="onnxruntime", precision=precision, image=SPEC, **more
    )
    return dict(export_package(plan, WEIGHTS, folder).record)


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chain") / "fp32"
    export(folder)
    return folder


def eager(layer: int) -> np.ndarray:
    with torch.device("meta"):
        model = PerceptionEncoder(CONFIG)
    model.load_state_dict({k: WEIGHTS.load(k) for k in model.state_dict()}, assign=True)
    pixels = torch.from_numpy(normalize(IMAGES, SPEC))
    with torch.no_grad():
        tokens = model.visual.forward_features(pixels, layer=layer, strip_class_token=True)
    return tokens.numpy().reshape(3, 4, 4, 32)


def test_taps_are_spread_over_at_most_eight_graphs() -> None:
    assert cut_taps(()) == []
    assert cut_taps((3,)) == [(3,)]
    assert cut_taps((0, 5, 11)) == [(0,), (5,), (11,)]
    cut = cut_taps(tuple(range(50)))
    assert [tap for taps in cut for tap in taps] == list(range(50))
    assert len(cut) == 8 and {len(taps) for taps in cut} == {6, 7}


def test_every_layer_equals_eager(package: Path) -> None:
    with prt.load(package) as embedder:
        for layer in range(LAYERS):
            found = embedder.features(list(IMAGES), layer, batch_size=2)
            np.testing.assert_allclose(found, eager(layer), rtol=0, atol=1e-4)


def test_a_layer_runs_no_graph_behind_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[str] = []

    def spy(package: Any, graph: str, **options: Any) -> session.Session:
        opened.append(graph)
        return open_session(package, graph, **options)

    open_session = session.open_session
    monkeypatch.setattr(session, "open_session", spy)
    with prt.load(package) as embedder:
        embedder.features(list(IMAGES), 0)
        assert opened == ["features"]
        embedder.features(list(IMAGES), 4)
        assert opened == ["features", "features_1", "features_2", "features_3"]
        embedder.features(list(IMAGES), 3)  # with the graphs that are open
        assert len(opened) == 4


def test_the_gate_compares_every_tap(tmp_path: Path) -> None:
    for precision in ("fp16", "int8"):
        fidelity = export(tmp_path / precision, precision)["fidelity"]
        taps = {name.partition(".")[2] for name in fidelity if name.startswith("features")}
        assert taps == {f"block_{i}" for i in range(LAYERS)}
        last = fidelity["features_7.block_9"]
        assert last["max_abs"] > fidelity["features.block_0"]["max_abs"] > 0  # errors add up


def test_lower_precisions_stay_close_through_the_chain(tmp_path: Path) -> None:
    for precision, cosine in (("fp16", 0.9999), ("int8", 0.995)):
        export(tmp_path / precision, precision, taps=(2, LAYERS - 1))
        with prt.load(tmp_path / precision) as embedder:
            assert set(embedder.manifest.content.graphs) >= {"features", "features_1"}
            found = embedder.features(list(IMAGES)).reshape(-1, 32)
        wanted = eager(-1).reshape(-1, 32)
        norms = np.linalg.norm(found, axis=1) * np.linalg.norm(wanted, axis=1)
        assert ((found * wanted).sum(axis=1) / norms).min() >= cosine
