"""The tokenizer of a language model: text to ids, and ids to bytes, for four kinds of vocabulary.

User text never yields a control id: `<|eot_id|>` in a question is ten plain characters. Control ids
come from their names in code alone, which is what `prompt.py` does. Knows nothing of models.
"""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

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
    read_hf,
    read_sentencepiece,
    read_tiktoken,
)
from perception_rt.records import Record

Kind = Literal["tiktoken", "hf", "sentencepiece", "bytes"]
FileKind = Literal["tiktoken", "hf", "sentencepiece"]

_READERS = {"tiktoken": read_tiktoken, "hf": read_hf, "sentencepiece": read_sentencepiece}
# The file's name inside a package.
_FILES = {"tiktoken": "tokenizer.model", "hf": "tokenizer.json", "sentencepiece": "tokenizer.model"}
_MAX_FILE_BYTES = 64 * 1024 * 1024  # Llama 3's are 2 MiB and 17 MiB


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizerSpec(Record):
    """Which tokenizer a language model has; a manifest's `processing.text`.

    Attributes:
        kind: "tiktoken" for Llama 3's `tokenizer.model`, "hf" for `tokenizer.json`,
            "sentencepiece" for a SentencePiece model; "bytes" needs no file and no library, and is
            for weights that were never trained.
        file: name of the file inside the package; None for "bytes".
        sha256: of the file, in lower-case hex; None for "bytes".
        vocab_size: rows of the model's embedding; a tokenizer may have fewer ids.
        image_token_id: id of `<|image|>`.
    """

    kind: Kind
    file: str | None = None
    sha256: str | None = None
    vocab_size: int
    image_token_id: int

    def __post_init__(self) -> None:
        without = self.kind == "bytes"
        if (self.file is None) != without or (self.sha256 is None) != without:
            raise InputError("a tokenizer has a file and its sha256, unless its kind is 'bytes'")
        if not 0 <= self.image_token_id < self.vocab_size:
            raise InputError(
                f"image_token_id {self.image_token_id} is not in 0 to {self.vocab_size - 1}"
            )


class Tokenizer:
    """Texts to ids, ids to bytes, and control tokens by name.

    Instances are immutable and may be shared between threads.

    Attributes:
        vocab_size: ids are from 0 to one below.
        controls: the id of each control token.
        end_ids: the ids that end a generated text.
        prefix: bytes that the vocabulary puts before every text, for whoever shows one to remove.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        *,
        vocab_size: int,
        image_token_id: int,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        """Checks a vocabulary against an architecture.

        Args:
            vocabulary: what the tokenizer's file says.
            vocab_size: rows of the model's embedding.
            image_token_id: id of `<|image|>` in the model.
            limits: bounds the UTF-8 size of each text.

        Raises:
            InputError: a control token is missing, the image token is another one, or there are
                more ids than the model has.
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
        self.end_ids = frozenset((self.controls[END_OF_TEXT], self.controls[EOT]))
        self.prefix = vocabulary.prefix
        self._encode = vocabulary.encode
        self._spelling = vocabulary.spelling
        self._limits = limits

    def control(self, name: str) -> int:
        """The id of a control token, by a name such as `<|eot_id|>`; InputError if unknown."""
        try:
            return self.controls[name]
        except KeyError:
            raise InputError(f"the tokenizer has no control token {name!r:.60}") from None

    def encode_text(self, text: str, *, before: str = "") -> list[int]:
        """Ids of a text, of which none is a control token.

        A lone surrogate becomes U+FFFD.

        Args:
            text: a user's text, taken as it is.
            before: the caller's own text that `text` continues; it is not counted.

        Raises:
            InputError: `text` is not a string, or longer than `limits.text_bytes` in UTF-8.
        """
        if not isinstance(text, str):
            raise InputError(f"a text must be a string, not {type(text).__name__}")
        size = len(text.encode("utf-8", errors="surrogatepass"))
        if size > self._limits.text_bytes:
            raise InputError(
                f"a text has {size} bytes in UTF-8; the limit is {self._limits.text_bytes}"
            )
        # Pairs of surrogates become the character they stand for, as in the reference.
        paired = text.encode("utf-16-le", errors="surrogatepass")
        ids = self._encode(before + paired.decode("utf-16-le", errors="replace"))
        if not all(map(self._spelling.__contains__, ids)):
            raise InputError("a text has characters that this tokenizer takes for control tokens")
        return ids

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """What ids spell, each on its own; the end may be inside a UTF-8 character.

        Control tokens, and ids that the tokenizer does not use, spell nothing.

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

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids; bytes that are not UTF-8 become U+FFFD. Errors as `decode_bytes`."""
        return self.decode_bytes(ids).removeprefix(self.prefix).decode("utf-8", errors="replace")


