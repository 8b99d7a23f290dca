"""NumPy's numbers are numbers, and become plain ones."""

from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from perception_rt.errors import InputError
from perception_rt.processing.boxes import draw_box, format_box
from perception_rt.processing.frame_selection import check_times, select_frames, select_plm_frames
from perception_rt.processing.image import ImageSpec
from perception_rt.processing.image_options import image_options
from perception_rt.processing.tiles import TileSpec, choose_canvas
from perception_rt.records import check_integer, plain_number


@pytest.mark.parametrize(
    ("value", "plain"),
    [
        (5, 5),
        (np.int64(5), 5),
        (np.uint8(5), 5),
        (0.5, 0.5),
        (np.float32(0.5), 0.5),
        (np.float64(0.5), 0.5),
        (Fraction(1, 2), 0.5),
        (True, True),
        ("5", "5"),
        (None, None),
        (1j, 1j),
        (Fraction(10**400), Fraction(10**400)),
    ],
)
def test_plain_numbers(value: Any, plain: Any) -> None:
    found = plain_number(value)
    assert found == plain and type(found) is type(plain)


def test_integers_are_checked_and_returned() -> None:
    for value in (3, np.int8(3), np.uint64(3)):
        found = check_integer("n", value, 1, 5)
        assert found == 3 and type(found) is int
    for value, shown in (
        (np.int64(6), "not 6"),
        (np.float32(3), "not 3.0"),
        (np.bool_(True), "not a bool"),
        (np.array(3), "not a ndarray"),
        (True, "not True"),
    ):
        with pytest.raises(InputError, match=rf"n must be an integer from 1 to 5, {shown}"):
            check_integer("n", value, 1, 5)


def test_wherever_a_number_is_an_argument() -> None:
    six, image = np.int64(6), np.zeros((8, 8, 3), np.uint8)
    spec = ImageSpec(height=six, width=six)
    assert spec == ImageSpec(height=6, width=6) and type(spec.to_dict()["height"]) is int
    tiles = TileSpec(tile_size=six, max_tiles=np.uint8(4))
    assert tiles == TileSpec(tile_size=6, max_tiles=4) and type(tiles.max_tiles) is int
    assert select_frames(np.int64(9), np.int64(3)) == select_frames(9, 3)
    plain = select_plm_frames(100, 25.0, 3, 0.5, 2.0)
    numpy = select_plm_frames(
        np.int32(100), np.float64(25), np.int64(3), np.float32(0.5), np.float64(2)
    )
    assert numpy == plain and {type(index) for index in plain + numpy} == {int}
    with pytest.raises(InputError, match="start_s must be a number of seconds"):
        check_times(np.float32("nan"), None)
    assert choose_canvas(six, six, tile_size=six, max_tiles=six) == choose_canvas(
        6, 6, tile_size=6, max_tiles=6
    )
    red = tuple(np.array([255, 0, 0], np.uint8))
    drawn = draw_box(image, (1, 1, 5, 5), color=red, width=np.int64(1))
    assert np.array_equal(drawn, draw_box(image, (1, 1, 5, 5), color=(255, 0, 0), width=1))
    assert image_options((), red) == image_options((), (255, 0, 0))
    assert format_box((1, 1, 5, 5), np.int64(8), np.int64(8)) == format_box((1, 1, 5, 5), 8, 8)
