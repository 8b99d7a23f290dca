"""Reads the common layouts of conversations: texts, and the images and videos beside them.

| layout | keys |
|---|---|
| reference, LLaVA, ShareGPT | `conversations`: turns with `from` and `value` |
| OpenAI, transformers | `messages`: turns with `role` and `content`, a text or a list of parts |
| one exchange | `question` and `answer`; see `_EXCHANGE_KEYS` for others |
| caption | `text` or `caption` |

Either list may hold either kind of turn. Roles are `human` or `user`, `assistant` or `gpt`, and
`system` for a first turn that replaces the system prompt. `<|bboxN|>` in a text stands for box N of
`bbox`, counted from 0: x, y, width, height in pixels of an image of `width` and `height`.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from perception_rt.errors import InputError, SampleError
from perception_rt.processing.boxes import PixelBox, format_box
from perception_rt.processing.prompt import IMAGE_MARK, VIDEO_MARK

IMAGE_KEYS = ("image", "images", "image_path", "file_name", "filepath")
_CAPTION_KEYS = ("text", "caption")
_VIDEO_KEYS = ("video", "videos")
_TURN_KEYS = ("conversations", "messages")
_EXCHANGE_KEYS = (
    ("question", "answer"),
    ("query", "response"),
    ("prompt", "response"),
    ("prompt", "completion"),
)
_BOX = re.compile(r"<\|bbox([0-9]{1,9})\|>")
_ROLES = {
    "human": "human",
    "user": "human",
    "assistant": "assistant",
    "gpt": "assistant",
    "system": "system",
    "developer": "system",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """A conversation before its texts are checked and its media are loaded.

    Attributes:
        system: system prompt; None for the default one.
        texts: question, answer, question, ..., answer, with boxes in place of `<|bboxN|>`.
        images: paths of images, or arrays.
        video: path of a video, or an array; None for none.
    """

    system: str | None
    texts: tuple[str, ...]
    images: tuple[Any, ...]
    video: Any


@dataclass(frozen=True, slots=True)
class _Item:
    """An image or a video inside a message; without `source`, the record's next one."""

    kind: str
    source: Any


def first_of(record: Mapping[str, Any], keys: Sequence[str]) -> Any:
    """Returns the value of the first key that a record has with a value; None without any."""
    return next((record[key] for key in keys if record.get(key) is not None), None)


def read_layout(record: Mapping[str, Any]) -> Conversation:
    """Reads a record of any layout.

    As in the reference, an assistant's turn at the start is dropped, and so is a question at the
    end without an answer.

    Raises:
        SampleError: the record is malformed.
    """
    turns = _turns(record)
    items: list[_Item] = []
    read = [(_role(turn, i), _content(turn, i, items)) for i, turn in enumerate(turns)]
    system = None
    if read and read[0][0] == "system":
        system = _text(read[0][1], "system", 0).strip() or None
        read = read[1:]
    if read and read[0][0] == "assistant":
        read = read[1:]
    if len(read) % 2:
        read = read[:-1]
    if not read:
        raise SampleError("no question has an answer")
    texts = []
    for index, (role, value) in enumerate(read):
        expected = ("human", "assistant")[index % 2]
        if role != expected:
            raise SampleError("human and assistant do not alternate", f"turn {index}")
        texts.append(_text(value, role, index))
    beside = first_of(record, IMAGE_KEYS)
    if (
        isinstance(beside, list)
        and not beside
        and any(IMAGE_MARK in text or not text.strip() for text in texts[::2])
    ):  # else it says that the sample is text alone
        raise SampleError("the list of images is empty")
    images, video = _media(record, items)
    boxes = _boxes(record)
    return Conversation(
        system=system,
        texts=tuple(_BOX.sub(lambda box: _box(boxes, int(box[1])), text) for text in texts),
        images=images,
        video=video,
    )


def marks_per_question(questions: Sequence[str], items: int) -> list[int]:
    """Number of images and videos of each question.

    If the questions have one mark per item, each item replaces its mark. Otherwise all items go
    into the first question.
    """
    marks = [text.count(IMAGE_MARK) + text.count(VIDEO_MARK) for text in questions]
    return marks if sum(marks) == items else [items] + [0] * (len(questions) - 1)


