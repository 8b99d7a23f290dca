"""Images of every mode are resized as the reference resizes them; transparency and formats."""

import io
import re
import struct
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, exif_block, picture, png_chunk, png_file
from PIL import Image

from perception_rt.errors import BackendError, InputError
from perception_rt.limits import Limits
from perception_rt.processing.image import (
    ImageSpec,
    decode_image,
    load_image,
    normalize,
    open_image,
    resize_image,
)
from perception_rt.processing.image_loader import load_images
from perception_rt.processing.image_options import FORMATS_ON_REQUEST, ImageOptions, image_options
from perception_rt.processing.tiles import TileSpec, load_tiles

GOLDEN = Path(__file__).parents[1] / "golden" / "pe_modes.npz"
ICON = Path(__file__).parent / "files" / "icon_alpha_o.png"
NAMES = (
    "rgba", "rgba_soft", "palette", "palette_transparent", "one_bit", "grey_alpha", "grey", "cmyk",
)  # fmt: skip
SPEC = ImageSpec(height=14, width=14, rgb_conversion="after_resize")
WHITE = image_options(background="white")


def test_all_modes_of_the_reference_are_here():
    with np.load(GOLDEN) as golden:
        assert {name.partition("/")[0] for name in golden.files} == set(NAMES)


@pytest.mark.parametrize("resize", ["squash", "center_crop"])
@pytest.mark.parametrize("name", NAMES)
def test_modes_equal_the_reference(name, resize):
    with np.load(GOLDEN) as golden:
        data, expected = golden[f"{name}/file"].tobytes(), golden[f"{name}/{resize}"]
    height, width = expected.shape[-2:]
    spec = ImageSpec(height=height, width=width, resize=resize, rgb_conversion="after_resize")
    actual = normalize(load_image(data, spec), spec)
    assert np.abs(actual - expected).max() <= 1e-5
    opened = load_image(Image.open(io.BytesIO(data)), spec)
    assert np.array_equal(normalize(opened, spec), actual)
    (loaded,) = load_images([data], spec, workers=1, ahead=1)
    assert np.array_equal(normalize(loaded, spec), actual)


def test_a_spec_without_the_field_converts_first():
    old = ImageSpec.from_dict({"height": 14, "width": 14})
    assert (old.rgb_conversion, old.exif_orientation) == ("before_resize", True)
    with np.load(GOLDEN) as golden:
        data = golden["palette/file"].tobytes()
    expected = resize_image(decode_image(data), SPEC)
    assert np.array_equal(load_image(data, old), expected)
    assert not np.array_equal(load_image(data, SPEC), expected)


def mode_of(mode):
    if mode.startswith("I;16"):
        order = ">" if mode.endswith("B") else "<"
        levels = (np.asarray(picture().convert("L")) * np.uint16(256)).astype(f"{order}u2")
        return Image.frombytes(mode, (40, 30), levels.tobytes())
    if mode == "PA":
        return picture().convert("RGBA").convert("PA")
    return picture().convert("RGBA").convert(mode) if "a" in mode else picture().convert(mode)


@pytest.mark.parametrize(
    "mode",
    ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "RGBa", "CMYK", "YCbCr", "HSV", "LAB",
     "I;16", "I;16B"],
)  # fmt: skip
@pytest.mark.parametrize("resize", ["squash", "center_crop"])
def test_every_mode_can_be_resized(mode, resize):
    image = mode_of(mode)
    for when in ("before_resize", "after_resize"):
        spec = ImageSpec(height=30, width=40, resize=resize, rgb_conversion=when)
        same = resize_image(image, spec)
        assert same.shape == (30, 40, 3)
        assert np.abs(same.astype(int) - np.asarray(decode_image(image)).astype(int)).max() <= 3
        small = load_image(image, ImageSpec(height=15, width=20, rgb_conversion=when))
        assert small.shape == (15, 20, 3)
        assert small[:3, :3].min() > 240  # the white corner
        if mode not in ("1", "P"):
            assert small[6:, 6:].max() < 170


def test_a_mode_without_a_meaning_is_named():
    with pytest.raises(InputError, match="mode F; convert it to RGB first"):
        resize_image(Image.new("F", (4, 4)), SPEC)


def test_exif_orientation_is_a_choice_of_the_spec():
    data = encode(picture(), "PNG", exif=exif_block(6))
    stored = ImageSpec(height=30, width=40, exif_orientation=False)
    assert np.array_equal(load_image(data, stored), np.asarray(picture()))
    turned = ImageSpec(height=40, width=30)
    assert np.array_equal(load_image(data, turned), np.rot90(np.asarray(picture()), -1))
    tiles = TileSpec(tile_size=28, exif_orientation=False)
    assert np.array_equal(load_tiles(data, tiles), load_tiles(picture(), tiles))
    assert not np.array_equal(load_tiles(data, TileSpec(tile_size=28)), load_tiles(data, tiles))
    with pytest.raises(InputError, match=r"image\.exif_orientation"):
        ImageSpec(height=1, width=1, exif_orientation=1)
    with pytest.raises(InputError, match=r"image\.rgb_conversion"):
        ImageSpec(height=1, width=1, rgb_conversion="never")


