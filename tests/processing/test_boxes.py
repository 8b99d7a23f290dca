"""Boxes are drawn and written like the reference's, and other text is not taken for a box."""

import math
import time

import numpy as np
import pytest
from PIL import Image, ImageDraw

from perception_rt.errors import InputError
from perception_rt.processing.boxes import Box, draw_box, format_box, parse_boxes

BAD_BOXES = [
    None,
    "[000,000,100,100]",
    (1, 2, 3),
    (1, 2, 3, 4, 5),
    (1, 2, 3, "4"),
    (1, 2, 3, None),
    (1, 2, True, 4),
    (0, 0, math.nan, 1),
    (0, 0, math.inf, 1),
    (0, 0, 10**400, 1),
    (0, 0, 1e300, 1),
    (3, 0, 2, 1),
    (0, 3, 1, 2),
    np.zeros((4, 4)),
    np.zeros(()),
    np.array(["a", "b", "c", "d"]),
]


def pillow_rectangle(pixels, box, color, width):
    """Draws like the reference: corners truncated to integers, then Pillow."""
    image = Image.fromarray(pixels)
    ImageDraw.Draw(image).rectangle([int(v) for v in box], width=width, outline=color)
    return np.asarray(image)


@pytest.mark.parametrize("width", [1, 4, 7])
def test_drawing_equals_the_reference(width):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (48, 64, 3), np.uint8)
    for _ in range(300):
        corner = rng.uniform(-30, 60, 2)
        box = [*corner, *(corner + rng.uniform(2 * width, 80, 2))]
        drawn = draw_box(pixels, box, color=(1, 2, 3), width=width)
        assert np.array_equal(drawn, pillow_rectangle(pixels, box, (1, 2, 3), width)), box


def test_drawing_is_red_and_4_pixels_wide_on_a_copy():
    pixels = np.zeros((20, 20, 3), np.uint8)
    drawn = draw_box(pixels, (2, 3, 15, 17))
    assert not pixels.any()
    assert np.array_equal(drawn, pillow_rectangle(pixels, (2, 3, 15, 17), (255, 0, 0), 4))
    assert not drawn[7:14, 6:12].any()
    assert np.array_equal(draw_box(Image.fromarray(pixels), (2, 3, 15, 17)), drawn)


def test_every_frame_is_drawn_on():
    frames = np.random.default_rng(0).integers(0, 256, (3, 20, 30, 3), np.uint8)
    drawn = draw_box(frames, np.array([2.5, 3.5, 15, 17], np.float32))
    for frame, result in zip(frames, drawn, strict=True):
        assert np.array_equal(result, draw_box(frame, (2, 3, 15, 17)))


def test_a_line_stays_inside_its_box():
    pixels = np.zeros((12, 12, 3), np.uint8)
    for box in ((5, 5, 5, 5), (5, 2, 6, 9), (2, 5, 9, 6), (4, 4, 8, 8)):
        x1, y1, x2, y2 = box
        expected = np.zeros_like(pixels)
        expected[y1 : y2 + 1, x1 : x2 + 1] = (255, 0, 0)
        assert np.array_equal(draw_box(pixels, box), expected)


def test_a_far_box_costs_nothing():
    pixels = np.zeros((12, 12, 3), np.uint8)
    start = time.perf_counter()
    assert not draw_box(pixels, (-(2**31), -(2**31), 2**31, 2**31)).any()
    assert not draw_box(pixels, (100, 100, 200, 200)).any()
    assert not draw_box(pixels, (-200, -200, -100, -100)).any()
    assert draw_box(pixels, (0, 0, 2**31, 5), width=2**40).any()
    assert time.perf_counter() - start < 0.5


@pytest.mark.parametrize("box", BAD_BOXES, ids=lambda box: f"{box!r:.30}")
def test_bad_boxes_are_refused(box):
    with pytest.raises(InputError, match=r"^a box must"):
        draw_box(np.zeros((8, 8, 3), np.uint8), box)
    with pytest.raises(InputError, match=r"^a box must"):
        format_box(box, 8, 8)


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((8, 8), np.uint8),
        np.zeros((3, 8, 8), np.uint8),
        np.zeros((8, 8, 4), np.uint8),
        np.zeros((8, 8, 3), np.float32),
        np.zeros((1, 1, 8, 8, 3), np.uint8),
        Image.new("L", (8, 8)),
        Image.new("RGBA", (8, 8)),
        None,
    ],
)
def test_what_cannot_be_drawn_on_is_refused(image):
    with pytest.raises(InputError, match=r"^(an )?image (to draw on )?must"):
        draw_box(image, (0, 0, 4, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"width": 0},
        {"width": True},
        {"width": 1.5},
        {"color": (0, 0)},
        {"color": (0, 0, 256)},
        {"color": (0, 0, 0.5)},
    ],
)
def test_bad_lines_are_refused(options):
    with pytest.raises(InputError, match=next(iter(options))):
        draw_box(np.zeros((8, 8, 3), np.uint8), (0, 0, 4, 4), **options)


