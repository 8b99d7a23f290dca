"""The tokenizer of PE's text tower: OpenAI CLIP's byte-pair encoding, with equal ids.

User text never becomes a control token: `<end_of_text>` in a caption is thirteen plain characters.
Time is bounded for hostile text: merging is not quadratic, and repairs that ftfy repeats until
nothing changes are repeated a limited number of times.

Legend: N texts.
"""

import functools
import gzip
import hashlib
import heapq
import html
import os
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, islice, pairwise, product
from pathlib import Path
from typing import Literal

import ftfy
import numpy as np
import regex
from ftfy import fixes
from ftfy.badness import is_bad
from numpy.typing import NDArray

from perception_rt.errors import InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.byte_symbols import byte_symbols
from perception_rt.records import Record, check_integer, check_text

VOCAB_SIZE = 49408
SOT = 49406
EOT = 49407
PAD = 0
MIN_CONTEXT = 2  # the start and end tokens

_VOCAB_FILE = Path(__file__).parent / "assets" / "bpe_simple_vocab_16e6.txt.gz"
_VOCAB_SHA256 = "924691ac288e54409236115652ad4aa250f48203de50a9e4722a6ecd48d6804a"
_NUM_BYTES = 256
_NUM_MERGES = SOT - 2 * _NUM_BYTES
_VOCAB_BYTES = 1_356_917
_WORD_END = "</w>"
_GONE = -1

_PIECE = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+", regex.IGNORECASE)

# Bounds the cache of words to a few MiB.
_CACHED_WORD_BYTES = 48
CACHED_WORDS = 8192

# Real text is escaped at most two or three times; each pass repairs the whole text.
_MAX_PASSES = 8
# Lines with a broken encoding are repaired one by one, at 0.1 ms each.
_MAX_REPAIRED_LINES = 1024
_LINE = regex.compile(r"[^\n]*\n|[^\n]+")
_LONG_MARKS = regex.compile(r"\p{M}{32,}")