# Transparency


def test_an_icon_is_seen_over_a_background():
    assert load_image(ICON, SPEC).max() == 0  # black, whatever its shape
    shown = load_image(ICON, SPEC, options=WHITE)
    assert shown.max() == 255
    assert shown.min() < 40
    assert np.array_equal(shown, load_image(Image.open(ICON), SPEC, options=WHITE))
    tiles = load_tiles(ICON, TileSpec(tile_size=14, max_tiles=1), options=WHITE)
    assert tiles.max() == 255
    (loaded,) = load_images([ICON], SPEC, workers=1, ahead=1, options=WHITE)
    assert np.array_equal(loaded, shown)


def clear_left_half(kind):
    """A black picture whose left half is transparent, as the bytes of a PNG."""
    alpha = np.full((8, 8), 255, np.uint8)
    alpha[:, :4] = 0
    rgba = np.zeros((8, 8, 4), np.uint8)
    rgba[..., 3] = alpha
    image = Image.fromarray(rgba)
    if kind == "RGBA":
        return encode(image, "PNG")
    if kind == "LA":
        return encode(image.convert("LA"), "PNG")
    levels = (alpha == 0).astype(np.uint8)  # 1 is clear, 0 is black
    if kind.startswith("P"):
        palette = Image.fromarray(levels)
        palette.putpalette([0, 0, 0, 9, 9, 9])
        return encode(palette, "PNG", transparency=1 if kind == "P" else bytes([255, 0]))
    if kind == "L":
        return encode(Image.fromarray(levels), "PNG", transparency=1)
    if kind == "RGB":
        return encode(Image.fromarray(levels).convert("RGB"), "PNG", transparency=(1, 1, 1))
    rows = b"".join(b"\0" + struct.pack(">8H", *row) for row in levels.astype(int) * 7)
    data = png_file(8, 8, rows, depth=16, colour=0)
    return data[:33] + png_chunk(b"tRNS", struct.pack(">H", 7)) + data[33:]


@pytest.mark.parametrize("kind", ["RGBA", "LA", "P", "P bytes", "L", "RGB", "I;16"])
def test_every_kind_of_transparency_shows_the_background(kind):
    data = clear_left_half(kind)
    for source in (data, Image.open(io.BytesIO(data))):
        pixels = np.asarray(decode_image(source, options=image_options(background="#102030")))
        assert pixels[:, :4].tolist() == [[[16, 32, 48]] * 4] * 8
        assert pixels[:, 4:].max() == 0
        assert decode_image(source).getpixel((0, 0)) in ((0, 0, 0), (1, 1, 1), (9, 9, 9))


def test_a_background_changes_no_opaque_image():
    for mode in ("RGB", "P", "L", "CMYK", "1"):
        image = mode_of(mode)
        assert open_image(image, options=WHITE).mode == mode
        assert np.array_equal(decode_image(image, options=WHITE), decode_image(image))


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("white", (255, 255, 255)),
        ("#0f0", (0, 255, 0)),
        ("#102030ff", (16, 32, 48)),
        ((1, 2, 3), (1, 2, 3)),
        ([0, 0, 255], (0, 0, 255)),
    ],
)
def test_colours(value, expected):
    assert image_options(background=value).background == expected


@pytest.mark.parametrize(
    "value", ["no such", "", "#10203040", (1, 2), (1, 2, 300), (1.0, 2, 3), 7, b"abc", (True, 0, 0)]
)
def test_other_colours_are_refused(value):
    with pytest.raises(InputError, match="background must be an opaque colour such as 'white'"):
        image_options(background=value)


# Formats


def file_of(kind):
    return encode(
        picture(),
        kind.upper(),
        **({"quality": 100, "subsampling": "4:4:4"} if kind == "avif" else {}),
    )


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "avif"])
def test_formats_on_request(kind, tmp_path):
    path = tmp_path / "picture"
    path.write_bytes(file_of(kind))
    message = f"is a {kind.upper()} image, which is accepted on request only: formats=['{kind}'], "
    for source in (path, path.read_bytes()):
        with pytest.raises(InputError, match="accepted on request only") as caught:
            decode_image(source)
        assert message + f"or --formats {kind} on the command line" in str(caught.value)
        image = decode_image(source, options=image_options([kind]))
        assert image.size == (40, 30)
        far = np.abs(np.asarray(image).astype(int) - np.asarray(picture()).astype(int))
        assert far.mean() < (30 if kind == "gif" else 6)
    with pytest.raises(InputError, match="accepted on request only"):
        decode_image(path, options=image_options(set(FORMATS_ON_REQUEST) - {kind}))


