"""Tiles equal the reference's at any image size, and never exceed the budget."""

import json
import math
import time
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from corpus import encode, exif_block, picture
from PIL import Image
from safetensors import safe_open

from perception_rt.errors import InputError
from perception_rt.limits import Limits
from perception_rt.processing import tiles
from perception_rt.processing.image import normalize
from perception_rt.processing.tiles import TileSpec, choose_canvas, load_tiles

GOLDEN = Path(__file__).parents[1] / "golden"
TILING = json.loads((GOLDEN / "tiling.json").read_text("utf-8"))
SPEC = TileSpec(tile_size=28)
HUGE = 10**3000


def noise(width, height, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


@cache
def canvases(max_tiles):
    """Canvases in the reference's order: by ratio, while the number of tiles decreases."""
    pairs = [
        (columns, tiles // columns)
        for tiles in range(max_tiles, 0, -1)
        for columns in range(1, tiles + 1)
        if tiles % columns == 0
    ]
    ratios = list(dict.fromkeys(Fraction(*pair) for pair in pairs))
    return sorted(pairs, key=lambda pair: ratios.index(Fraction(*pair)))


def enumerated_canvas(width, height, tile_size, max_tiles):
    """The rule as described, candidate by candidate."""

    def fitted_short_side(canvas):
        scale = min(canvas[0] * tile_size / width, canvas[1] * tile_size / height)
        if width > height:
            return math.floor(scale * width / (width / height))
        if width < height:
            return math.floor(scale * height * (width / height))
        return scale * height

    fitting = [
        (columns, rows)
        for columns, rows in canvases(max_tiles)
        if columns * tile_size >= width and rows * tile_size >= height
    ]
    if fitting:
        return max(reversed(fitting), key=fitted_short_side)
    own = Fraction(width, height)
    ratios = {Fraction(*canvas) for canvas in canvases(max_tiles)}
    if own >= 1:
        nearest = max(ratio for ratio in ratios if ratio <= own)
    else:
        nearest = min(ratio for ratio in ratios if ratio > own)
    return max(canvas for canvas in canvases(max_tiles) if Fraction(*canvas) == nearest)


@pytest.mark.parametrize("max_tiles", [1, 4, 9, 16, 36])
def test_canvas_equals_the_reference(max_tiles):
    cases = [case for case in TILING if case["max_num_tiles"] == max_tiles]
    assert len(cases) == 44
    for case in cases:
        canvas = choose_canvas(
            case["width"], case["height"], tile_size=case["tile_size"], max_tiles=max_tiles
        )
        assert canvas == (case["columns"], case["rows"]), case
        assert canvas[0] * canvas[1] + 1 == case["tiles_with_thumbnail"]


def test_canvas_of_10_000_sizes():
    """IMG-07: within the budget, and equal to the plain rule."""
    rng = np.random.default_rng(7)
    sides = np.exp(rng.uniform(0, np.log(32_768), (10_000, 2))).astype(int).tolist()
    for index, (width, height) in enumerate(sides):
        height = {0: width, 1: 2 * width, 2: 2 * width + 1}.get(index % 16, height)
        tile_size = (448, 336, 28, 1)[index % 4]
        max_tiles = 36 if index % 2 else 1 + index % 35
        canvas = choose_canvas(width, height, tile_size=tile_size, max_tiles=max_tiles)
        assert 1 <= canvas[0] * canvas[1] <= max_tiles
        assert canvas == enumerated_canvas(width, height, tile_size, max_tiles), (width, height)


@pytest.mark.parametrize(
    ("width", "height", "canvas"),
    [
        (224, 224, (6, 6)),
        (640, 480, (7, 5)),
        (1920, 1080, (8, 4)),
        (300, 800, (4, 9)),
        (4032, 3024, (4, 3)),
        (3000, 4000, (4, 5)),
        (1, 1, (6, 6)),
        (32_768, 1, (36, 1)),
        (1, 32_768, (1, 36)),
        (16_128, 448, (36, 1)),
        (16_129, 448, (36, 1)),
    ],
)
def test_canvas_of_known_sizes(width, height, canvas):
    assert choose_canvas(width, height, tile_size=448, max_tiles=36) == canvas


def test_the_table_is_made_once_per_budget(monkeypatch):
    tiles.canvases_by_ratio.cache_clear()
    for width in range(1, 200):
        choose_canvas(width, 2000, tile_size=448, max_tiles=36)
    assert tiles.canvases_by_ratio.cache_info().misses == 1
    assert sum(map(len, tiles.canvases_by_ratio(36).values())) == 140
    start = time.perf_counter()
    for width in range(1, 1000):
        choose_canvas(width, 700, tile_size=448, max_tiles=36)
    assert time.perf_counter() - start < 1


@pytest.mark.parametrize("name", ["width", "height", "tile_size", "max_tiles"])
@pytest.mark.parametrize(
    "value", [0, -1, 1.0, True, None, "8", HUGE, math.nan], ids=lambda v: f"{v!s:.9}"
)
def test_canvas_arguments_are_checked(name, value):
    sizes = {"width": 640, "height": 480, "tile_size": 448, "max_tiles": 36, name: value}
    with pytest.raises(InputError, match=f"{name} must be an integer from 1 to"):
        choose_canvas(sizes.pop("width"), sizes.pop("height"), **sizes)


@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("mode", ["vanilla", "thumb+tile"])
def test_pixels_equal_the_reference(index, mode):
    with safe_open(GOLDEN / "preprocess.safetensors", "numpy") as file:
        case = json.loads(file.metadata()["cases"])[index]
        source = file.get_tensor(f"{index}.image")
        expected = file.get_tensor(f"{index}.plm_{mode.replace('thumb+', 'thumb_')}")
    spec = TileSpec(tile_size=case["tile_size"], max_tiles=case["max_num_tiles"], mode=mode)
    actual = load_tiles(source, spec)
    assert actual.dtype == np.uint8
    assert actual.shape == (len(expected), case["tile_size"], case["tile_size"], 3)
    assert np.abs(normalize(actual, spec.tile) - expected).max() <= 1e-6
    # A budget of the request has the same effect.
    wider = TileSpec(tile_size=case["tile_size"], mode=mode)
    assert np.array_equal(actual, load_tiles(source, wider, max_tiles=case["max_num_tiles"]))


def test_tiles_go_row_by_row_after_the_thumbnail():
    source = np.repeat(np.repeat(np.arange(6, dtype=np.uint8).reshape(2, 3) * 40, 28, 0), 28, 1)
    source = np.stack([source] * 3, axis=-1)  # 3 columns, 2 rows
    result = load_tiles(source, TileSpec(tile_size=28, max_tiles=6))
    assert result.shape == (7, 28, 28, 3)
    assert result[1:, 14, 14, 0].tolist() == [0, 40, 80, 120, 160, 200]
    squashed = Image.fromarray(source).resize((28, 28), Image.Resampling.BICUBIC)
    assert np.array_equal(result[0], np.asarray(squashed))


def test_budget_of_the_request():
    source = noise(64, 48)
    thumbnail = load_tiles(source, TileSpec(tile_size=28, mode="vanilla"))
    assert thumbnail.shape == (1, 28, 28, 3)
    assert np.array_equal(load_tiles(source, SPEC, max_tiles=0), thumbnail)
    one = load_tiles(source, SPEC, max_tiles=1)  # as the reference: the thumbnail and its copy
    assert np.array_equal(one, np.concatenate([thumbnail, thumbnail]))
    counts = [len(load_tiles(source, SPEC, max_tiles=budget)) for budget in range(37)]
    assert all(count <= budget + 1 for budget, count in enumerate(counts))
    assert counts[-1] == len(load_tiles(source, SPEC)) == 36
    assert len(load_tiles(source, TileSpec(tile_size=28, mode="vanilla"), max_tiles=9)) == 1


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (37, "37"),
        (10_000_000, "10000000"),
        (-1, "-1"),
        (2**63, "9223372036854775808"),
        pytest.param(HUGE, "an integer of 9966 bits", id="huge"),
        (True, "True"),
        (4.0, "4.0"),
        (math.nan, "nan"),
        ("4", "a str"),
        (np.int64(37), "37"),
        (np.float64(4), "4.0"),
        ([4], "a list"),
    ],
)
def test_an_absurd_budget_is_named(value, shown):
    message = f"max_tiles must be an integer from 0 to 36, not {shown}"
    with pytest.raises(InputError) as caught:
        load_tiles(b"never read", SPEC, max_tiles=value)
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [(1, 1), (1, 3), (3, 1), (2, 2), (13, 13), (1, 9000), (9000, 1)])
def test_extreme_sizes_become_tiles(size):
    """IMG-03."""
    result = load_tiles(np.full((size[1], size[0], 3), 200, np.uint8), SPEC)
    assert len(result) <= 37
    assert np.array_equal(result, np.full((len(result), 28, 28, 3), 200, np.uint8))


