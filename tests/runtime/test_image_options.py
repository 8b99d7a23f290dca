"""`formats=` and `background=` of `load`, for both families; frames of changing size."""

import io
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import perception_rt as prt
from perception_rt.cli import main
from perception_rt.errors import BackendError, InputError
from perception_rt.processing.image import decode_image
from perception_rt.processing.image_options import image_options
from perception_rt.processing.video import decode_frames

FILES = Path(__file__).parents[1] / "processing" / "files"
PACKAGES = Path(__file__).parents[1] / "compatibility" / "packages"
ICON = FILES / "icon_alpha_o.png"


def encoded(kind: str, mode: str = "RGB") -> bytes:
    y, x = np.mgrid[:40, :50].astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(np.stack([3 * x, 5 * y, x + y], axis=-1)).convert(mode).save(file, kind)
    return file.getvalue()


def test_an_encoder_with_formats_and_a_background() -> None:
    gif = encoded("GIF")
    with prt.load(PACKAGES / "pe") as plain:
        assert isinstance(plain, prt.Embedder)
        with pytest.raises(InputError, match=r"image 0: .* accepted on request only"):
            plain.embed_images([gif])
        shown = decode_image(ICON, options=image_options(background="white"))
        expected = plain.embed_images([decode_image(gif, options=image_options("gif")), shown])
        dropped = plain.embed_images([ICON])
    with prt.Embedder.load(PACKAGES / "pe", formats=["gif"], background="white") as found:
        for workers in (1, 2):
            rows = found.embed_images([gif, ICON], workers=workers)
            assert np.allclose(rows, expected, atol=1e-6)
    assert not np.allclose(dropped[0], expected[1], atol=1e-3)


def test_a_language_model_with_formats_and_a_background() -> None:
    def logprobs(model: Any, source: Any) -> Any:
        return model.score("What is it?", "It", images=[source]).logprobs

    gif = encoded("GIF")
    with prt.load(PACKAGES / "plm") as plain:
        with pytest.raises(InputError, match="accepted on request only"):
            logprobs(plain, gif)
        shown = decode_image(ICON, options=image_options(background=(255, 255, 255)))
        expected = logprobs(plain, shown)
        assert not np.allclose(expected, logprobs(plain, ICON))
    with prt.Generator.load(PACKAGES / "plm", formats="gif,bmp", background="#fff") as found:
        assert np.allclose(logprobs(found, ICON), expected, atol=1e-6)
        assert np.isfinite(logprobs(found, gif)).all()


@pytest.mark.parametrize("name", ["pe", "plm"])
def test_bad_options_are_found_first(name: str) -> None:
    with pytest.raises(InputError, match="background must be an opaque colour"):
        prt.load(PACKAGES / name, background="no such")
    with pytest.raises(InputError, match="formats must be of"):
        prt.load(PACKAGES / name, formats=["svg"])


@pytest.mark.parametrize("name", ["pe", "plm"])
def test_a_format_without_its_library_is_found_at_load(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    with pytest.raises(BackendError, match=r'pip install "perception_rt\[heic\]"'):
        prt.load(PACKAGES / name, formats=["heic"])


@pytest.mark.parametrize("mode", ["P", "1"])
def test_an_old_package_converts_images_first(mode: str) -> None:
    data = encoded("PNG", mode)
    with prt.Embedder.load(PACKAGES / "pe") as embedder:
        assert embedder.image_spec.rgb_conversion == "before_resize"
        assert np.array_equal(
            embedder.embed_images([data]), embedder.embed_images([decode_image(data)])
        )


def test_frames_of_changing_size_are_embedded_from_their_own() -> None:
    pytest.importorskip("av")
    path = FILES / "webrtc.webm"
    with prt.Embedder.load(PACKAGES / "pe") as embedder:
        (row,) = embedder.embed_videos([path], num_frames=6)
        mean = embedder.embed_images(decode_frames(path, num_frames=6)).mean(axis=0)
    assert np.allclose(row, mean / np.linalg.norm(mean), atol=1e-6)


def test_the_commands_take_both(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gif = tmp_path / "picture.gif"
    gif.write_bytes(encoded("GIF"))
    command = ["embed", str(PACKAGES / "pe"), "--json", "--image", str(gif), str(ICON)]
    assert main(command) == 2
    assert "--formats gif on the command line" in capsys.readouterr().err
    assert main([*command, "--formats", "gif,tiff", "--background", "white"]) == 0
    found = np.array(json.loads(capsys.readouterr().out)["embeddings"])
    with prt.Embedder.load(PACKAGES / "pe", formats=["gif"], background="white") as embedder:
        assert np.allclose(found, embedder.embed_images([gif, ICON]), atol=1e-6)
    assert main([*command, "--formats", "gif", "--background", "no such"]) == 2
    assert "background must be" in capsys.readouterr().err


def test_chat_takes_both(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    gif = tmp_path / "picture.gif"
    gif.write_bytes(encoded("GIF"))
    chat = ["chat", str(PACKAGES / "plm"), "--max-new-tokens", "1", "--max-tiles", "0"]
    for options, wanted in (([], "accepted on request only"), (["--formats", "gif"], "")):
        monkeypatch.setattr("sys.stdin", io.StringIO(f"/image {gif}\nWhat is it?\n"))
        assert main([*chat, *options]) == 0
        error = capsys.readouterr().err
        assert (wanted in error) if wanted else ("request only" not in error)
