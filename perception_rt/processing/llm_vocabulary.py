"""Reads the vocabulary of a language model's tokenizer from a file's bytes, for each kind of file.

The library that splits text never sees the control tokens, so no text can become one. Each library
is imported when the first file of its kind is opened.
"""

import base64
import json
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from perception_rt.errors import BackendError, InputError
from perception_rt.processing.byte_symbols import byte_symbols
from perception_rt.processing.sentencepiece_model import (
    CONTROL,
    SentencePieceModel,
    bpe_encoder,
    parse_sentencepiece,
)

# Control tokens in prompts, under the names of the reference and the hub.
BEGIN_OF_TEXT = "<|begin_of_text|>"
END_OF_TEXT = "<|end_of_text|>"
IMAGE = "<|image|>"
START_HEADER = "<|start_header_id|>"
END_HEADER = "<|end_header_id|>"
EOT = "<|eot_id|>"
CONTROLS = (BEGIN_OF_TEXT, END_OF_TEXT, IMAGE, START_HEADER, END_HEADER, EOT)

_NUM_BYTES = 256


def _reserved(first: int, last: int) -> Iterator[str]:
    return (f"<|reserved_special_token_{i}|>" for i in range(first, last + 1))


# The ids after the ranks of a Llama 3 file, in order: `apps/plm/tokenizer.py` at 3e352cc.
LLAMA_SPECIALS = (
    BEGIN_OF_TEXT,
    END_OF_TEXT,
    IMAGE,
    *_reserved(1, 3),
    START_HEADER,
    END_HEADER,
    *_reserved(4, 4),
    EOT,
    *_reserved(5, 250),
)

# Llama 3's pattern for words, copied from the reference.
_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_RANK_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) ([0-9]{1,9})")


@dataclass(frozen=True, slots=True, kw_only=True)
class Vocabulary:
    """Contents of a tokenizer file.

    Attributes:
        encode: maps a text without lone surrogates to ids.
        spelling: ids that stand for text, with their bytes.
        controls: names of control tokens, with their ids.
        prefix: bytes that the vocabulary puts before every text: none, or a space.
    """

    encode: Callable[[str], list[int]]
    spelling: Mapping[int, bytes]
    controls: Mapping[str, int]
    prefix: bytes = b""


@contextmanager
def _optional(library: str) -> Iterator[None]:
    try:
        yield
    except ImportError:
        raise BackendError(
            f'this tokenizer needs {library}: pip install "perception_rt[plm]"'
        ) from None


def byte_vocabulary(vocab_size: int, image_token_id: int) -> Vocabulary:
    """Makes a vocabulary of bytes: ids 0 to 255.

    The control tokens take the last ids but for the image token's own.

    Raises:
        InputError: the vocabulary is too small, or the image token is among the bytes.
    """
    if vocab_size < _NUM_BYTES + len(CONTROLS):
        raise InputError(
            f"a vocabulary of bytes needs at least {_NUM_BYTES + len(CONTROLS)} ids, "
            f"not {vocab_size}"
        )
    if image_token_id < _NUM_BYTES:
        raise InputError(
            f"a vocabulary of bytes needs an image_token_id of at least {_NUM_BYTES}, "
            f"not {image_token_id}"
        )
    others = [name for name in CONTROLS if name != IMAGE]
    free = [i for i in range(vocab_size - len(CONTROLS), vocab_size) if i != image_token_id]
    return Vocabulary(
        encode=lambda text: list(text.encode("utf-8")),
        spelling={i: bytes([i]) for i in range(_NUM_BYTES)},
        controls={**dict(zip(others, free[-len(others) :], strict=True)), IMAGE: image_token_id},
    )


def read_tiktoken(data: bytes) -> Vocabulary:
    """Reads Llama 3's `tokenizer.model`: lines of a base64 token and its rank, which is its id.

    Raises:
        InputError: the file is damaged.
        BackendError: tiktoken is not installed.
    """
    lines = [line for line in data.splitlines() if line]
    ranks = dict(map(_rank, lines))
    if len(ranks) != len(lines):
        raise InputError("the tokenizer has a token twice")
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise InputError("the ranks of the tokenizer are not all the integers from 0")
    if not all(bytes([value]) in ranks for value in range(_NUM_BYTES)):
        raise InputError("the tokenizer does not have a token for every byte")
    with _optional("tiktoken"):
        import tiktoken

    encoding = tiktoken.Encoding("llama3", pat_str=_WORD, mergeable_ranks=ranks, special_tokens={})
    return Vocabulary(
        encode=encoding.encode_ordinary,
        spelling={rank: token for token, rank in ranks.items()},
        controls={name: len(ranks) + i for i, name in enumerate(LLAMA_SPECIALS)},
    )


def is_rank_line(line: bytes) -> bool:
    """Whether a line has the format of Llama 3's `tokenizer.model`."""
    return _RANK_LINE.fullmatch(line) is not None


def _rank(line: bytes) -> tuple[bytes, int]:
    match = _RANK_LINE.fullmatch(line)
    try:
        if match is not None:
            return base64.b64decode(match[1], validate=True), int(match[2])
    except ValueError:
        pass
    raise InputError("a line of the tokenizer is not a token in base64 and its rank")


