"""The tokenizer of a language model: encodes texts and decodes ids, for five kinds of vocabulary.

User text never becomes a control token: `<|eot_id|>` in a question is ten plain characters. Only
code requests control tokens, by name, as `prompt.py` does.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import ClassVar, Literal

import numpy as np

from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.files import open_regular_file, path_name
from perception_rt.processing.llm_vocabulary import (
    CONTROLS,
    END_OF_TEXT,
    EOT,
    IMAGE,
    Vocabulary,
    byte_vocabulary,
    is_rank_line,
    read_bpe,
    read_hf,
    read_sentencepiece,
    read_tiktoken,
)
from perception_rt.records import Record, check_text

Kind = Literal["tiktoken", "hf", "sentencepiece", "bpe", "bytes"]
FileKind = Literal["tiktoken", "hf", "sentencepiece", "bpe"]

_READERS = {
    "tiktoken": read_tiktoken,
    "hf": read_hf,
    "sentencepiece": read_sentencepiece,
    "bpe": read_bpe,
}
# File names inside a package.
_FILES = {"hf": "tokenizer.json"}  # other kinds: tokenizer.model
_MAX_FILE_BYTES = 64 * 1024 * 1024  # Llama 3's files have 2 MiB and 17 MiB
_MAX_END_IDS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec(Record):
    """The tokenizer of a language model, as in a manifest's `processing.text`.

    Attributes:
        kind: "tiktoken" for Llama 3's `tokenizer.model`, "hf" for `tokenizer.json`,
            "sentencepiece" for a SentencePiece model, "bpe" for one that `read_bpe` accepts, which
            needs no library, "bytes" for untrained weights, which needs no file and no library.
        file: file name inside the package; None for "bytes".
        sha256: SHA-256 of the file in lower-case hex; None for "bytes".
        vocab_size: rows of the model's embedding; the tokenizer may have fewer ids.
        image_token_id: id of `<|image|>`.
        end_ids: tokens that end an answer; None for `<|end_of_text|>` and `<|eot_id|>`.
    """

    kind: Kind
    file: str | None = None
    sha256: str | None = None
    vocab_size: int
    image_token_id: int
    end_ids: tuple[int, ...] | None = None

    later_fields: ClassVar[frozenset[str]] = frozenset({"end_ids"})

    def __post_init__(self) -> None:
        without = self.kind == "bytes"
        if (self.file is None) != without or (self.sha256 is None) != without:
            raise InputError("a tokenizer has a file and its sha256, unless its kind is 'bytes'")
        if not 0 <= self.image_token_id < self.vocab_size:
            raise InputError(
                f"image_token_id {self.image_token_id} is not in 0 to {self.vocab_size - 1}"
            )
        ids = self.end_ids
        if ids is not None and not 1 <= len(ids) <= _MAX_END_IDS:
            raise InputError(f"end_ids must have 1 to {_MAX_END_IDS} token ids, not {len(ids)}")
        for token in ids or ():
            if not 0 <= token < self.vocab_size:
                raise InputError(
                    f"end_ids (eos_token_id) has {token}, which is not in 0 to "
                    f"{self.vocab_size - 1}"
                )


class Tokenizer:
    """Encodes texts as ids, decodes ids to bytes, and names control tokens.

    Immutable; threads may share an instance.

    Attributes:
        vocab_size: ids are from 0 to `vocab_size - 1`.
        controls: name of each control token to its id.
        end_ids: ids that end a generated text.
        prefix: bytes that the vocabulary puts before every text; to be removed from decoded text.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        image_token_id: int,
        end_ids: Iterable[int] | None = None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Checks a vocabulary against an architecture.

        Args:
            vocabulary: contents of the tokenizer's file.
            vocab_size: rows of the model's embedding.
            image_token_id: id of `<|image|>` in the model.
            end_ids: ids that end a generated text; None for `<|end_of_text|>` and `<|eot_id|>`.
            limits: bounds the UTF-8 size of each text.

        Raises:
            InputError: a control token is missing, the image token has another id, or the
                tokenizer has more ids than the model.
        """
        missing = [name for name in CONTROLS if name not in vocabulary.controls]
        if missing:
            raise InputError(f"the tokenizer does not have {' '.join(missing)}")
        last = max(*vocabulary.spelling, *vocabulary.controls.values())
        if last >= vocab_size:
            raise InputError(
                f"the tokenizer has ids up to {last}; the model's vocabulary ends at "
                f"{vocab_size - 1}"
            )
        if vocabulary.controls[IMAGE] != image_token_id:
            raise InputError(
                f"{IMAGE} is {vocabulary.controls[IMAGE]} in the tokenizer and {image_token_id} "
                "in the model"
            )
        self.vocab_size = vocab_size
        self.controls = MappingProxyType(dict(vocabulary.controls))
        own = (self.controls[END_OF_TEXT], self.controls[EOT])
        self.end_ids = frozenset(own if end_ids is None else end_ids)
        self.prefix = vocabulary.prefix
        self._encode = vocabulary.encode
        self._spelling = vocabulary.spelling
        self._limits = limits

    def control(self, name: str) -> int:
        """Returns the id of a control token such as `<|eot_id|>`; InputError if unknown."""
        try:
            return self.controls[name]
        except KeyError:
            raise InputError(f"the tokenizer has no control token {name!r:.60}") from None

    def encode_text(self, text: str, *, before: str = "") -> list[int]:
        """Encodes a text; no id is a control token.

        A lone surrogate becomes U+FFFD.

        Args:
            text: a user's text.
            before: text of the caller that precedes `text` and is encoded with it. It does not
                count towards the limit.

        Raises:
            InputError: `text` is not a string, or is longer than `limits.text_bytes` in UTF-8.
        """
        check_text("a text", text, self._limits.text_bytes)
        # Surrogate pairs become the character that they encode, as in the reference.
        paired = text.encode("utf-16-le", errors="surrogatepass")
        ids = self._encode(before + paired.decode("utf-16-le", errors="replace"))
        if not all(map(self._spelling.__contains__, ids)):
            raise InputError("a text has characters that this tokenizer takes for control tokens")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Returns the concatenated bytes of ids; the end may be inside a UTF-8 character.

        Control tokens and unused ids have no bytes.

        Raises:
            InputError: an id is not an integer from 0 to `vocab_size - 1`.
        """
        data = bytearray()
        for value in ids:
            token = int(value) if isinstance(value, int | np.integer) else -1
            if not 0 <= token < self.vocab_size:
                raise InputError(f"a token id must be an integer from 0 to {self.vocab_size - 1}")
            data += self._spelling.get(token, b"")
        return bytes(data)

    def spellings(self) -> list[bytes]:
        """Returns the bytes of every id; control tokens and unused ids have none."""
        return [self._spelling.get(token, b"") for token in range(self.vocab_size)]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids; invalid UTF-8 becomes U+FFFD. Errors as `decode_bytes`."""
        return self.decode_bytes(ids).removeprefix(self.prefix).decode("utf-8", errors="replace")


def open_tokenizer(
    spec: TokenizerSpec, data: bytes | None = None, *, limits: Limits = DEFAULT_LIMITS
) -> Tokenizer:
    """Opens the tokenizer of a package.

    Args:
        spec: `processing.text` of the package's manifest.
        data: contents of `spec.file`; None for kind "bytes".
        limits: bounds the UTF-8 size of each text.

    Raises:
        PackageError: the file is missing, damaged, or does not fit the model.
        BackendError: the library that reads this kind of file is not installed.
    """
    if (data is None) != (spec.file is None):
        state = "needs a file" if data is None else "has no file"
        raise PackageError(f"a tokenizer of kind {spec.kind!r} {state}")
    if data is not None and hashlib.sha256(data).hexdigest() != spec.sha256:
        raise PackageError(f"tokenizer {spec.file!r:.80} is damaged: its SHA-256 does not match")
    try:
        size, image = spec.vocab_size, spec.image_token_id
        return _open(spec.kind, data, size, image, spec.end_ids, limits)
    except InputError as error:
        raise PackageError(str(error)) from None


def detect_tokenizer(
    path: str | os.PathLike[str],
    *,
    vocab_size: int,
    image_token_id: int,
    end_ids: tuple[int, ...] | None = None,
    kind: FileKind | None = None,
) -> tuple[TokenizerSpec, bytes]:
    """Detects the kind of a tokenizer file by its content, and checks it against an architecture.

    Args:
        path: Llama 3's `tokenizer.model`, a `tokenizer.json`, or a SentencePiece model.
        vocab_size: rows of the model's embedding.
        image_token_id: id of `<|image|>` in the model.
        end_ids: tokens that end an answer; None for `<|end_of_text|>` and `<|eot_id|>`.
        kind: kind of the file; None detects it. A SentencePiece model may be of kind "bpe".

    Returns:
        The record for a manifest, and the bytes to write to its `file`.

    Raises:
        InputError: the file is unreadable, of an unknown kind, damaged, or does not fit the model.
        BackendError: the library that reads this kind of file is not installed.
    """
    path, name = path_name(path, "tokenizer")
    with open_regular_file(path, name) as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"{name} has more than {_MAX_FILE_BYTES} bytes")
    kind = kind or _kind(data, name)
    try:
        opened = _open(kind, data, vocab_size, image_token_id, None, DEFAULT_LIMITS)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    spec = TokenizerSpec(
        kind=kind,
        file=_FILES.get(kind, "tokenizer.model"),
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        end_ids=None if end_ids is None or opened.end_ids == set(end_ids) else end_ids,
    )
    return spec, data


def _open(
    kind: Kind,
    data: bytes | None,
    vocab_size: int,
    image_token_id: int,
    end_ids: tuple[int, ...] | None,
    limits: Limits,
) -> Tokenizer:
    if data is None:
        vocabulary = byte_vocabulary(vocab_size, image_token_id)
    else:
        vocabulary = _READERS[kind](data)
    return Tokenizer(
        vocabulary,
        vocab_size=vocab_size,
        image_token_id=image_token_id,
        end_ids=end_ids,
        limits=limits,
    )


def _kind(data: bytes, name: str) -> FileKind:
    if data.lstrip()[:1] == b"{":
        return "hf"
    if is_rank_line(data.partition(b"\n")[0].rstrip()):
        return "tiktoken"
    if data[:1] == b"\n":  # a SentencePiece model starts with a piece: field 1, with a length
        return "sentencepiece"
    raise InputError(
        f"{name} is an unknown tokenizer; known are Llama 3's tokenizer.model, tokenizer.json and "
        "SentencePiece models"
    )
