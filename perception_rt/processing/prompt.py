"""A conversation as data, and the prompt that a language model sees of it.

There is no template language and nothing is parsed: a turn is a role and parts, and control tokens
come from their names. Only `place_media` looks into a text, for the marks that say where images go.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
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

# What the models were trained with, byte for byte.
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
    """Where the image tokens of `count` tiles go, or of as many video frames."""

    count: int


Part: TypeAlias = str | Tiles


@dataclass(frozen=True, slots=True)
class Turn:
    """What one side says: texts, which are never parsed, and in a user's turn tiles."""

    role: Role
    content: tuple[Part, ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Prompt:
    """A conversation as ids.

    Attributes:
        ids: int64 (T,).
        image_spans: start and number of ids of each `Tiles`, in order.
    """

    ids: NDArray[np.int64]
    image_spans: tuple[tuple[int, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Transcript:
    """A finished conversation as ids.

    Attributes:
        ids: int64 (T,).
        learned: bool (T,), the answers and what ends them.
        ends: how many ids there are up to the end of each answer; the last is T.
    """

    ids: NDArray[np.int64]
    learned: NDArray[np.bool_]
    ends: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _Control:
    name: str


@dataclass(frozen=True, slots=True)
class _Fixed:
    """Text of the format itself; what follows it up to a control token is tokenised with it."""

    text: str


_Piece: TypeAlias = _Control | _Fixed | Part


class _Writer:
    """Pieces to ids. The texts between two control tokens are one text: words span their seams."""

    def __init__(self, tokenizer: Tokenizer, tokens_per_tile: int) -> None:
        self._tokenizer = tokenizer
        self._tokens_per_tile = tokens_per_tile
        self._fixed = self._text = ""
        self.ids: list[int] = []
        self.spans: list[tuple[int, int]] = []  # start and number of each image's
        self.answers: list[tuple[int, int]] = []  # start and end of what is learned

    def put(self, piece: _Piece) -> None:
        """The next piece."""
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
        """Ends a text."""
        self.ids += self._tokenizer.encode_text(self._text, before=self._fixed)
        self._fixed = self._text = ""

    def answer(self, text: str, *ends: _Control) -> None:
        """A text that is learned, and the control tokens after it, where a prompt would end."""
        prompt = self._tokenizer.encode_text("", before=self._fixed)
        ids = encode_answer(self._tokenizer, text, before=self._fixed)
        self._fixed = ""
        start = len(self.ids) + len(prompt)
        self.ids += prompt + ids
        for end in ends:
            self.put(end)
        self.answers.append((start, len(self.ids)))


def encode_prompt(tokenizer: Tokenizer, turns: Sequence[Turn], tokens_per_tile: int) -> Prompt:
    """The prompt that makes a model answer the last turn.

    Args:
        tokenizer: the model's.
        turns: user and assistant in turn, the user first and last; before them, if the system's
            sentence is to be another than `SYSTEM`, a turn of the system.
        tokens_per_tile: image tokens of one tile.

    Returns:
        The ids, and where image tokens stand among them.

    Raises:
        InputError: the turns are in another order, a part is not text or tiles, or a text is
            unusable.
    """
    writer = _Writer(tokenizer, tokens_per_tile)
    for piece in _pieces(turns, tokens_per_tile):
        writer.put(piece)
    writer.flush()
    return Prompt(ids=np.asarray(writer.ids, np.int64), image_spans=tuple(writer.spans))


def encode_answer(tokenizer: Tokenizer, text: str, *, before: str = _AFTER_HEADER) -> list[int]:
    """Returns the token ids of an answer, as they follow the ids of `encode_prompt`.

    Args:
        tokenizer: the model's.
        text: the answer.
        before: the format's own text that the answer follows.

    Raises:
        InputError: the text is unusable.
    """
    prompt = tokenizer.encode_text("", before=before)
    ids = tokenizer.encode_text(text, before=before)
    if ids[: len(prompt)] == prompt:
        return ids[len(prompt) :]
    # The text's beginning merged with the header, which a model that answers never sees.
    return tokenizer.encode_text(text)


def encode_transcript(
    tokenizer: Tokenizer, turns: Sequence[Turn], tokens_per_tile: int, form: Format = "plm_sft"
) -> Transcript:
    """A finished conversation, for a model to learn its answers.

    In `plm_sft`, the chat format, the ids before an answer are those that `encode_prompt` gives for
    the turns before it, unless one of their answers begins with what merges with its header, such
    as a new line. Learned are an answer's text and what ends it. The header is not, though it is in
    the reference: at run time it is never the model's to write. In `warmup` there are no control
    tokens but those of images, the system's sentence and the first question's text are left out,
    and an answer ends with a new line.

    Args:
        tokenizer: the model's.
        turns: as `encode_prompt` takes them, but the assistant last.
        tokens_per_tile: image tokens of one tile.
        form: the format.

    Returns:
        The ids, and which of them are learned.

    Raises:
        InputError: as `encode_prompt`.
    """
    _check_integer("tokens_per_tile", tokens_per_tile, 1)
    given = _checked_turns(turns, last="assistant")
    writer = _Writer(tokenizer, tokens_per_tile)
    write = _write_chat if form == "plm_sft" else _write_captions
    write(writer, given)
    learned = np.zeros(len(writer.ids), np.bool_)
    for start, end in writer.answers:
        learned[start:end] = True
    return Transcript(
        ids=np.asarray(writer.ids, np.int64),
        learned=learned,
        ends=tuple(end for _, end in writer.answers),
    )


def generation_prompt(question: str, num_tiles: int, tokens_per_tile: int) -> str:
    """The text that the reference makes of a question; for comparison, never for a model.

    Control tokens in it look like any text, a question's own among them.

    Args:
        question: may have `<image>` marks; if there are as many as tiles, each is a tile's place.
            Otherwise they and `<video>` marks are dropped, and all tiles come first.
        num_tiles: tiles or frames; 0 or more.
        tokens_per_tile: image tokens of one tile.

    Raises:
        InputError: an argument is of another type, or a number is too small.
    """
    _check_integer("num_tiles", num_tiles, 0)
    turn = Turn("user", _reference_parts(_checked_question(question), num_tiles))
    return "".join(_shown(p, tokens_per_tile) for p in _pieces([turn], tokens_per_tile))


def place_media(question: str, tiles_per_item: Sequence[int]) -> tuple[Part, ...]:
    """The content of a user's turn: a question, and the images and videos it is about.

    Several items go where the question has `<image>` or `<video>`, in order, or first if it has
    neither. A single item follows the reference: a tile per `<image>` where there are as many as
    tiles, and otherwise all tiles first and the mark dropped. Without items the question is left
    as it is, marks and all.

    Args:
        question: the text.
        tiles_per_item: number of tiles or frames of each image or video.

    Raises:
        InputError: marks and items differ in number, or an argument is of another type.
    """
    marks = _MARK.findall(_checked_question(question))
    for count in tiles_per_item:
        _check_integer("the number of tiles", count, 1)
    items = len(tiles_per_item)
    if items == 0:
        return _nonempty((question,))
    if items == 1 and (len(marks) <= 1 or marks == [IMAGE_MARK] * tiles_per_item[0]):
        return _reference_parts(question, tiles_per_item[0])
    if len(marks) not in (0, items):
        raise InputError(
            f"the question has {len(marks)} {IMAGE_MARK} or {VIDEO_MARK} marks for {items} "
            "images and videos; put one for each, or none"
        )
    media = [Tiles(count) for count in tiles_per_item]
    if not marks:
        return _nonempty((*media, question))
    return _interleave(_MARK.split(question), media)


def _reference_parts(question: str, num_tiles: int) -> tuple[Part, ...]:
    """Where the reference puts the tiles of a single image or video."""
    texts = question.split(IMAGE_MARK)
    if len(texts) - 1 == num_tiles:
        return _interleave(texts, [Tiles(1)] * num_tiles)
    for mark in (IMAGE_MARK, VIDEO_MARK):
        for dropped in (f"{mark}\n", f"\n{mark}", mark):
            question = question.replace(dropped, "")
    return _nonempty((Tiles(num_tiles), question) if num_tiles else (question,))


def _interleave(texts: Sequence[str], media: Sequence[Tiles]) -> tuple[Part, ...]:
    """Text, tiles, text, ..., text."""
    pairs = (part for pair in zip(texts, media, strict=False) for part in pair)
    return _nonempty((*pairs, texts[-1]))


def _nonempty(parts: tuple[Part, ...]) -> tuple[Part, ...]:
    return tuple(part for part in parts if part != "")


def _pieces(turns: Sequence[Turn], tokens_per_tile: int) -> Iterator[_Piece]:
    """The whole prompt in order, up to where the model's answer begins."""
    _check_integer("tokens_per_tile", tokens_per_tile, 1)
    yield _Control(BEGIN_OF_TEXT)
    for turn in _checked_turns(turns):
        yield from _turn(turn)
    yield from _header("assistant")


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
                if isinstance(part, Tiles) or index > 1:  # 0 is the system's, 1 the first question
                    writer.put(part)


def _text(turn: Turn) -> str:
    return "".join(part for part in turn.content if isinstance(part, str))


def _header(role: Role) -> Iterator[_Piece]:
    yield _Control(START_HEADER)
    yield _Fixed(role)
    yield _Control(END_HEADER)
    yield _Fixed(_AFTER_HEADER)


def _shown(piece: _Piece, tokens_per_tile: int) -> str:
    if isinstance(piece, _Control):
        return piece.name
    if isinstance(piece, Tiles):
        return IMAGE * (piece.count * tokens_per_tile)
    return piece if isinstance(piece, str) else piece.text


def _checked_turns(turns: Sequence[Turn], last: Role = "user") -> list[Turn]:
    """The turns, beginning with the system's; InputError if one is out of place."""
    given = list(turns)
    for turn in given:
        if not isinstance(turn, Turn):
            raise InputError(f"a turn must be a Turn, not {type(turn).__name__}")
        if not isinstance(turn.content, tuple):
            raise InputError(
                f"the content of a turn must be a tuple, not {type(turn.content).__name__}"
            )
        for part in turn.content:
            _check_part(part, turn.role)
    start = 1 if given and given[0].role == "system" else 0
    for index, (turn, role) in enumerate(zip(given[start:], cycle(("user", "assistant"))), start):
        if turn.role != role:
            raise InputError(f"turn {index} must be the {role}'s, not that of {turn.role!r:.40}")
    if len(given) == start or given[-1].role != last:
        raise InputError(f"the last turn must be the {last}'s")
    return given if start else [Turn("system", (SYSTEM,)), *given]


def _check_part(part: object, role: str) -> None:
    if isinstance(part, Tiles):
        if role != "user":
            raise InputError(f"images belong to the user's turns, not to the {role}'s")
        _check_integer("the number of tiles", part.count, 1)
    elif not isinstance(part, str):
        raise InputError(f"a part of a turn must be text or Tiles, not {type(part).__name__}")


def _checked_question(question: str) -> str:
    if not isinstance(question, str):
        raise InputError(f"a question must be a string, not {type(question).__name__}")
    return question


def _check_integer(name: str, value: int, least: int) -> None:
    if type(value) is not int or value < least:
        raise InputError(f"{name} must be an integer of at least {least}")
