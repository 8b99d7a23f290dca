"""Conversations as data, and their encoding as token ids.

There is no template language, and texts are not parsed: a turn is a role and parts, and code names
the control tokens. Only `place_media` searches a text, for the marks that place images and videos.

Legend: T tokens.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError
from perception_rt.processing.llm_tokenizer import Tokenizer
from perception_rt.processing.llm_vocabulary import (
    BEGIN_OF_TEXT,
    END_HEADER,
    END_OF_TEXT,
    EOT,
    IMAGE,
    START_HEADER,
)

Role = Literal["system", "user", "assistant"]
Format = Literal["plm_sft", "warmup"]

# The system prompt of the training, byte for byte.
SYSTEM = (
    "You are a helpful language and vision assistant. "
    "You are able to understand the visual content that the user provides, "
    "and assist the user with a variety of tasks using natural language."
)

IMAGE_MARK = "<image>"
VIDEO_MARK = "<video>"

_AFTER_HEADER = "\n\n"
_AFTER_CAPTION = "\n"
_MARK = re.compile(f"{IMAGE_MARK}|{VIDEO_MARK}")


@dataclass(frozen=True, slots=True)
class Tiles:
    """The place of the image tokens of `count` tiles or video frames."""

    count: int


Part: TypeAlias = str | Tiles


@dataclass(frozen=True, slots=True)
class Turn:
    """One side's texts, which are never parsed, and tiles in a user's turn."""

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """An encoded conversation that awaits an answer.

    Attributes:
        ids: int64 (T,).
        image_spans: start and number of the image tokens of each `Tiles`, in order.
    """

    ids: NDArray[np.int64]
    image_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transcript:
    """An encoded conversation with its answers, for training.

    Attributes:
        ids: int64 (T,).
        learned: bool (T,), true for the answers and their end tokens.
        ends: position after each answer and its end tokens; the last is T.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Control:
    name: str


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Text of the chat format, encoded together with the text up to the next control token."""

    text: str


_Piece: TypeAlias = _Control | _Fixed | Part


class _Writer:
    """Encodes pieces. Texts between two control tokens are encoded as one, since words may span."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_per_tile = tokens_per_tile
        self._fixed = self._text = ""
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []  # (start, number) of each image's tokens
        self.answers: list[tuple[int, int]] = []  # (start, end) of each answer and its end tokens

    def put(self, piece: _Piece) -> None:
        if isinstance(piece, _Fixed):
            self._fixed = piece.text
            return
        if isinstance(piece, str):
            self._text += piece
            return
        self.flush()
        if isinstance(piece, _Control):
            self.ids.append(self._tokenizer.control(piece.name))
        else:
            count = piece.count * self._tokens_per_tile
            self.spans.append((len(self.ids), count))
            self.ids += [self._tokenizer.control(IMAGE)] * count

    def flush(self) -> None:
        self.ids += self._tokenizer.encode_text(self._text, before=self._fixed)
        self._fixed = self._text = ""

    def answer(self, text: str, *ends: _Control) -> None:
        """Appends an answer and the control tokens that end it, where a prompt would end."""
        prompt = self._tokenizer.encode_text("", before=self._fixed)
        ids = encode_answer(self._tokenizer, text, before=self._fixed)
        self._fixed = ""
        start = len(self.ids) + len(prompt)
        self.ids += prompt + ids
        for end in ends:
            self.put(end)
        self.answers.append((start, len(self.ids)))


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], tokens_per_tile: int) -> Prompt:
    """Encodes a conversation as the prompt for the next answer.

    Args:
        tokenizer: the model's tokenizer.
        turns: user and assistant alternating, the user first and last. A system turn may come
            before them; the default is `SYSTEM`.
        tokens_per_tile: image tokens per tile.

    Returns:
        The ids and the spans of image tokens.

    Raises:
        InputError: a text is too long.
    """
    writer = _Writer(tokenizer, tokens_per_tile)
    writer.put(_Control(BEGIN_OF_TEXT))
    for turn in _with_system(turns, last="user"):
        for piece in _turn(turn):
            writer.put(piece)
    for piece in _header("assistant"):
        writer.put(piece)
    writer.flush()
    return Prompt(ids=np.asarray(writer.ids, np.int64), image_spans=tuple(writer.spans))


def encode_answer(tokenizer: Tokenizer, text: str, *, before: str = _AFTER_HEADER) -> list[int]:
    """Encodes an answer as it follows the ids of `encode_prompt`.

    Args:
        tokenizer: the model's tokenizer.
        text: the answer.
        before: text of the chat format that precedes the answer.

    Raises:
        InputError: the text is too long.
    """
    prompt = tokenizer.encode_text("", before=before)
    ids = tokenizer.encode_text(text, before=before)
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt) :]
    # The answer's start merged with the header; a generating model never sees that token.
    return tokenizer.encode_text(text)