_REPAIRS = (
    fixes.fix_c1_controls,
    fixes.fix_latin_ligatures,
    fixes.fix_character_width,
    fixes.uncurl_quotes,
    fixes.fix_line_breaks,
    fixes.fix_surrogates,
    fixes.remove_terminal_escapes,
    fixes.remove_control_chars,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TextSpec(Record):
    """Text preprocessing of a model, and its scale of cosines.

    Attributes:
        tokenizer: "clip_bpe", or None for a vocabulary without a tokenizer here.
        context_length: tokens per text.
        logit_scale: learned factor on cosines before a softmax.
    """

    tokenizer: Literal["clip_bpe", None]
    context_length: int
    logit_scale: float


class ClipTokenizer:
    """Encodes texts as rows of token ids of a fixed length, and decodes ids.

    Immutable; threads may share an instance.

    Attributes:
        context_length: ids per text.
        vocabulary: the ids and merges.
    """

    def __init__(
        self,
        *,
        context_length: int,
        limits: Limits = DEFAULT_LIMITS,
        vocab_path: str | os.PathLike[str] | None = None,
    ) -> None:
        """Loads the vocabulary.

        Args:
            context_length: ids per text, including the start and end tokens; at least 2.
            limits: bounds the UTF-8 size of each text.
            vocab_path: a copy of CLIP's vocabulary file; None for the library's own.

        Raises:
            InputError: the context length is not an integer of at least 2.
            PackageError: the vocabulary file is missing, or its SHA-256 is not the known one.
        """
        self.context_length = check_integer("context_length", context_length, MIN_CONTEXT)
        self._limits = limits
        self.vocabulary = _load_vocabulary(_VOCAB_FILE if vocab_path is None else Path(vocab_path))

    def __call__(self, texts: Sequence[str]) -> NDArray[np.int64]:
        """Encodes texts for the text tower.

        Args:
            texts: a list of strings; a single string must be put in a list.

        Returns:
            int64 (N, context_length): start token, ids of the text truncated to fit, end token,
            then zeros.

        Raises:
            InputError: as `encode`, or `texts` is not a list of strings.
        """
        if isinstance(texts, str | bytes) or not isinstance(texts, Sequence):
            raise InputError(f"texts must be a list of strings, not {type(texts).__name__}")
        tokens = np.full((len(texts), self.context_length), PAD, np.int64)
        for row, text in zip(tokens, texts, strict=True):
            # Ids beyond the context length are never computed.
            ids = [SOT, *islice(self._ids(text), self.context_length - 2), EOT]
            row[: len(ids)] = ids
        return tokens

    def encode_labels(self, labels: Sequence[str], templates: Sequence[str]) -> NDArray[np.int64]:
        """Encodes every label in every template, int64 (L * T, context_length), label by label.

        Args:
            labels: L strings.
            templates: T strings with `{}` for the label.

        Raises:
            InputError: as `encode`; there is no label or template, or one is unusable; or a
                template pushes a label, or its end, past the context length, which would cut it.
        """
        if not labels or not all(isinstance(label, str) for label in labels):
            raise InputError("labels must be at least one string")
        if not templates or not all(isinstance(t, str) and "{}" in t for t in templates):
            raise InputError("templates must be strings that contain {}")
        pairs = list(product(labels, templates))
        tokens = self([template.replace("{}", label) for label, template in pairs])
        room = self.context_length - MIN_CONTEXT
        for (label, template), row in zip(pairs, tokens, strict=True):
            before = template.partition("{}")[0]
            if row[-1] != EOT or not before.strip():
                continue  # it fits, or the label comes first
            count = len(self.encode(before + label))
            if count > room:
                raise InputError(
                    f"label {label!r:.60} does not fit behind {before!r:.60} of its template: "
                    f"together they have {count} tokens, and the context has {room}. Shorten the "
                    "template or the label"
                )
        return tokens

    def encode(self, text: str) -> list[int]:
        """Returns all ids of a text, below 49406, without start and end tokens.

        A lone surrogate becomes U+FFFD, and control characters such as NUL are dropped.

        Raises:
            InputError: `text` is not a string, is longer than `limits.text_bytes` in UTF-8, or is
                escaped or damaged so often that its repair would take too long.
        """
        return list(self._ids(text))

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids, with a space after each word.

        Start and end tokens and everything after the end token are left out.

        Raises:
            InputError: an id is not an integer from 0 to 49407.
        """
        data = bytearray()
        for value in ids:
            token = int(value) if isinstance(value, int | np.integer) else -1
            if not 0 <= token < VOCAB_SIZE:
                raise InputError(f"a token id must be an integer from 0 to {VOCAB_SIZE - 1}")
            if token == EOT:
                break
            if token != SOT:
                data += self.vocabulary.spelling[token]
        return data.decode("utf-8", errors="replace")

    def _ids(self, text: str) -> Iterator[int]:
        check_text("a text", text, self._limits.text_bytes)
        for cleaned in _clean(text):
            for piece in _PIECE.finditer(cleaned):
                yield from self.vocabulary.encode_word(piece.group().encode("utf-8"))


class ClipVocabulary:
    """CLIP's merges as ids. Ids follow the order of the merges, so an id is its own rank.

    Attributes:
        spelling: the bytes of each id.
        cached_merge: `merge` with a bounded cache.
    """

    def __init__(self, text: str) -> None:
        symbols = byte_symbols()
        # One id per byte, one per byte at the end of a word, then one per merge.
        ids = {symbol: i for i, symbol in enumerate(symbols.values())}
        ids |= {symbol + _WORD_END: i + _NUM_BYTES for symbol, i in ids.items()}
        self.spelling = [bytes([value]) for value in symbols]
        self.spelling += [spelling + b" " for spelling in self.spelling]
        self._merged: dict[tuple[int, int], int] = {}
        for line in text.split("\n")[1 : _NUM_MERGES + 1]:
            left, right = line.split()
            self._merged[ids[left], ids[right]] = len(ids)
            self.spelling.append(self.spelling[ids[left]] + self.spelling[ids[right]])
            ids[left + right] = len(ids)
        assert len(ids) == SOT  # the file's digest was checked
        self._id_of_byte = [ids[symbols[value]] for value in range(_NUM_BYTES)]
        self.cached_merge = functools.lru_cache(maxsize=CACHED_WORDS)(self.merge)

    def encode_word(self, word: bytes) -> tuple[int, ...]:
        """Returns the ids of a non-empty word; short words are cached."""
        if len(word) <= _CACHED_WORD_BYTES:
            return self.cached_merge(word)
        return self.merge(word)

    def merge(self, word: bytes) -> tuple[int, ...]:
        """Returns the ids of a non-empty word, without the cache.

        Merges pairs by rank, lowest first, and from left to right within a rank. Each rank has a
        list of its places, and a heap holds the ranks. A merge makes an id above its own rank and
        so only pairs of higher ranks; each rank comes up once.
        """
        ids = [self._id_of_byte[value] for value in word]
        ids[-1] += _NUM_BYTES
        end = len(ids)
        before, after = list(range(-1, end - 1)), list(range(1, end + 1))
        places: dict[int, list[int]] = {}
        for i, pair in enumerate(pairwise(ids)):
            rank = self._merged.get(pair)
            if rank is not None:
                places.setdefault(rank, []).append(i)
        ranks = list(places)
        heapq.heapify(ranks)
        while ranks:
            rank = heapq.heappop(ranks)
            for i in sorted(places.pop(rank)):
                j = after[i]
                if j >= end or self._merged.get((ids[i], ids[j])) != rank:
                    continue  # an earlier merge consumed one of the pair
                ids[i], ids[j] = rank, _GONE
                after[i] = after[j]
                if after[j] < end:
                    before[after[j]] = i
                for a, b in ((before[i], i), (i, after[i])):
                    new = self._merged.get((ids[a], ids[b])) if a >= 0 and b < end else None
                    if new is None:
                        continue
                    if new not in places:
                        places[new] = []
                        heapq.heappush(ranks, new)
                    places[new].append(a)
        return tuple(i for i in ids if i != _GONE)


def _load_vocabulary(path: Path) -> ClipVocabulary:
    try:
        with path.open("rb") as file:
            data = file.read(_VOCAB_BYTES + 1)
    except OSError as error:
        raise PackageError(f"vocabulary {path.name} cannot be read: {error.strerror}") from None
    digest = hashlib.sha256(data).hexdigest()
    if digest != _VOCAB_SHA256:
        raise PackageError(
            f"vocabulary {path.name} has SHA-256 {digest}, not {_VOCAB_SHA256}: it is damaged"
        )
    return _parse_vocabulary(data)


@functools.lru_cache(maxsize=1)
def _parse_vocabulary(data: bytes) -> ClipVocabulary:
    """Parses the file; cached, since the digest allows only one argument."""
    return ClipVocabulary(gzip.decompress(data).decode("utf-8"))


def _clean(text: str) -> Iterator[str]:
    """Repairs, unescapes and lower-cases a text, in parts that no piece spans.

    Unlike the original, does not collapse white space, since pieces never contain any.
    """
    for part in repair(text):
        try:
            yield html.unescape(html.unescape(part)).lower()
        except ValueError:  # int() rejects thousands of digits
            raise InputError("a text has a character reference with too many digits") from None


def repair(text: str) -> Iterator[str]:
    """Yields the result of `ftfy.fix_text` in parts, in bounded time.

    ftfy works line by line, which takes seconds for a text of line breaks, and repeats each line
    until it no longer changes, which `&amp;amp;amp;...` makes quadratic. Most repairs are local to
    a line, so all lines are repaired at once, unless a line may have a broken encoding.
    """
    tag = text.find("<")  # from its line on, ftfy assumes HTML and keeps escapes
    start = len(text) if tag < 0 else text.rfind("\n", 0, tag) + 1
    for part, unescape in ((text[:start], True), (text[start:], False)):
        whole = _repair_segment(part, unescape, _unless_suspect)
        if whole is not None:
            yield whole
            continue
        for count, line in enumerate(_LINE.findall(part)):
            if count == _MAX_REPAIRED_LINES:
                raise InputError(
                    f"a text has a broken encoding and more than {_MAX_REPAIRED_LINES} lines"
                )
            yield _repair_segment(line, unescape, ftfy.fix_encoding) or ""


def _repair_segment(
    text: str, unescape: bool, fix_encoding: Callable[[str], str | None]
) -> str | None:
    """Repairs like ftfy, until nothing changes; None as soon as `fix_encoding` returns None."""
    for _ in range(_MAX_PASSES):
        before = text
        if unescape:
            text = fixes.unescape_html(text)
        fixed = fix_encoding(text)
        if fixed is None:
            return None
        text = fixed
        for step in _REPAIRS:
            text = step(text)
        text = unicodedata.normalize("NFC", _LONG_MARKS.sub(_sort_marks, text))
        if text == before:
            return text
    raise InputError(f"a text is escaped more than {_MAX_PASSES - 2} times over")


def _unless_suspect(text: str) -> str | None:
    """The text if ftfy would keep the encoding of all its lines, else None."""
    if text.isascii():
        return text
    # Checks the text and its lines, since ftfy's patterns may depend on the start of a line, or
    # span line breaks that ftfy does not recognise.
    suspect = is_bad(text) or any(map(is_bad, set(text.split("\n"))))
    return None if suspect else text


def _sort_marks(run: regex.Match[str]) -> str:
    """Sorts a run of marks in canonical order, for which NFC would take quadratic time."""
    return "".join(
        "".join(sorted(marks, key=unicodedata.combining) if movable else marks)
        for movable, marks in groupby(run.group(), key=lambda mark: unicodedata.combining(mark) > 0)
    )
