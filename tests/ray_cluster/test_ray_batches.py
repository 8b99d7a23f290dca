"""The classes for `map_batches`, called as Ray calls them, and what happens without Ray."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import perception_rt as prt
from perception_rt.bulk.sources import Sources
from perception_rt.cli import main
from perception_rt.ray import Answer, Embed, build_app, embed_sources
from perception_rt.ray.cluster import connected

TEXTS = ["a red square", "seven", "a 7"]


@pytest.fixture(scope="module")
def squares() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), np.uint8)


@pytest.fixture(scope="module")
def pe():
    with prt.load("demo:pe", threads=1) as engine:
        yield engine


def test_embeds_images_texts_and_paths(pe: prt.Embedder, squares: np.ndarray, tmp_path) -> None:
    expected = pe.embed_images(list(squares))
    batch = {"image": squares, "n": np.arange(3)}
    found = Embed("demo:pe", "image", threads=1)(batch)
    assert list(found) == ["image", "n", "embedding"] and found["n"] is batch["n"]
    np.testing.assert_array_equal(found["embedding"], expected)
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for path, square in zip(paths, squares, strict=True):
        Image.fromarray(square).save(path)
    for column in (
        np.array([str(path) for path in paths]),  # NumPy scalars
        np.array([path.read_bytes() for path in paths], object),
    ):
        found = Embed("demo:pe", "file", output="row", threads=1)({"file": column})
        np.testing.assert_array_equal(found["row"], expected)
    found = Embed("demo:pe", "caption", kind="text", threads=1)({"caption": np.array(TEXTS)})
    np.testing.assert_array_equal(found["embedding"], pe.embed_texts(TEXTS))


def test_unusable_items_end_the_job_or_are_named(pe: prt.Embedder, squares: np.ndarray) -> None:
    cells = np.empty(3, object)
    cells[:] = [squares[0], b"no image", squares[2]]
    with pytest.raises(prt.InputError):
        Embed("demo:pe", "image", threads=1)({"image": cells})
    found = Embed("demo:pe", "image", skip_errors=True, threads=1)({"image": cells})
    assert [bool(reason) for reason in found["error"]] == [False, True, False]
    assert not found["embedding"][1].any()
    np.testing.assert_array_equal(
        found["embedding"][[0, 2]], pe.embed_images([squares[0], squares[2]])
    )


def test_embeds_videos(pe: prt.Embedder, tmp_path: Path) -> None:
    frames = np.random.default_rng(1).integers(0, 256, (2, 5, 32, 32, 3), np.uint8)
    found = Embed("demo:pe", "clip", kind="video", num_frames=3, threads=1)({"clip": frames})
    expected = pe.embed_videos(list(frames), num_frames=3)
    np.testing.assert_array_equal(found["embedding"], expected)
    files = np.array([str(tmp_path / "clip.mp4"), str(tmp_path / "missing.mp4")])
    write_clip(tmp_path / "clip.mp4")
    cells = np.array([Path(files[0]).read_bytes(), b"no video"], object)
    for column in (files, cells):
        embed = Embed("demo:pe", "clip", kind="video", skip_errors=True, threads=1)
        found = embed({"clip": column})
        np.testing.assert_array_equal(found["embedding"][:1], pe.embed_videos([files[0]]))
        assert found["error"][0] == "" and "video" in found["error"][1]
        assert not found["embedding"][1].any()


def write_clip(path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for i in range(10):
            picture = np.full((64, 64, 3), 20 * i, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        file.mux(stream.encode())


@pytest.mark.parametrize("kind", ["image", "text", "video"])
def test_empty_and_odd_columns(kind: str) -> None:
    strict = Embed("demo:pe", "x", kind=kind, threads=1)
    lenient = Embed("demo:pe", "x", kind=kind, skip_errors=True, threads=1)
    assert strict({"x": np.empty(0, object)})["embedding"].shape == (0, 64)
    nested = np.empty(2, object)
    nested[:] = [[1, 2], None]
    for column in (np.arange(2), np.full(2, np.nan), np.zeros((2, 8, 8, 4), np.uint8), nested):
        with pytest.raises(prt.InputError, match=f"column 'x'.*{kind}.*skip_errors"):
            strict({"x": column})
        found = lenient({"x": column})
        assert all(found["error"]) and not found["embedding"].any()


def test_answers_prompts_with_images(squares: np.ndarray) -> None:
    prompts = ["What is this?", "What are these?", "Hello"]
    images = np.empty(3, object)
    images[:] = [squares[0], [squares[1], squares[2]], None]
    request = {"max_new_tokens": 4}
    batch = {"prompt": np.array(prompts), "image": images}
    found = Answer("demo:plm", images="image", request=request, threads=1)(batch)
    with prt.load("demo:plm", threads=1) as plm:
        expected = [
            plm.generate(prompt, images=several, max_new_tokens=4).text
            for prompt, several in zip(prompts, [[squares[0]], list(squares[1:]), []], strict=True)
        ]
    assert list(found["answer"]) == expected
    images[1] = b"no image"
    found = Answer("demo:plm", images="image", request=request, skip_errors=True, threads=1)(batch)
    assert list(found["answer"]) == [expected[0], "", expected[2]]
    assert found["error"][1] and not found["error"][0]


def test_bad_arguments_are_named(squares: np.ndarray) -> None:
    with pytest.raises(prt.InputError, match="kind"):
        Embed("demo:pe", "image", kind="sound")
    with pytest.raises(prt.InputError, match="'picture'; it has image"):
        Embed("demo:pe", "picture", threads=1)({"image": squares})
    with pytest.raises(prt.InputError, match="batch_format"):
        Embed("demo:pe", "picture", threads=1)(squares)


def test_columns_are_not_replaced(squares: np.ndarray) -> None:
    with pytest.raises(prt.InputError, match="'image' already: choose another by output"):
        Embed("demo:pe", "image", output="image", threads=1)({"image": squares})
    batch = {"image": squares, "error": np.arange(3)}
    assert "embedding" in Embed("demo:pe", "image", threads=1)(batch)
    with pytest.raises(prt.InputError, match=r"'error' already.*rename it"):
        Embed("demo:pe", "image", skip_errors=True, threads=1)(batch)


def test_unknown_arguments_are_named_before_anything_is_loaded() -> None:
    with pytest.raises(prt.InputError, match=r"Embed has no 'thread'; known are .*threads"):
        Embed("nowhere", "image", thread=1)
    with pytest.raises(prt.InputError, match="Answer has no 'thread'"):
        Answer("nowhere", thread=1)
    for name in ("max_tokens", "prompt", "images"):
        with pytest.raises(prt.InputError, match=f"request has no '{name}'; .*max_new_tokens"):
            Answer("nowhere", request={name: 3})
    with pytest.raises(prt.InputError, match="request must be a dict of fields"):
        Answer("nowhere", request=[3])
    for load, message in (
        ({"kv_bytes": 1}, "load has no 'kv_bytes'; known are .*threads"),
        ({"threads": 0}, "threads must be an integer of at least 1, not 0"),
        ([1], "load must be a dict"),
    ):
        with pytest.raises(prt.InputError, match=message):
            embed_sources("nowhere", Sources(texts=("a",)), "rows", load=load)


def test_a_package_of_the_other_family_is_refused() -> None:
    with pytest.raises(prt.InputError, match="PLM-Demo is a language model"):
        Embed("demo:plm", "image")
    with pytest.raises(prt.InputError, match="PE-Demo is an encoder"):
        Answer("demo:pe")


def test_without_ray_the_error_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(prt.BackendError, match=r'pip install "perception_rt\[ray\]"'):
        with connected("local"):
            pass
    with pytest.raises(prt.BackendError, match="perception_rt"):
        build_app({"packages": ["demo:pe"]})
    out = tmp_path / "rows"
    assert main(["embed", "demo:pe", "--text", "a", "--out", str(out), "--ray"]) == 2
    assert 'pip install "perception_rt[ray]"' in capsys.readouterr().err
    assert not out.exists()


def test_ray_needs_an_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["embed", "demo:pe", "--text", "a", "--ray"]) == 2
    assert "--ray needs --out" in capsys.readouterr().err