@pytest.mark.parametrize("kind", ["gif", "bmp", "tiff", "avif"])
def test_files_on_request_have_limits_and_errors(kind):
    options, data = image_options(FORMATS_ON_REQUEST), file_of(kind)
    with pytest.raises(InputError, match="1200 pixels; the limit is 1199"):
        decode_image(data, limits=Limits(image_pixels=1199), options=options)
    with pytest.raises(InputError, match="the limit is 39 pixels a side"):
        decode_image(data, limits=Limits(image_side_px=39), options=options)
    with pytest.raises(InputError, match=f"is a damaged {kind.upper()} image"):
        decode_image(data[: len(data) // 3], options=options)


def test_an_animation_gives_its_first_frame():
    others = [Image.new("RGB", (40, 30), (0, 0, i)) for i in range(3)]
    for kind in ("GIF", "TIFF", "AVIF"):
        data = encode(picture(), kind, save_all=True, append_images=others)
        first = decode_image(data, options=image_options([kind]))
        assert first.getpixel((3, 3))[0] > 240


@pytest.mark.parametrize("kind", ["tiff", "avif"])
def test_orientation_of_formats_on_request(kind):
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(picture(), kind.upper(), exif=exif)
    image = decode_image(data, options=image_options([kind]))
    assert image.size == (30, 40)
    assert image.getpixel((26, 3))[0] > 200  # the white corner, turned clockwise
    assert decode_image(image).size == (30, 40)  # not turned again


def test_gif_transparency_and_16_bit_tiff():
    image = Image.fromarray(np.eye(8, dtype=np.uint8))
    image.putpalette([0, 0, 0, 9, 9, 9])
    data = encode(image, "GIF", transparency=1)
    shown = decode_image(data, options=image_options("gif", "white"))
    assert shown.getpixel((0, 0)) == (255, 255, 255)
    assert shown.getpixel((1, 0)) == (0, 0, 0)
    levels = np.full((4, 4), 0x8000, np.uint16)
    deep = decode_image(encode(Image.fromarray(levels), "TIFF"), options=image_options("tiff"))
    assert deep.getpixel((0, 0)) == (128, 128, 128)


def test_names_of_formats():
    assert image_options("gif, TIF").formats == {"gif", "tiff"}
    assert image_options(["JPG", "png"]).formats == set()
    assert image_options("").formats == set()
    for bad in ("webm", ["gif", 3], 7):
        with pytest.raises(InputError, match="formats must be"):
            image_options(bad)


def test_heic_needs_its_library(monkeypatch):
    header = struct.pack(">I4s4sI4s4s", 24, b"ftyp", b"heic", 0, b"mif1", b"heic")
    with pytest.raises(InputError, match="is a HEIC image, which is accepted on request only"):
        decode_image(header)
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    for action in (
        lambda: image_options("gif,heic"),
        lambda: decode_image(header, options=ImageOptions(formats=frozenset({"heic"}))),
    ):
        with pytest.raises(BackendError, match=r'pip install "perception_rt\[heic\]"'):
            action()
    assert image_options("gif").formats == {"gif"}


def test_heic():
    pytest.importorskip("pillow_heif")
    data = (Path(__file__).parent / "files" / "turned.heic").read_bytes()
    options = image_options(["HEIF"])
    assert options.formats == {"heic"}
    image = decode_image(data, options=options)
    assert image.size == (48, 64)  # stored as 64x48
    assert np.abs(np.subtract(image.getpixel((42, 5)), 255)).max() < 12  # the white corner
    assert np.abs(np.subtract(image.getpixel((10, 40)), (30, 60, 90))).max() < 12
    with pytest.raises(InputError, match="48x64 = 3072 pixels; the limit is 3071"):
        decode_image(data, limits=Limits(image_pixels=3071), options=options)
    for end in (40, len(data) // 2):
        with pytest.raises(InputError, match="is a damaged HEIC image"):
            decode_image(data[:end], options=options)


@pytest.mark.parametrize("kind", ["gif", "bmp", "avif"])  # libtiff writes to standard error
def test_damaged_files_on_request_raise_nothing_else(kind):
    rng, seed = np.random.default_rng(0), file_of(kind)
    options, limits = image_options(kind, "white"), Limits(image_pixels=2**20)
    outcomes = {True: 0, False: 0}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for i in range(400):
            data = bytearray(seed)
            for _ in range(rng.integers(1, 8)):
                at = int(rng.integers(0, min(len(data), 300) if i % 2 else len(data)))
                data[at] = int(rng.integers(0, 256))
            try:
                image = decode_image(bytes(data), options=options, limits=limits)
                outcomes[image.mode == "RGB"] += 1
            except InputError as error:
                assert not re.search(r"(?<!\d)0x[0-9a-f]{4,}", str(error))
                outcomes[False] += 1
    assert min(outcomes.values()) > 20