def open_tokenizer(
    spec: TokenizerSpec, data: bytes | None = None, *, limits: Limits = DEFAULT_LIMITS
) -> Tokenizer:
    """The tokenizer of a package.

    Args:
        spec: from the package's manifest.
        data: contents of `spec.file`; None for kind "bytes".
        limits: bounds the UTF-8 size of each text.

    Raises:
        PackageError: the file is missing, damaged, or does not fit the model.
        BackendError: the library that reads this kind of file is not installed.
    """
    if (data is None) != (spec.file is None):
        raise PackageError(f"a tokenizer of kind {spec.kind!r} comes with a file, or has none")
    if data is not None and hashlib.sha256(data).hexdigest() != spec.sha256:
        raise PackageError(f"tokenizer {spec.file!r:.80} is damaged: its SHA-256 is another")
    try:
        return _open(spec.kind, data, spec.vocab_size, spec.image_token_id, limits)
    except InputError as error:
        raise PackageError(str(error)) from None


def detect_tokenizer(
    path: str | os.PathLike[str], *, vocab_size: int, image_token_id: int
) -> tuple[TokenizerSpec, bytes]:
    """What a tokenizer's file is, by its content, checked against an architecture.

    Args:
        path: Llama 3's `tokenizer.model`, a `tokenizer.json`, or a SentencePiece model.
        vocab_size: rows of the model's embedding.
        image_token_id: id of `<|image|>` in the model.

    Returns:
        The record for a manifest, and the bytes to write to its `file`.

    Raises:
        InputError: the file cannot be read, is none of the three, is damaged, or does not fit.
        BackendError: the library that reads this kind of file is not installed.
    """
    path, name = path_name(path, "tokenizer")
    with open_regular_file(path, name) as file:
        data = file.read(_MAX_FILE_BYTES + 1)
    if len(data) > _MAX_FILE_BYTES:
        raise InputError(f"{name} has more than {_MAX_FILE_BYTES} bytes")
    kind = _kind(data, name)
    try:
        _open(kind, data, vocab_size, image_token_id, DEFAULT_LIMITS)
    except InputError as error:
        raise InputError(f"{name}: {error}") from None
    spec = TokenizerSpec(
        kind=kind,
        file=_FILES[kind],
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=vocab_size,
        image_token_id=image_token_id,
    )
    return spec, data


def _open(
    kind: Kind, data: bytes | None, vocab_size: int, image_token_id: int, limits: Limits
) -> Tokenizer:
    if data is None:
        vocabulary = byte_vocabulary(vocab_size, image_token_id)
    else:
        vocabulary = _READERS[kind](data)
    return Tokenizer(
        vocabulary, vocab_size=vocab_size, image_token_id=image_token_id, limits=limits
    )


def _kind(data: bytes, name: str) -> FileKind:
    if data.lstrip()[:1] == b"{":
        return "hf"
    if is_rank_line(data.partition(b"\n")[0].rstrip()):
        return "tiktoken"
    if data[:1] == b"\n":  # the first piece of a SentencePiece model: field 1, with a length
        return "sentencepiece"
    raise InputError(
        f"{name} is an unknown tokenizer; known are Llama 3's tokenizer.model, tokenizer.json and "
        "SentencePiece models"
    )
