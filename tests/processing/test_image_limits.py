"""Hostile images give a documented result or an InputError, quickly and without warnings."""

import os
import re
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import numpy as np
import pytest
from corpus import corpus, encode, jpeg_with_size, picture, png_file, webp_lossless_header
from PIL import Image

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.image import ImageSpec, decode_image, load_image

CASES = corpus()
ADDRESS_OR_PATH = re.compile(r"(?<!\d)0x[0-9a-fA-F]{4,}|object at|(?<!\w)/\w+/|Traceback|PIL")


def message_of(source, limits=DEFAULT_LIMITS):
    with pytest.raises(InputError) as caught:
        decode_image(source, limits=limits)
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__ or caught.value.__context__ is None
    return str(caught.value)


def test_corpus_is_large_enough():
    assert len(CASES) >= 120
    assert sum(case.name.startswith("format ") for case in CASES) >= 15


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_corpus(case):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        start = time.perf_counter()
        if case.size is None:
            message = message_of(case.data)
            assert not ADDRESS_OR_PATH.search(message)
            assert len(message) < 200
        else:
            image = decode_image(case.data)
            assert image.mode == "RGB"
            assert image.size == case.size
        assert time.perf_counter() - start < 2


def test_pillow_settings_are_untouched():
    assert Image.MAX_IMAGE_PIXELS == 89_478_485
    side = 12_000  # above the limit for Pillow's warning, below ours
    data = png_file(side, side, (b"\0" + bytes(side // 8)) * side, depth=1, colour=0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        message = message_of(data, Limits(image_pixels=side * side - 1))
        assert decode_image(data, limits=Limits(image_pixels=side * side)).size == (side, side)
    assert "144000000 pixels" in message


BOMBS = {
    "png": png_file(30_000, 30_000, (b"\0" + bytes(3750)) * 30_000, depth=1, colour=0),
    "jpeg": jpeg_with_size(encode(picture(), "JPEG"), 65_500, 65_500),
    "webp": webp_lossless_header(16_383, 16_383),
    "webp extended": b"RIFF\x1e\0\0\0WEBPVP8X\x0a\0\0\0\x10\0\0\0" + b"\xff" * 6 + bytes(8),
    "png wide": png_file(65_535, 1, bytes(65_536 * 3)),
    "png tall": png_file(1, 65_535, bytes(4 * 65_535)),
}


# In a child process, since the peak of memory never goes down.
PROBE = """
import resource, sys, time
from perception_rt.errors import InputError
from perception_rt.processing.image import decode_image

def peak():
    value = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return value if sys.platform == "darwin" else value * 1024

small, *hostile = sys.argv[1:]
decode_image(small)
before = peak()
for path in hostile:
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        try:
            decode_image(path)
        except InputError as error:
            assert "the limit is" in str(error), error
        else:
            raise SystemExit(path + " was accepted")
        seconds.append(time.perf_counter() - start)
    print(min(seconds), peak() - before, path)
"""


def test_bombs_are_refused_by_their_header(tmp_path):
    pytest.importorskip("resource")
    files = {"small": encode(picture(), "WEBP"), **BOMBS}
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with (tmp_path / "larger than the limit").open("wb") as file:
        file.truncate(DEFAULT_LIMITS.image_bytes + 1)  # sparse
    command = [sys.executable, "-c", PROBE, *files, "larger than the limit"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert len(lines) == len(BOMBS) + 1
    for line in lines:
        seconds, growth, _ = line.split(" ", 2)
        assert float(seconds) < 0.02, line
        assert int(growth) < 16 * 2**20, line


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2), (13, 13), (1, 32_768)])
def test_odd_geometry_is_accepted(size):
    spec = ImageSpec(height=14, width=14)
    width, height = size
    array = np.full((height, width, 3), (10, 20, 30), np.uint8)
    expected = np.broadcast_to(np.array([10, 20, 30], np.uint8), (14, 14, 3))
    assert np.array_equal(load_image(array, spec), expected)
    assert np.array_equal(load_image(encode(Image.fromarray(array), "PNG"), spec), expected)


@pytest.mark.parametrize("strides", [(-1, 1, 1), (1, -1, 1), (1, 1, -1), (2, 3, 1)])
def test_strides_do_not_matter(strides):
    pixels = np.random.default_rng(0).integers(0, 256, (12, 18, 3), np.uint8)
    view = pixels[:: strides[0], :: strides[1], :: strides[2]]
    assert np.array_equal(np.asarray(decode_image(view)), view.copy())
    fortran = np.asfortranarray(pixels)
    assert np.array_equal(np.asarray(decode_image(fortran)), pixels)


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 1), np.uint8),
        np.zeros((1, 8, 8, 3), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.full((8, 8, 3), np.nan),
        np.zeros((8, 8, 3), np.int16),
        np.zeros((8, 8, 3), bool),
        np.zeros((8, 8, 3), object),
    ],
    ids=lambda array: f"{array.dtype}{array.shape}",
)
def test_other_arrays_are_named(array):
    message = message_of(array)
    assert str(array.dtype) in message
    assert str(array.shape) in message


