"""Image and video preprocessing is read from a model's `params.json`."""

import json
from pathlib import Path

import pytest

from perception_rt.checkpoint.locate import find_tiles
from perception_rt.errors import CheckpointError, InputError
from perception_rt.processing.tiles import TileSpec


def params(folder: Path, content: object) -> Path:
    (folder / "params.json").write_text(json.dumps(content))
    return folder


def test_settings_of_the_training_run_are_taken(tmp_path: Path) -> None:
    data = {"vision_input_type": "vanilla", "max_num_tiles": 1, "max_video_frames": 8}
    found = find_tiles(params(tmp_path, {"data": {**data, "image_res": 448}, "model": {}}), 448)
    assert found == TileSpec(tile_size=448, mode="vanilla", max_tiles=1, max_frames=8)


@pytest.mark.parametrize("content", [{}, {"data": None}, {"data": {}}, {"dim": 64}, []])
def test_what_is_not_said_is_as_for_the_released_models(tmp_path: Path, content: object) -> None:
    assert find_tiles(params(tmp_path, content), 448) == TileSpec(tile_size=448)


def test_without_a_file_too(tmp_path: Path) -> None:
    assert find_tiles(tmp_path, 64) == TileSpec(tile_size=64)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"vision_input_type": "square"}, "image.mode must be one of"),
        ({"max_num_tiles": 0}, "image.max_tiles must be an integer from 1 to 1024, not 0"),
        ({"max_video_frames": "32"}, "image.max_frames must be int, not"),
    ],
)
def test_a_setting_that_is_not_usable_is_named(tmp_path: Path, data: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        find_tiles(params(tmp_path, {"data": data}), 64)


def test_a_file_that_is_not_json(tmp_path: Path) -> None:
    (tmp_path / "params.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"params\.json is not a readable JSON file"):
        find_tiles(tmp_path, 64)
