"""Preprocessing equals the reference, and every kind of source gives the same pixels."""

import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, exif_block, picture
from PIL import Image, ImageOps
from safetensors import safe_open

from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.processing.image import (
    ImageSpec,
    decode_image,
    load_image,
    normalize,
    resize_image,
)

GOLDEN = Path(__file__).parents[1] / "golden" / "preprocess.safetensors"
SPEC = ImageSpec(height=28, width=28)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_equals_the_reference(index, resize):
    with safe_open(GOLDEN, "numpy") as file:
        case = json.loads(file.metadata()["cases"])[index]
        source = file.get_tensor(f"{index}.image")
        expected = file.get_tensor(f"{index}.pe_{resize}")
    spec = ImageSpec(height=case["tile_size"], width=case["tile_size"], resize=resize)
    actual = normalize(load_image(source, spec), spec)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= 1e-5


def test_center_crop_covers_any_target():
    for height, width in ((28, 28), (14, 56), (56, 14), (1, 1), (30, 40), (17, 5)):
        spec = ImageSpec(height=height, width=width, resize="center_crop")
        for size in ((40, 30), (30, 40), (1, 1), (13, 13), (3, 1), (100, 7)):
            assert resize_image(Image.new("RGB", size), spec).shape == (height, width, 3)


def test_center_crop_takes_the_center():
    pixels = np.zeros((10, 30, 3), np.uint8)
    pixels[:, 10:20] = 200
    spec = ImageSpec(height=10, width=10, resize="center_crop")
    assert np.array_equal(load_image(pixels, spec), np.full((10, 10, 3), 200, np.uint8))


def test_center_crop_refuses_what_would_be_resized_to_gigabytes():
    spec = ImageSpec(height=448, width=448, resize="center_crop")
    with pytest.raises(InputError, match="30000x1 is more than 64 times"):
        resize_image(Image.new("RGB", (30000, 1)), spec)


def test_normalize_is_to_tensor_and_normalize():
    pixels = np.arange(256 * 3, dtype=np.uint32).reshape(1, 16, 16, 3).astype(np.uint8)
    spec = ImageSpec(height=16, width=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
    actual = normalize(pixels, spec)
    assert actual.dtype == np.float32
    assert actual.flags.c_contiguous
    for channel, (mean, std) in enumerate(zip(spec.mean, spec.std, strict=True)):
        unit = pixels[..., channel].astype(np.float32) / np.float32(255)
        expected = (unit - np.float32(mean)) / np.float32(std)
        assert np.array_equal(actual[:, channel], expected)
    with pytest.raises(InputError, match="float32"):
        normalize(pixels.astype(np.float32), spec)


def test_every_kind_of_source_gives_the_same_pixels(tmp_path):
    exif = b"Exif\0\0" + exif_block(6)
    for index, (image, kind) in enumerate(
        [
            (picture(), "PNG"),
            (picture(), "JPEG"),
            (picture(), "WEBP"),
            (picture().convert("CMYK"), "JPEG"),
            (picture().convert("P"), "PNG"),
            (picture().convert("LA"), "PNG"),
        ]
    ):
        path = tmp_path / f"{index}.img"
        path.write_bytes(encode(image, kind, exif=exif))
        opened = Image.open(path)
        sources = [path, str(path), path.read_bytes(), opened, np.asarray(decode_image(path))]
        pixels = [load_image(source, SPEC) for source in sources]
        assert all(np.array_equal(pixels[0], other) for other in pixels[1:])
        assert decode_image(path).size == (30, 40)


def test_a_memory_mapped_array_is_an_array(tmp_path):
    pixels = np.asarray(picture())
    mapped = np.memmap(tmp_path / "pixels", np.uint8, "w+", shape=pixels.shape)
    mapped[:] = pixels
    assert np.array_equal(load_image(mapped, SPEC), load_image(pixels, SPEC))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_as_pillow_does(orientation):
    data = encode(picture(), "PNG", exif=exif_block(orientation))
    with Image.open(io.BytesIO(data)) as image:
        expected = np.asarray(ImageOps.exif_transpose(image))
    assert np.array_equal(np.asarray(decode_image(data)), expected)


def test_alpha_is_dropped_and_colour_kept():
    rgba = np.dstack([np.asarray(picture()), np.zeros((30, 40), np.uint8)])
    data = encode(Image.fromarray(rgba), "PNG")
    assert np.array_equal(np.asarray(decode_image(data)), np.asarray(picture()))


def test_16_bit_grey_is_scaled_not_clipped():
    levels = np.array([[0, 255, 256, 32768, 65535]], np.uint16)
    data = encode(Image.fromarray(levels), "PNG")
    assert np.asarray(decode_image(data))[0, :, 0].tolist() == [0, 0, 1, 128, 255]


def test_a_pillow_image_is_left_as_it_was():
    image = picture().convert("P")
    image.info["transparency"] = b"\0" * 256
    decode_image(image)
    assert image.mode == "P"
    assert image.info == {"transparency": b"\0" * 256}
    rgb = picture()
    decode_image(rgb).putpixel((0, 0), (1, 2, 3))
    assert rgb.getpixel((0, 0)) == (255, 255, 255)


def test_limits_are_inclusive():
    limits = Limits(image_pixels=1200, image_side_px=40)
    assert decode_image(picture(), limits=limits).size == (40, 30)
    with pytest.raises(InputError, match="1199"):
        decode_image(picture(), limits=Limits(image_pixels=1199))
    with pytest.raises(InputError, match="39 pixels a side"):
        decode_image(picture(), limits=Limits(image_side_px=39))
    data = encode(picture(), "PNG")
    assert decode_image(data, limits=Limits(image_bytes=len(data))).size == (40, 30)
    with pytest.raises(InputError, match=f"has {len(data)} bytes"):
        decode_image(data, limits=Limits(image_bytes=len(data) - 1))


def test_spec_round_trip():
    spec = ImageSpec(
        height=3, width=4, resize="center_crop", interpolation="bicubic", mean=(0, 0.5, 1)
    )
    plain = json.loads(json.dumps(spec.to_dict()))
    assert ImageSpec.from_dict(plain) == spec
    assert spec.mean == (0.0, 0.5, 1.0)
    assert hash(ImageSpec.from_dict(plain)) == hash(spec)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"heigth": 3}, "heigth"),
        ({"height": None}, "image.height"),
        ({"height": 0}, "image.height"),
        ({"height": True}, "image.height"),
        ({"width": 2.0}, "image.width"),
        ({"width": 10**9}, "image.width"),
        ({"resize": "crop"}, "image.resize"),
        ({"resize": ["squash"]}, "image.resize"),
        ({"interpolation": "nearest"}, "image.interpolation"),
        ({"mean": [0.5, 0.5]}, "image.mean"),
        ({"mean": "0.5"}, "image.mean"),
        ({"mean": [0.5, 0.5, math.nan]}, "image.mean"),
        ({"std": [0.5, 0, 0.5]}, "image.std"),
        ({"std": [0.5, "1", 0.5]}, "image.std"),
    ],
)
def test_spec_is_strict(change, word):
    with pytest.raises(InputError, match=word):
        ImageSpec.from_dict(SPEC.to_dict() | change)


def test_spec_names_missing_keys():
    with pytest.raises(InputError, match="width"):
        ImageSpec.from_dict({"height": 3})
    with pytest.raises(InputError, match="object"):
        ImageSpec.from_dict([("height", 3)])
