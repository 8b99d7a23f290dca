"""Reads SentencePiece models, and encodes with those that need no library.

A model is a protobuf message. Its BPE without any change of the text, as PLM-Demo has, takes a few
lines of Python, so the demo runs with the base dependencies. All other models need sentencepiece.
"""

import heapq
import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from perception_rt.errors import InputError

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, BYTE = 1, 2, 3, 4, 6  # types of pieces
SPACE = "\u2581"
UNKNOWN_TEXT = " \u2047 "
_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")
_BPE = 2  # value of TrainerSpec.model_type
_NUM_BYTES = 256

# Numbers of the fields that are read, by message.
_PIECE, _TRAINER, _NORMALIZER = 1, 2, 3  # of the model
_NAME, _SCORE, _TYPE = 1, 2, 3  # of a piece
_MODEL_TYPE, _SUFFIX, _BYTE_FALLBACK = 3, 24, 35  # of the trainer's settings
# Of the normaliser's settings: a table of replacements, a space in front, no repeated spaces, a
# symbol for a space, and rules.
_TABLE, _DUMMY_PREFIX, _EXTRA_SPACES, _ESCAPE, _RULES = 2, 3, 4, 5, 6


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the vocabulary; its position in the file is its id."""

    name: str
    kind: int
    score: float

    def spelling(self) -> bytes:
        """The bytes that the piece stands for; InputError for a byte with an unknown name."""
        if self.kind == UNKNOWN:
            return UNKNOWN_TEXT.encode("utf-8")
        if self.kind == BYTE:
            match = _BYTE_PIECE.fullmatch(self.name)
            if match is None:
                raise InputError(f"the tokenizer has {self.name!r:.60} as the name of a byte")
            return bytes.fromhex(match[1])
        return self.name.replace(SPACE, " ").encode("utf-8")


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """Contents of a model file.

    Attributes:
        pieces: the vocabulary, by id.
        prefix: bytes that the model puts before every text: none, or a space.
        is_plain_bpe: whether it is a BPE that leaves the text as it is, so that `bpe_encoder` gives
            the ids that the library gives.
    """

    pieces: tuple[Piece, ...]
    prefix: bytes
    is_plain_bpe: bool


def parse_sentencepiece(data: bytes) -> SentencePieceModel:
    """Parses a model file.

    Raises:
        InputError: the file is damaged, or has user-defined symbols, which any text could contain.
    """
    pieces: list[Piece] = []
    trainer: dict[int, Any] = {}
    normalizer: dict[int, Any] | None = None
    for number, value in _fields(data):
        if number == _PIECE:
            pieces.append(_piece(value))
        elif number == _TRAINER:
            trainer = dict(_fields(value))
        elif number == _NORMALIZER:
            normalizer = dict(_fields(value))
    if not pieces:
        raise InputError("the tokenizer has no pieces")
    has_prefix = normalizer is None or normalizer.get(_DUMMY_PREFIX) != 0
    return SentencePieceModel(
        pieces=tuple(pieces),
        prefix=b" " if has_prefix else b"",
        is_plain_bpe=normalizer is not None and _is_plain_bpe(pieces, trainer, normalizer),
    )


def _piece(data: Any) -> Piece:
    found = dict(_fields(data))
    name, kind = _text(found.get(_NAME)), found.get(_TYPE, NORMAL)
    if kind == USER_DEFINED:
        raise InputError(
            f"the tokenizer has {name!r:.60} as a user-defined symbol, which any text could "
            "contain; it must be a control symbol"
        )
    score = found.get(_SCORE, bytes(4))
    if not isinstance(score, bytes) or len(score) != 4:
        raise InputError("a piece of the tokenizer has a score that is not a number")
    return Piece(name, kind, struct.unpack("<f", score)[0])


def _is_plain_bpe(pieces: list[Piece], trainer: dict[int, Any], normalizer: dict[int, Any]) -> bool:
    names = {piece.name for piece in pieces}
    kinds = [piece.kind for piece in pieces]
    unchanged = (
        not normalizer.get(_TABLE)
        and not normalizer.get(_RULES)
        and normalizer.get(_DUMMY_PREFIX) == 0
        and normalizer.get(_EXTRA_SPACES) == 0
        and normalizer.get(_ESCAPE, 1) == 1
    )
    return (
        unchanged
        and trainer.get(_MODEL_TYPE) == _BPE
        and trainer.get(_BYTE_FALLBACK) == 1
        and not trainer.get(_SUFFIX)
        and len(names) == len(pieces)
        and set(kinds) <= {NORMAL, UNKNOWN, CONTROL, BYTE}
        and kinds.count(UNKNOWN) == 1
        and {f"<0x{value:02X}>" for value in range(_NUM_BYTES)}
        == {piece.name for piece in pieces if piece.kind == BYTE}
        # A character may only be a normal piece, or bytes.
        and all(len(piece.name) > 1 for piece in pieces if piece.kind != NORMAL)
        and all(piece.name for piece in pieces)
        and all(piece.score == piece.score for piece in pieces)  # not NaN
    )


def bpe_encoder(model: SentencePieceModel) -> Callable[[str], list[int]]:
    """Returns a function from a text to the ids of a model that `is_plain_bpe`.

    Takes O(n log n) for n characters.
    """
    ids = {p.name: i for i, p in enumerate(model.pieces) if p.kind == NORMAL}
    scores = {p.name: p.score for p in model.pieces if p.kind == NORMAL}
    of_byte = {p.spelling()[0]: i for i, p in enumerate(model.pieces) if p.kind == BYTE}

    def encode(text: str) -> list[int]:
        found: list[int] = []
        for piece in _merged(text.replace(" ", SPACE), scores):
            known = ids.get(piece)
            if known is None:  # one character: longer pieces are made of known ones only
                found.extend(of_byte[byte] for byte in piece.encode("utf-8"))
            else:
                found.append(known)
        return found

    return encode


def _merged(text: str, scores: dict[str, float]) -> Iterator[str]:
    """Joins neighbours, the highest score first and the leftmost of equal ones."""
    pieces: list[str | None] = list(text)
    end = len(pieces)
    after = list(range(1, end + 1))
    before = list(range(-1, end - 1))
    queue = [
        (-scores[joined], left, right, joined)
        for left, right in pairwise(range(end))
        if (joined := text[left : right + 1]) in scores
    ]
    heapq.heapify(queue)

    def offer(left: int, right: int) -> None:
        if left >= 0 and right < end:
            joined = f"{pieces[left]}{pieces[right]}"
            if joined in scores:
                heapq.heappush(queue, (-scores[joined], left, right, joined))

    while queue:
        _, left, right, joined = heapq.heappop(queue)
        first, second = pieces[left], pieces[right]
        # One of the two may have been joined to another piece since this pair was noted.
        if first is None or second is None or first + second != joined:
            continue
        pieces[left], pieces[right] = joined, None
        after[left] = after[right]
        if after[left] < end:
            before[after[left]] = left
        offer(before[left], left)
        offer(left, after[left])
    return (piece for piece in pieces if piece is not None)


def _text(value: Any) -> str:
    try:
        return str(value, "utf-8")
    except (TypeError, ValueError):
        raise InputError("a piece of the tokenizer is not text") from None


def _fields(data: Any) -> Iterator[tuple[int, Any]]:
    """Number and value (an integer or bytes) of each field of a protobuf message."""
    if not isinstance(data, bytes):
        raise InputError("the tokenizer is not a SentencePiece model")
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire_type = key & 7
        if wire_type == 0:
            value, at = _varint(data, at)
            yield key >> 3, value
            continue
        size = {1: 8, 5: 4}.get(wire_type)
        if wire_type == 2:
            size, at = _varint(data, at)
        if size is None or at + size > len(data):
            raise InputError("the tokenizer is not a SentencePiece model, or is cut off")
        yield key >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A variable-length integer, and the position after it."""
    value = 0
    for count, byte in enumerate(data[at : at + 10]):
        value |= (byte & 0x7F) << 7 * count
        if byte < 0x80:
            return value, at + count + 1
    raise InputError("the tokenizer is not a SentencePiece model, or is cut off")