def test_limits_and_bad_sources():
    image = noise(64, 48)
    exact = Limits(image_pixels=64 * 48, image_side_px=64)
    assert len(load_tiles(image, SPEC, limits=exact)) == 36
    for limits in (Limits(image_pixels=64 * 48 - 1), Limits(image_side_px=63)):
        with pytest.raises(InputError, match="the limit is"):
            load_tiles(image, SPEC, limits=limits)
    for source in (b"", b"not an image", image.astype(np.float32), image[..., :2], None, "no.png"):
        with pytest.raises(InputError):
            load_tiles(source, SPEC)


def test_every_kind_of_source_gives_the_same_tiles(tmp_path):
    data = encode(picture(), "JPEG", exif=b"Exif\0\0" + exif_block(6))
    path = tmp_path / "picture.jpg"
    path.write_bytes(data)
    upright = np.asarray(Image.open(path).transpose(Image.Transpose.ROTATE_270))
    assert upright.shape == (40, 30, 3)
    expected = load_tiles(upright, SPEC)
    for source in (data, path, str(path), Image.open(path)):
        assert np.array_equal(load_tiles(source, SPEC), expected)


def test_spec_survives_json():
    spec = TileSpec(tile_size=56, max_tiles=9, mode="vanilla", max_frames=4, mean=(0.1, 0.2, 0.3))
    data = json.loads(json.dumps(spec.to_dict()))
    assert TileSpec.from_dict(data) == spec
    assert TileSpec.from_dict({"tile_size": 448}) == TileSpec(tile_size=448)
    assert data == {
        "tile_size": 56,
        "max_tiles": 9,
        "mode": "vanilla",
        "max_frames": 4,
        "interpolation": "bicubic",
        "mean": [0.1, 0.2, 0.3],
        "std": [0.5, 0.5, 0.5],
        "exif_orientation": True,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tile": 448}, "unknown keys ['tile']"),
        ({"tile_size": 0}, "image.tile_size must be an integer from 1 to 8192, not 0"),
        ({"tile_size": "448"}, "image.tile_size must be int, not str"),
        ({"tile_size": 8193}, "image.tile_size must be an integer from 1 to 8192, not 8193"),
        ({"tile_size": 4096}, "pixels; the limit is 134217728"),
        ({"max_tiles": 0}, "image.max_tiles must be an integer from 1 to 1024, not 0"),
        ({"max_tiles": 1025}, "image.max_tiles must be an integer from 1 to 1024, not 1025"),
        ({"max_tiles": True}, "image.max_tiles must be int, not bool"),
        ({"max_tiles": None}, "image.max_tiles must be int, not NoneType"),
        ({"max_frames": 1.5}, "image.max_frames must be int, not float"),
        ({"max_frames": 1000}, "1000 frames of 448 pixels a side"),
        ({"mode": "thumbnail"}, "image.mode must be one of ['vanilla', 'thumb+tile']"),
        ({"mode": ["vanilla"]}, "image.mode must be one of"),
        ({"interpolation": "lanczos"}, "image.interpolation must be one of"),
        ({"mean": [0.5, 0.5]}, "image.mean must be a list of 3 numbers"),
        ({"std": [0, 1, 1]}, "image.std must be positive"),
    ],
)
def test_spec_is_strict(change, message):
    with pytest.raises(InputError) as caught:
        TileSpec.from_dict({"tile_size": 448, **change})
    assert message in str(caught.value)


@pytest.mark.parametrize("data", [None, [], "448", {}, {"max_tiles": 36}])
def test_spec_needs_an_object_with_a_tile_size(data):
    with pytest.raises(InputError, match=r"must be an object|missing keys \['tile_size'\]"):
        TileSpec.from_dict(data)
