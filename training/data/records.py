"""Parses one line of a jsonl file into conversation turns and tiles; `layouts.py` has the layouts.

    {"image": "a.jpg", "conversations": [{"from": "human", "value": "What is this?"},
                                         {"from": "assistant", "value": "A cat."}]}

| key | meaning |
|---|---|
| `image`, `images` | a path or a list of paths |
| `video` | a path |
| `start_time`, `end_time` | clip of the video in seconds |
| `bbox_map` | boxes x1, y1, x2, y2 in pixels by frame number, drawn into the frames |
| `bbox`, `width`, `height` | boxes x, y, width, height in pixels, and the image's size |

`<|bboxN|>` in a text stands for box N of `bbox`, counted from 0. Other keys are ignored. A single
image may become many tiles; of several images, each is one tile.

Rules where the reference fails or is silent:

- Turns that do not alternate are an error.
- If the questions have one `<image>` or `<video>` mark per item, each item replaces its mark.
  Otherwise all items go into the first question by the rules of `place_media`.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.processing.boxes import format_box
from perception_rt.processing.prompt import IMAGE_MARK, VIDEO_MARK, Part, Turn, place_media
from perception_rt.processing.tiles import TileSpec, load_tiles
from perception_rt.processing.video import load_frames
from training.data.layouts import Conversation, read_layout
from training.data.media import MediaFolders
from training.data.unusable import SampleError
from training.data.video_decoder import frame_decoder

Pixels: TypeAlias = NDArray[np.uint8]

_BOX = re.compile(r"<\|bbox([0-9]{1,9})\|>")


def read_record(record: Any, folders: MediaFolders, spec: TileSpec) -> tuple[list[Turn], Pixels]:
    """Parses a record into a conversation whose turns alternate and end with the assistant's.

    Args:
        record: the parsed line. An array, uint8 (H, W, 3) or (T, H, W, 3), may replace a path.
        folders: folders that paths are relative to.
        spec: how images and frames become tiles.

    Returns:
        The turns, after a system turn if the record has one, and all tiles in the order of their
        places, uint8 (n, S, S, 3).

    Raises:
        SampleError: the record is malformed, or its image or video cannot be read.
    """
    if not isinstance(record, Mapping):
        raise SampleError("a line is not an object")
    found = read_layout(record)
    boxes = _boxes(record)
    texts = [_BOX.sub(lambda box: _box(boxes, int(box[1])), text) for text in found.texts]
    items = _load_media(found, record, folders, spec)
    turns = [] if found.system is None else [Turn("system", (found.system,))]
    for question, answer in zip(_place(texts[::2], items), texts[1::2], strict=True):
        if not any(not isinstance(part, str) or part.strip() for part in question):
            raise SampleError("a question is empty")
        turns += [Turn("user", question), Turn("assistant", (answer,))]
    side = spec.tile_size
    return turns, np.concatenate([np.empty((0, side, side, 3), np.uint8), *items])


def _boxes(record: Mapping[str, Any]) -> list[str]:
    boxes = record.get("bbox")
    if boxes is None:
        return []
    width, height = record.get("width"), record.get("height")
    if not isinstance(boxes, list) or type(width) is not int or type(height) is not int:
        raise SampleError("bbox is not a list, or width or height is not an integer")
    texts = []
    for box in boxes:
        if not isinstance(box, list) or len(box) != 4:
            raise SampleError("a box is not x, y, width, height")
        try:
            x, y, wide, high = (float(value) for value in box)
            texts.append(format_box((x, y, x + wide, y + high), width, height))
        except (TypeError, ValueError, OverflowError) as error:  # InputError is a ValueError
            detail = str(error) if isinstance(error, InputError) else ""
            raise SampleError("a box is not x, y, width, height", detail) from None
    return texts


def _box(boxes: Sequence[str], number: int) -> str:
    if number >= len(boxes):
        raise SampleError("a text refers to a missing box", f"<|bbox{number}|>")
    return boxes[number]


def _place(questions: Sequence[str], items: Sequence[Pixels]) -> list[tuple[Part, ...]]:
    """Contents of the user's turns."""
    counts = [len(item) for item in items]
    marks = [text.count(IMAGE_MARK) + text.count(VIDEO_MARK) for text in questions]
    if sum(marks) != len(items):
        marks = [len(items)] + [0] * (len(questions) - 1)
    ends = np.cumsum(marks)
    try:
        return [
            place_media(question, counts[end - number : end])
            for question, number, end in zip(questions, marks, ends, strict=True)
        ]
    except InputError as error:
        raise SampleError("numbers of marks and images differ", str(error)) from None


def _load_media(
    found: Conversation, record: Mapping[str, Any], folders: MediaFolders, spec: TileSpec
) -> list[Pixels]:
    """Tiles of each image or video."""
    if found.video is not None:
        return [_load_video(found.video, record, folders, spec)]
    most = spec.max_tiles if len(found.images) == 1 else 0
    return [_load_image(image, folders, spec, most) for image in found.images]


def _load_image(image: Any, folders: MediaFolders, spec: TileSpec, max_tiles: int) -> Pixels:
    source = folders.find(image, "an image")
    try:
        return load_tiles(source, spec, max_tiles=max_tiles)
    except InputError as error:
        raise SampleError("an image is unusable", str(error)) from None


def _load_video(
    video: Any, record: Mapping[str, Any], folders: MediaFolders, spec: TileSpec
) -> Pixels:
    source = folders.find(video, "a video")
    start, end = record.get("start_time"), record.get("end_time")
    try:
        boxes = _frame_boxes(record.get("bbox_map"))
        return load_frames(
            source, spec, start_s=start, end_s=end, boxes=boxes, decoder=frame_decoder()
        )
    except InputError as error:
        raise SampleError("a video is unusable", str(error)) from None


def _frame_boxes(boxes: Any) -> dict[int, Any]:
    """Boxes of `bbox_map` by frame number; frames with null have none."""
    if boxes is None:
        return {}
    if not isinstance(boxes, Mapping) or not all(
        isinstance(frame, str) and frame.isdecimal() and len(frame) < 10 for frame in boxes
    ):
        raise InputError("bbox_map must be an object whose keys are frame numbers")
    return {int(frame): box for frame, box in boxes.items() if box is not None}