def read_hf(data: bytes) -> Vocabulary:
    """Reads a Hugging Face `tokenizer.json` with a byte-level BPE, such as Llama 3's.

    Added tokens, special or not, become control tokens; the splitting library never sees them.

    Raises:
        InputError: the file is damaged, or is not a byte-level BPE.
        BackendError: tokenizers is not installed.
    """
    root = _json_object(data)
    model, controls = _byte_level_bpe(root), _added_tokens(root)
    vocab = {symbol: i for symbol, i in model["vocab"].items() if symbol not in controls}
    _check_hf_ids(model["vocab"], vocab, controls)
    plain = {
        **root,
        "added_tokens": [],
        **dict.fromkeys(("truncation", "padding", "post_processor", "decoder")),
        "model": {**model, "vocab": vocab, "dropout": None, "unk_token": None},
    }
    with _optional("tokenizers"):
        import tokenizers
    try:
        tokenizer = tokenizers.Tokenizer.from_str(json.dumps(plain))
    except Exception:
        # The library raises plain Exception, and its messages quote the file.
        raise InputError("the tokenizer's JSON is not one that tokenizers accepts") from None
    values = {symbol: value for value, symbol in byte_symbols().items()}

    def encode(text: str) -> list[int]:
        try:
            ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException:  # a pattern in the file can cause a panic, which is no Exception
            raise InputError("the tokenizer's JSON has a rule that fails on this text") from None
        return ids

    return Vocabulary(
        encode=encode,
        spelling={
            i: bytes(values[c] for c in symbol)
            for symbol, i in vocab.items()
            if values.keys() >= set(symbol)
        },
        controls=controls,
        prefix=b" " if _byte_level(root).get("add_prefix_space") else b"",
    )


def _json_object(data: bytes) -> dict[str, Any]:
    try:
        root = json.loads(data)
    except (ValueError, RecursionError):
        raise InputError("the tokenizer is not JSON") from None
    if not isinstance(root, dict):
        raise InputError("the tokenizer's JSON is not an object")
    return root


def _byte_level_bpe(root: dict[str, Any]) -> dict[str, Any]:
    model = root.get("model")
    if not isinstance(model, dict) or model.get("type") != "BPE":
        raise InputError("the tokenizer's model is not BPE")
    unlike = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if not _byte_level(root) or any(model.get(name) for name in unlike):
        raise InputError("the tokenizer is not a byte-level BPE")
    if root.get("normalizer"):
        raise InputError("the tokenizer changes the text before it splits it")
    vocab = model.get("vocab")
    if not isinstance(vocab, dict) or not all(type(i) is int and i >= 0 for i in vocab.values()):
        raise InputError("the tokenizer's vocabulary is not tokens with their ids")
    if not all(symbol in vocab for symbol in byte_symbols().values()):
        raise InputError("the tokenizer does not have a token for every byte")
    return model


def _byte_level(root: dict[str, Any]) -> dict[str, Any]:
    """The pre-tokenizer step that turns characters into bytes; empty if there is none."""
    split = root.get("pre_tokenizer")
    steps = split.get("pretokenizers", [split]) if isinstance(split, dict) else None
    for step in steps if isinstance(steps, list) else ():
        if isinstance(step, dict) and step.get("type") == "ByteLevel":
            return step
    return {}


def _added_tokens(root: dict[str, Any]) -> dict[str, int]:
    added = root.get("added_tokens")
    controls: dict[str, int] = {}
    for token in added if isinstance(added, list) else [None]:
        values = token if isinstance(token, dict) else {}
        name, i = values.get("content"), values.get("id")
        if not isinstance(name, str) or not name or type(i) is not int or i < 0:
            raise InputError("the tokenizer's added tokens are not names with their ids")
        if name in controls:
            raise InputError(f"the tokenizer has the added token {name!r:.60} twice")
        controls[name] = i
    return controls


def _check_hf_ids(vocab: dict[str, int], plain: dict[str, int], controls: dict[str, int]) -> None:
    if any(vocab.get(name, i) != i for name, i in controls.items()):
        raise InputError("the tokenizer has two ids for an added token")
    if len({*plain.values(), *controls.values()}) != len(plain) + len(controls):
        raise InputError("the tokenizer has an id twice")


def read_sentencepiece(data: bytes) -> Vocabulary:
    """Reads a SentencePiece model; its control symbols become control tokens.

    Raises:
        InputError: the file is damaged, or has user-defined symbols, which any text could contain.
        BackendError: sentencepiece is not installed.
    """
    model = parse_sentencepiece(data)
    with _optional("sentencepiece"):
        import sentencepiece
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=data)
    except Exception:
        # Damage causes several exception classes, and the messages name source files.
        raise InputError("the tokenizer is not one that sentencepiece accepts") from None
    if processor.vocab_size() != len(model.pieces):
        raise InputError("the tokenizer is not one that sentencepiece accepts")
    return _sentencepiece_vocabulary(model, processor.encode)


def read_bpe(data: bytes) -> Vocabulary:
    """Reads a SentencePiece model that `is_plain_bpe`, without the library.

    Raises:
        InputError: the file is damaged, or of another type of model.
    """
    model = parse_sentencepiece(data)
    if not model.is_plain_bpe:
        raise InputError("the tokenizer is not a byte-fallback BPE that leaves texts as they are")
    return _sentencepiece_vocabulary(model, bpe_encoder(model))


def _sentencepiece_vocabulary(
    model: SentencePieceModel, encode: Callable[[str], list[int]]
) -> Vocabulary:
    pieces = list(enumerate(model.pieces))
    return Vocabulary(
        encode=encode,
        spelling={i: piece.spelling() for i, piece in pieces if piece.kind != CONTROL},
        controls={piece.name: i for i, piece in pieces if piece.kind == CONTROL},
        prefix=model.prefix,
    )