def frame_boxes(record: Mapping[str, Any]) -> dict[int, PixelBox]:
    """Boxes of `bbox_map` by frame number; frames with null have none.

    Raises:
        InputError: it is no object whose keys are frame numbers.
    """
    boxes = record.get("bbox_map")
    if boxes is None:
        return {}
    if not isinstance(boxes, Mapping) or not all(
        isinstance(frame, str) and frame.isdecimal() and len(frame) < 10 for frame in boxes
    ):
        raise InputError("bbox_map must be an object whose keys are frame numbers")
    return {int(frame): box for frame, box in boxes.items() if box is not None}


def _turns(record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    for key in _TURN_KEYS:
        turns = record.get(key)
        if turns is not None:
            if not isinstance(turns, list) or not all(isinstance(t, Mapping) for t in turns):
                raise SampleError(f"{key} are not a list of turns")
            return turns
    for question, answer in _EXCHANGE_KEYS:
        if question in record and answer in record:
            return _exchange(record[question], record[answer])
    if not any(key in record for key in _CAPTION_KEYS):
        raise SampleError(
            "a line has no conversation, question and answer, or caption",
            f"its keys are {', '.join(map(str, record)) or 'none'}"[:200],
        )
    return _exchange("", first_of(record, _CAPTION_KEYS))


def _exchange(question: Any, answer: Any) -> list[Mapping[str, Any]]:
    return [{"from": "human", "value": question}, {"from": "assistant", "value": answer}]


def _role(turn: Mapping[str, Any], index: int) -> str:
    role = first_of(turn, ("from", "role"))
    if not isinstance(role, str) or role.lower() not in _ROLES:
        raise SampleError(f"the role of a turn is none of {', '.join(_ROLES)}", f"turn {index}")
    return _ROLES[role.lower()]


def _content(turn: Mapping[str, Any], index: int, items: list[_Item]) -> Any:
    """The turn's text; images and videos among its parts are appended to `items`."""
    value = first_of(turn, ("value", "content"))
    if not isinstance(value, list):
        return value
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image", "image_url", "video", "video_url"):
            media = kind.removesuffix("_url")
            source = first_of(part, (kind, "path", "url"))
            items.append(_Item(media, source))
            texts.append(IMAGE_MARK if media == "image" else VIDEO_MARK)
        else:
            raise SampleError("a part of a turn is no text, image or video", f"turn {index}")
    return "".join(texts)


def _text(value: Any, role: str, index: int) -> str:
    if type(value) in (int, float) and role == "assistant":
        value = str(value)
    if not isinstance(value, str):
        raise SampleError("a turn is not text", f"turn {index}")
    if role == "assistant" and not value.strip():
        raise SampleError("an answer is empty", f"turn {index}")
    return value


def _media(record: Mapping[str, Any], items: Sequence[_Item]) -> tuple[tuple[Any, ...], Any]:
    """Images, and the video: of the messages, else of the record."""
    beside = first_of(record, IMAGE_KEYS)
    video = first_of(record, _VIDEO_KEYS)
    if beside is not None and video is not None:
        raise SampleError("a record has both an image and a video")
    images = beside if isinstance(beside, list) else [] if beside is None else [beside]
    videos = video if isinstance(video, list) else [] if video is None else [video]
    if items:
        images = _filled(items, "image", images)
        videos = _filled(items, "video", videos)
    if images and videos:
        raise SampleError("a record has both an image and a video")
    if len(videos) > 1:
        raise SampleError("a record has several videos")
    return tuple(images), videos[0] if videos else None


def _filled(items: Sequence[_Item], kind: str, beside: Sequence[Any]) -> list[Any]:
    """The sources of a kind in order; an item without one takes the record's next."""
    rest = iter(beside)
    missing = object()
    found = [
        item.source if item.source is not None else next(rest, missing)
        for item in items
        if item.kind == kind
    ]
    if any(source is missing for source in found) or next(rest, missing) is not missing:
        raise SampleError(
            "numbers of marks and images differ",
            f"{len(found)} {kind}s in the messages, {len(beside)} beside them",
        )
    return found


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
