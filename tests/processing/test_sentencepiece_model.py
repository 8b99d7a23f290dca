"""A SentencePiece BPE in Python gives the library's ids, and takes no model that it cannot."""

import random
import sys
import time

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import CORPUS, SENTENCEPIECE_IMAGE, opened, sentencepiece_file

from perception_rt.demo import language_model_path
from perception_rt.errors import PackageError
from perception_rt.limits import DEFAULT_LIMITS
from perception_rt.processing.llm_tokenizer import Tokenizer, TokenizerSpec, open_tokenizer

DEMO = (language_model_path() / "tokenizer.model").read_bytes()
TRAINED = sentencepiece_file(model_type="bpe")
LIBRARY = {data: sentencepiece.SentencePieceProcessor(model_proto=data) for data in (DEMO, TRAINED)}
TEXTS = [
    "", " ", "  a  ", "Where is the 5?", "[125,343,390,781]", "a\0b", "\n\n\t", "\u2581x",
    "caf\u00e9", "\U0001f468\u200d\U0001f469", "<|image|><0x0A><unk>", "a" * 300, " " * 100 + "x",
]  # fmt: skip


def tokenizer_of(data: bytes) -> Tokenizer:
    return opened("bpe", data, 3 if data is DEMO else SENTENCEPIECE_IMAGE)


@pytest.mark.parametrize("data", [DEMO, TRAINED], ids=["demo", "trained"])
def test_ids_are_the_library_s(data: bytes) -> None:
    tokenizer = tokenizer_of(data)
    for text in [*TEXTS, *CORPUS]:
        ids = tokenizer.encode_text(text)
        assert ids == LIBRARY[data].encode(text), ascii(text)
        assert tokenizer.decode(ids) == LIBRARY[data].decode(ids), ascii(text)


@settings(max_examples=80, deadline=None)
@given(st.text(st.sampled_from("aehinorst .,?[]0123456789\n\u2581\u00e9<|image>"), max_size=60))
def test_ids_of_any_text_are_the_library_s(text: str) -> None:
    for data, library in LIBRARY.items():
        assert tokenizer_of(data).encode_text(text) == library.encode(text)


def test_it_needs_no_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    assert tokenizer_of(DEMO).decode(tokenizer_of(DEMO).encode_text("Read it.")) == "Read it."


@pytest.mark.parametrize(
    "data",
    [
        sentencepiece_file(),
        sentencepiece_file(model_type="bpe", exact=False),
        sentencepiece_file(model_type="bpe", byte_fallback=False),
    ],
    ids=["unigram", "normalised", "without bytes"],
)
def test_other_models_are_refused(data: bytes) -> None:
    with pytest.raises(PackageError, match="not a byte-fallback BPE that leaves texts"):
        opened("bpe", data, SENTENCEPIECE_IMAGE)


def test_damaged_models_raise_nothing_else() -> None:
    rng = random.Random(0)
    for _ in range(200):
        damaged = bytearray(DEMO)
        for _ in range(rng.randrange(1, 4)):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        try:
            tokenizer = opened("bpe", bytes(damaged), 3)
        except PackageError:
            continue
        assert 3 not in tokenizer.encode_text("a <|image|> 5")


def test_a_long_text_takes_little_time() -> None:
    spec = TokenizerSpec(kind="bpe", file="t", sha256="0" * 64, vocab_size=512, image_token_id=3)
    assert spec.kind == "bpe"
    tokenizer = tokenizer_of(DEMO)
    for unit in ("a", "the ", "1", " "):
        text = unit * (DEFAULT_LIMITS.text_bytes // len(unit))
        start = time.perf_counter()
        tokenizer.encode_text(text)
        assert time.perf_counter() - start < 5  # quadratic time would be minutes
    with pytest.raises(PackageError, match="SHA-256"):
        open_tokenizer(spec, DEMO)