def encode_transcript(
    tokenizer: Tokenizer, turns: Sequence[Turn], tokens_per_tile: int, form: Format = "plm_sft"
) -> Transcript:
    """Encodes a conversation with its answers, for training.

    `plm_sft` is the chat format. The ids before an answer equal `encode_prompt` of the turns before
    it, unless an earlier answer starts with text that merges with its header, such as a newline.
    The model learns each answer and its end tokens. It does not learn the header, unlike in the
    reference, because a prompt always ends with it.

    `warmup` has image tokens but no other control tokens, no system prompt and no text of the first
    question. Each answer ends with a newline.

    Args:
        tokenizer: the model's tokenizer.
        turns: as for `encode_prompt`, but the assistant last.
        tokens_per_tile: image tokens per tile.
        form: the format.

    Returns:
        The ids, and a mask of the ones to learn.

    Raises:
        InputError: a text is too long.
    """
    writer = _Writer(tokenizer, tokens_per_tile)
    write = _write_chat if form == "plm_sft" else _write_captions
    write(writer, _with_system(turns, last="assistant"))
    learned = np.zeros(len(writer.ids), np.bool_)
    for start, end in writer.answers:
        learned[start:end] = True
    return Transcript(
        ids=np.asarray(writer.ids, np.int64),
        learned=learned,
        ends=tuple(end for _, end in writer.answers),
    )


def place_media(
    question: str, tiles_per_item: Sequence[int], *, literal: bool = False
) -> tuple[Part, ...]:
    """Places the tiles of images and videos in a user's question.

    Several items replace the `<image>` and `<video>` marks of the question, in order; without
    marks, they come first. A single item follows the reference: if the question has one `<image>`
    per tile, each mark becomes a tile; otherwise all tiles come first and marks are removed.
    Without items, the question stays as it is, with its marks.

    Args:
        question: the text.
        tiles_per_item: number of tiles or frames of each image or video.
        literal: whether marks are text; all items then come first.

    Returns:
        The content of the turn.

    Raises:
        InputError: the number of marks is neither 0 nor the number of items.
    """
    media = [Tiles(count) for count in tiles_per_item]
    if literal or not media:
        return _nonempty((*media, question))
    marks = _MARK.findall(question)
    items = len(tiles_per_item)
    if items == 1 and (len(marks) <= 1 or marks == [IMAGE_MARK] * tiles_per_item[0]):
        return reference_content(question, tiles_per_item[0])
    if len(marks) not in (0, items):
        raise InputError(
            f"the question has {len(marks)} {IMAGE_MARK} or {VIDEO_MARK} marks for {items} "
            "images and videos; put one for each, or none"
        )
    if not marks:
        return _nonempty((*media, question))
    return _interleave(_MARK.split(question), media)


def reference_content(question: str, num_tiles: int) -> tuple[Part, ...]:
    """Places the tiles of a single image or video as the reference does."""
    texts = question.split(IMAGE_MARK)
    if len(texts) - 1 == num_tiles:
        return _interleave(texts, [Tiles(1)] * num_tiles)
    for mark in (IMAGE_MARK, VIDEO_MARK):
        for dropped in (f"{mark}\n", f"\n{mark}", mark):
            question = question.replace(dropped, "")
    return _nonempty((Tiles(num_tiles), question) if num_tiles else (question,))


def _interleave(texts: Sequence[str], media: Sequence[Tiles]) -> tuple[Part, ...]:
    pairs = (part for pair in zip(texts, media, strict=False) for part in pair)
    return _nonempty((*pairs, texts[-1]))


def _nonempty(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part != "")


def _turn(turn: Turn) -> Iterator[_Piece]:
    yield from _header(turn.role)
    yield from turn.content
    yield _Control(EOT)


def _write_chat(writer: _Writer, turns: Sequence[Turn]) -> None:
    writer.put(_Control(BEGIN_OF_TEXT))
    for index, turn in enumerate(turns, start=1):
        answers = turn.role == "assistant"
        for piece in _header("assistant") if answers else _turn(turn):
            writer.put(piece)
        if answers:
            ends = (EOT, END_OF_TEXT) if index == len(turns) else (EOT,)
            writer.answer(_text(turn), *map(_Control, ends))


def _write_captions(writer: _Writer, turns: Sequence[Turn]) -> None:
    for index, turn in enumerate(turns):
        if turn.role == "assistant":
            writer.flush()
            writer.answer(_text(turn) + _AFTER_CAPTION)
        elif turn.role == "user":
            for part in turn.content:
                # Turn 0 is the system's, turn 1 the first question.
                if isinstance(part, Tiles) or index > 1:
                    writer.put(part)


def _text(turn: Turn) -> str:
    return "".join(part for part in turn.content if isinstance(part, str))


def _header(role: Role) -> Iterator[_Piece]:
    yield _Control(START_HEADER)
    yield _Fixed(role)
    yield _Control(END_HEADER)
    yield _Fixed(_AFTER_HEADER)


def _with_system(turns: Sequence[Turn], *, last: Role) -> list[Turn]:
    """The turns, with the default system turn first if they have none."""
    given = list(turns)
    if not given or given[0].role != "system":
        given.insert(0, Turn("system", (SYSTEM,)))
    roles = [turn.role for turn in given[1:]]
    assert roles and roles[-1] == last
    assert all(role == ("user", "assistant")[i % 2] for i, role in enumerate(roles))
    return given