@pytest.mark.parametrize("shape", [(0, 8, 3), (8, 0, 3), (0, 0, 3)])
def test_empty_arrays_are_refused(shape):
    assert "empty" in message_of(np.zeros(shape, np.uint8))


def test_a_pixel_is_not_three_rows():
    assert decode_image(np.zeros((1, 1, 3), np.uint8)).size == (1, 1)


@pytest.mark.parametrize("source", [None, 3, 1.5, [1], bytearray(b"x"), object(), type])
def test_other_types_are_named(source):
    assert not ADDRESS_OR_PATH.search(message_of(source))


@pytest.mark.parametrize("mode", ["F", "I"])
def test_pillow_modes_without_a_meaning_are_named(mode):
    assert mode in message_of(Image.new(mode, (4, 4)))


def test_a_damaged_pillow_image_is_an_input_error(tmp_path):
    path = tmp_path / "cut.png"
    data = encode(picture(), "PNG")
    path.write_bytes(data[: len(data) // 2])
    assert message_of(Image.open(path)) == "Pillow image cannot be decoded"


def test_paths_are_named_as_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert message_of("no such.png") == "image 'no such.png' cannot be read: " + os.strerror(2)
    assert message_of(Path("a/b.png")).startswith("image 'a/b.png' cannot be read")
    Path("x.png").write_bytes(b"nothing")
    assert message_of("x.png") == "image 'x.png' is not a JPEG, PNG or WebP image"
    Path("cut.jpg").write_bytes(encode(picture(), "JPEG")[:-50])
    assert message_of("cut.jpg") == "image 'cut.jpg' is a damaged JPEG image"
    assert "not a path" in message_of("nul\0.png")
    assert "cannot be read" in message_of("")
    assert len(message_of("x" * 5000)) < 300


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs POSIX")
def test_only_regular_files_are_opened(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", tmp_path, "/dev/zero", "/dev/null"):
        start = time.perf_counter()
        assert "is not a regular file" in message_of(path)
        assert time.perf_counter() - start < 1
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    assert "cannot be read" in message_of(tmp_path / "link")


def test_mutated_files_raise_nothing_else():
    rng = np.random.default_rng(0)
    seeds = [encode(picture(), kind) for kind in ("JPEG", "PNG", "WEBP")]
    seeds.append(encode(picture(), "JPEG", progressive=True, exif=b"Exif\0\0MM\0*"))
    outcomes = {True: 0, False: 0}
    limits = Limits(image_pixels=2**20)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(8_000):
            data = bytearray(seeds[i % len(seeds)])
            for _ in range(rng.integers(1, 8)):
                at = int(rng.integers(0, min(len(data), 700 if i % 2 else len(data))))
                data[at] = int(rng.integers(0, 256))
            try:
                outcomes[decode_image(bytes(data), limits=limits).mode == "RGB"] += 1
            except InputError as error:
                assert not ADDRESS_OR_PATH.search(str(error))
                outcomes[False] += 1
    assert min(outcomes.values()) > 800


def test_exif_is_read_within_its_bounds():
    for count, offset in ((65_535, 8), (1, 2**31), (1, 2**32 - 1), (0, 8)):
        exif = b"Exif\0\0II*\0" + struct.pack("<IH", offset, count)
        assert decode_image(encode(picture(), "JPEG", exif=exif)).size == (40, 30)
