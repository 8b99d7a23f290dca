"""Parses one line of a jsonl file into conversation turns and tiles.

`perception_rt/processing/conversation_layouts.py` reads the layouts:

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

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError, SampleError
from perception_rt.processing.conversation_layouts import (
    Conversation,
    frame_boxes,
    marks_per_question,
    read_layout,
)
from perception_rt.processing.prompt import Part, Turn, place_media
from perception_rt.processing.tiles import TileSpec, load_tiles
from perception_rt.processing.video import load_frames
from training.data.media import MediaFolders
from training.data.video_decoder import frame_decoder

Pixels: TypeAlias = NDArray[np.uint8]


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
    items = _load_media(found, record, folders, spec)
    turns = [] if found.system is None else [Turn("system", (found.system,))]
    for question, answer in zip(_place(found.texts[::2], items), found.texts[1::2], strict=True):
        if not any(not isinstance(part, str) or part.strip() for part in question):
            raise SampleError("a question is empty")
        turns += [Turn("user", question), Turn("assistant", (answer,))]
    side = spec.tile_size
    return turns, np.concatenate([np.empty((0, side, side, 3), np.uint8), *items])


def _place(questions: Sequence[str], items: Sequence[Pixels]) -> list[tuple[Part, ...]]:
    """Contents of the user's turns."""
    counts = [len(item) for item in items]
    marks = marks_per_question(questions, len(items))
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
        boxes = frame_boxes(record)
        return load_frames(
            source, spec, start_s=start, end_s=end, boxes=boxes, decoder=frame_decoder()
        )
    except InputError as error:
        raise SampleError("a video is unusable", str(error)) from None
