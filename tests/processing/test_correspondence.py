"""Mutual nearest neighbours, label propagation and masks, without a package."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.neighbors import NearestNeighbors

from perception_rt.errors import InputError
from perception_rt.processing.correspondence import Matches, draw_matches, mutual_matches
from perception_rt.processing.label_propagation import PropagationSettings, track_masks
from perception_rt.processing.masks import PALETTE, mask_image, overlay, read_mask


def test_mutual_matches_equal_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(5, 4, 8)), rng.normal(size=(3, 6, 8))
    rows, others = first.reshape(-1, 8), second.reshape(-1, 8)

    def nearest(queries: np.ndarray, points: np.ndarray) -> np.ndarray:
        found = NearestNeighbors(n_neighbors=1, metric="cosine").fit(points)
        return found.kneighbors(queries)[1][:, 0]

    forward, back = nearest(rows, others), nearest(others, rows)
    expected = {(i, j) for i, j in enumerate(forward) if back[j] == i}
    matches = mutual_matches(first, second)
    pairs = zip(matches.first @ [4, 1], matches.second @ [6, 1], strict=True)
    assert {(int(i), int(j)) for i, j in pairs} == expected
    assert (np.diff(matches.cosines) <= 0).all()
    assert len(matches.best(2)) == 2
    with pytest.raises(InputError, match="of one width C"):
        mutual_matches(first, second[:, :, :5])


def test_lines_join_the_centres_of_patches() -> None:
    matches = Matches(
        first=np.array([[0, 0]]), second=np.array([[1, 1]]), cosines=np.ones(1, np.float32)
    )
    images = [Image.new("RGB", (10, 10), "black")] * 2
    picture = np.asarray(draw_matches(images, [(2, 2), (2, 2)], matches, height=80))
    assert picture.shape == (80, 168, 3)
    for y, x in ((20, 20), (60, 88 + 60), (40, 84)):
        assert picture[y, x].max() > 200 and np.ptp(picture[y, x]) > 100, (y, x)
    assert (picture[70, 10] == 0).all()


def reference(features: np.ndarray, labels: np.ndarray, settings: PropagationSettings) -> list:
    """Labels (T, h * w, K) patch by patch, as DINO's evaluation describes its propagation."""
    frames, height, width, _ = features.shape
    rows = features.reshape(frames, height * width, -1)
    rows = rows / np.linalg.norm(rows, axis=2, keepdims=True)
    found = [labels]
    for frame in range(1, frames):
        latest = range(max(1, frame - settings.context_frames), frame)
        result = np.zeros_like(labels)
        for patch in range(height * width):
            near = [
                (np.exp(rows[frame, patch] @ rows[t, other] / settings.temperature), t, other)
                for t in [0, *latest]
                for other in range(height * width)
                if abs(other // width - patch // width) <= settings.radius
                and abs(other % width - patch % width) <= settings.radius
            ]
            best = sorted(near, reverse=True)[: settings.top_k]
            result[patch] = sum(w * found[t][other] for w, t, other in best)
            result[patch] /= sum(w for w, *_ in best)
        found.append(result)
    return found


def test_label_propagation_equals_a_loop_over_patches() -> None:
    rng = np.random.default_rng(1)
    features = rng.normal(size=(5, 4, 6, 8))
    first = rng.integers(0, 3, (4, 6)).astype(np.uint8) * 2  # one pixel per patch: 0, 2 and 4
    settings = PropagationSettings(context_frames=2, radius=2, top_k=3, temperature=0.5)
    labels = np.stack([first.reshape(-1) == n for n in (0, 2, 4)], axis=1).astype(float)
    for frame, shares in enumerate(reference(features, labels, settings)):
        stretched = (shares - shares.min(axis=0)) / np.ptp(shares, axis=0)
        expected = np.array([0, 2, 4])[stretched.argmax(axis=1)].reshape(4, 6)
        assert (list(track_masks(features, first, settings))[frame] == expected).all()
    for wrong in ({"top_k": 0}, {"radius": -1}, {"temperature": 0.001}):
        with pytest.raises(InputError):
            PropagationSettings(**wrong)


def test_masks_are_numbers_with_colours(tmp_path: Path) -> None:
    mask = np.arange(12, dtype=np.uint8).reshape(3, 4)
    mask_image(mask).save(tmp_path / "palette.png")
    Image.fromarray(mask).save(tmp_path / "grey.png")
    for name in ("palette.png", "grey.png"):
        assert (read_mask(tmp_path / name) == mask).all()
    # The first colours of PASCAL VOC: background, aeroplane, bicycle, bird.
    assert PALETTE[:4].tolist() == [[0, 0, 0], [128, 0, 0], [0, 128, 0], [128, 128, 0]]
    drawn = np.asarray(overlay(Image.new("RGB", (4, 3), "white"), mask))
    assert (drawn[0, 0] == 255).all() and (drawn[0, 1] != 255).any()
    Image.new("RGB", (4, 3)).save(tmp_path / "colour.png")
    with pytest.raises(InputError, match="has colours"):
        read_mask(tmp_path / "colour.png")
    (tmp_path / "damaged.png").write_bytes((tmp_path / "grey.png").read_bytes()[:45])
    with pytest.raises(InputError, match="is damaged or is not a PNG file"):
        read_mask(tmp_path / "damaged.png")
