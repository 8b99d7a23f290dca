"""`on_error`: unusable items are reported in order, and the others come out as without them."""

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import perception_rt as prt
from perception_rt.demo import package_paths
from perception_rt.errors import InputError
from perception_rt.processing import video
from perception_rt.processing.image_loader import THREAD_NAME


class Errors(list[tuple[int, str]]):
    """Collects the errors that a method reports."""

    def __call__(self, index: int, error: InputError) -> None:
        self.append((index, str(error)))


@pytest.fixture(scope="module")
def pe(tiny_package: Path) -> Iterator[prt.Embedder]:
    with prt.Embedder.load(tiny_package, threads=1) as pe:
        yield pe


def frames(value: int) -> np.ndarray:
    rng = np.random.default_rng(value)
    return rng.integers(0, 256, (3, 20, 20, 3), np.uint8)


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_texts(pe: prt.Embedder, batch_size: int) -> None:
    errors, done = Errors(), []
    texts = ["a", "x" * 70_000, "b", 5, "c"]
    rows = pe.embed_texts(
        texts, batch_size=batch_size, on_error=errors, on_progress=lambda n, _: done.append(n)
    )
    assert [index for index, _ in errors] == [1, 3] and done[-1] == 5
    assert "70000 bytes" in errors[0][1]
    assert not rows[[1, 3]].any()
    np.testing.assert_allclose(rows[[0, 2, 4]], pe.embed_texts(["a", "b", "c"]), atol=1e-6)
    with pytest.raises(InputError, match="70000 bytes"):
        pe.embed_texts(texts)
    assert not pe.embed_texts([5, 6], on_error=Errors()).any()


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_videos(pe: prt.Embedder, workers: int) -> None:
    errors, done = Errors(), []
    videos = [frames(0), "absent.mp4", frames(1), np.zeros(3), frames(2)]
    rows = pe.embed_videos(
        videos,
        num_frames=2,
        workers=workers,
        on_error=errors,
        on_progress=lambda *count: done.append(count),
    )
    assert [index for index, _ in errors] == [1, 3] and "absent.mp4" in errors[0][1]
    assert done == [(n, 5) for n in range(1, 6)]
    assert not rows[[1, 3]].any()
    alone = [pe.embed_videos([v], num_frames=2)[0] for v in (videos[0], videos[2], videos[4])]
    np.testing.assert_array_equal(rows[[0, 2, 4]], alone)
    lazy = pe.embed_videos(iter(videos), num_frames=2, workers=workers, on_error=Errors())
    np.testing.assert_array_equal(lazy, rows)
    with pytest.raises(InputError, match=r"^video 1: .*absent.mp4"):
        pe.embed_videos(videos, num_frames=2, workers=workers)
    assert not any(t.name.startswith(THREAD_NAME) for t in threading.enumerate())


def test_settings_are_no_errors_of_items(pe: prt.Embedder) -> None:
    for settings, message in (({"num_frames": 0}, "num_frames"), ({"workers": 65}, "workers")):
        with pytest.raises(InputError, match=f"^{message} must be"):
            pe.embed_videos([frames(0)], on_error=Errors(), **settings)


def test_videos_are_decoded_ahead(pe: prt.Embedder, monkeypatch: pytest.MonkeyPatch) -> None:
    """With two workers, at most two videos are decoded beside the one in use."""
    begun: list[int] = []
    ahead = []
    real = video.select_frames

    def select(total: int, count: int) -> list[int]:
        begun.append(total)
        return real(total, count)

    monkeypatch.setattr(video, "select_frames", select)
    pe.embed_videos(
        [frames(i) for i in range(9)],
        num_frames=1,
        workers=2,
        on_progress=lambda done, _: ahead.append(len(begun) - done),
    )
    assert len(begun) == 9 and max(ahead) <= 3


def test_classify_and_features(pe: prt.Embedder) -> None:
    images = [frames(0)[0], b"no image", Image.new("RGB", (20, 20))]
    good = [images[0], images[2]]
    errors = Errors()
    odds = pe.classify(images, ["a", "b"], on_error=errors)
    assert [index for index, _ in errors] == [1]
    assert not odds[1].any()
    np.testing.assert_allclose(odds[[0, 2]], pe.classify(good, ["a", "b"]), atol=1e-6)
    errors.clear()
    dense = pe.features(images, 0, on_error=errors)
    assert [index for index, _ in errors] == [1] and not dense[1].any()
    np.testing.assert_allclose(dense[[0, 2]], pe.features(good, 0), atol=1e-5)


def test_a_batch_of_questions() -> None:
    errors = Errors()
    requests = [
        prt.Request("Read the digits.", max_new_tokens=3),
        prt.Request("a", top_k=0),
        prt.Request("a", images=[b"no image"]),
        prt.Request("Where is the 5?", max_new_tokens=3),
    ]
    with prt.Generator.load(package_paths()["demo:plm"], threads=1) as plm:
        results = plm.generate_batch(requests, on_error=errors)
        assert [index for index, _ in errors] == [1, 2]
        assert "top_k" in errors[0][1] and results[1] is None is results[2]
        for index in (0, 3):
            (alone,) = plm.generate_batch([requests[index]])
            assert results[index] is not None and results[index].tokens == alone.tokens