@pytest.mark.parametrize(
    ("box", "size", "text"),
    [
        ((0, 0, 640, 480), (640, 480), "[000,000,999,999]"),
        ((320, 240, 480, 360), (640, 480), "[500,500,750,750]"),
        ((1, 1, 2, 2), (1000, 1000), "[001,001,002,002]"),
        ((0.9, 1.999, 10, 99.9), (1000, 1000), "[000,001,010,099]"),
        ((-5, -1e9, 1e9, 2), (3, 3), "[000,000,999,666]"),
        ((1, 1, 2, 2), (3, 7), "[333,142,666,285]"),
    ],
)
def test_boxes_are_written_in_thousandths(box, size, text):
    assert format_box(box, *size) == text
    assert format_box(np.array(box, np.float64), *size) == text


@pytest.mark.parametrize("value", [0, -1, 1.5, True, None, "640", math.nan])
def test_size_of_the_image_is_checked(value):
    box = Box(0, 0, 0.5, 0.5)
    for size, name in (((value, 480), "width"), ((640, value), "height")):
        with pytest.raises(InputError, match=f"the image's {name} must be an integer of at"):
            format_box((0, 0, 1, 1), *size)
        with pytest.raises(InputError, match=f"the image's {name} must be an integer of at"):
            box.to_pixels(*size)


def test_boxes_are_found_in_an_answer():
    text = "A dog [100,200,300,400] and\na cat [ 000 , 005,\n\t999 ,999 ]; [[001,002,003,004]]."
    assert parse_boxes(text) == [
        Box(0.1, 0.2, 0.3, 0.4),
        Box(0.0, 0.005, 0.999, 0.999),
        Box(0.001, 0.002, 0.003, 0.004),
    ]
    assert parse_boxes("[500,500,500,500]")[0].to_pixels(640, 480) == (320, 240, 320, 240)


def test_every_coordinate_survives():
    for value in range(1000):
        text = f"[{value:03},000,{value:03},999]"
        (box,) = parse_boxes(text)
        assert format_box(box.to_pixels(1, 1), 1, 1) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no box",
        "[]",
        "[100,200,300]",
        "[100,200,300,400,500]",
        "[1,2,3,4]",
        "[0100,200,300,400]",
        "[100,200,300,1000]",
        "[-100,200,300,400]",
        "[0.1,0.2,0.3,0.4]",
        "[1e1,200,300,400]",
        "[100 200 300 400]",
        "[100,200,300,400",
        "100,200,300,400]",
        "(100,200,300,400)",
        "[10 0,200,300,400]",
        "[300,200,100,400]",  # right before left
        "[100,400,300,200]",  # bottom before top
        "[\u0661\u0662\u0663,200,300,400]",  # digits, and not ours
        "[nan,nan,nan,nan]",
        "<|bbox0|>",
        "\0[",
        "\ud800",
    ],
)
def test_text_that_is_no_box_is_no_box(text):
    assert parse_boxes(text) == []


@pytest.mark.parametrize(
    "unit",
    ["[", "[ ", " ", "[000", "[000,", "[000,000,000,000", "000,", "[000 ,", "[000,000,000,000]"],
)
def test_hostile_text_takes_linear_time(unit):
    """TOK-04, for the output of a model."""
    texts = [unit * (2**19 // len(unit)), "[" + " " * 2**19, "[000" + " " * 2**19 + ","]
    start = time.perf_counter()
    found = sum(len(parse_boxes(text)) for text in texts)
    assert time.perf_counter() - start < 2
    assert found == (2**19 // len(unit) if unit.endswith("000]") else 0)


@pytest.mark.parametrize(
    "corners",
    [
        (0, 0, 1, 0.5),
        (-0.1, 0, 0.5, 0.5),
        (0.5, 0, 0.4, 0.5),
        (0, 0.5, 0.5, 0.4),
        (0, 0, math.nan, 0.5),
        (0, 0, "1", 0.5),
        (0, 0, None, 0.5),
    ],
)
def test_a_box_is_ordered_fractions(corners):
    with pytest.raises(InputError, match=r"^a box must"):
        Box(*corners)
