"""Ids equal the libraries'; no text becomes a control token; loading detects damage."""

import base64
import json
import math
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import sentencepiece
import tiktoken
import tokenizer_files
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_files import (
    ALL,
    FILES,
    HF_NAMES,
    LLAMA_IMAGE,
    LLAMA_WORD,
    NUM_RANKS,
    SPELLINGS,
    VOCAB_SIZE,
    hf_root,
    opened,
    ranks,
    ranks_file,
    sentencepiece_file,
    spec_of,
    tokenizer_of,
)

from perception_rt.errors import BackendError, InputError, PackageError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.llm_tokenizer import (
    TokenizerSpec,
    detect_tokenizer,
    open_tokenizer,
)
from perception_rt.processing.llm_vocabulary import CONTROLS, LLAMA_SPECIALS

BYTES = DEFAULT_LIMITS.text_bytes
TEXTS = [
    "", " ", "\n\n", "Hello, world!", "it's IT'S we'll\r\n\r\n  x  ", "12345678 9", "a\0b",
    "\t\t\n", "def f(x):\n        return x",
    "日本語の文章。", "Привет", "e\u0301\u0316", "👨‍👩‍👧", "\ufeffx", "\u2028",
    "<0x0A>", "<s></s><unk>", "\u200b", " " * 40 + "x", "aaaaaaaaaaaaaaaaaaaaa",
]  # fmt: skip


def below_limit(unit):
    return unit * (BYTES // len(unit.encode()))


HOSTILE = {
    "one letter": below_limit("a"),
    "no space": "".join(random.Random(0).choices("abcdefghijklmnopqrstuvwxyz", k=BYTES)),
    "one word": below_limit("thing"),
    "digits": below_limit("1"),
    "punctuation": below_limit("!?"),
    "combining marks": below_limit("\u0301"),
    "marks out of order": below_limit("\u0301\u0316"),
    "emoji": below_limit("👨‍👩‍👧"),
    "ideographs": "".join(chr(c % 20_000 + 0x4E00) for c in range(BYTES // 3)),
    "spaces": below_limit(" "),
    "spaces and a letter": " " * (BYTES - 1) + "a",
    "line breaks": below_limit("\n"),
    "indented lines": below_limit("   \n a"),
    "names of control tokens": below_limit("<|image|>"),
}


def test_names_and_ids_are_those_of_llama():
    tokenizer = tokenizer_of("tiktoken")
    assert len(LLAMA_SPECIALS) == len(set(LLAMA_SPECIALS)) == 256
    assert [tokenizer.control(name) - NUM_RANKS for name in CONTROLS] == [0, 1, 2, 6, 7, 9]
    assert tokenizer.control("<|reserved_special_token_250|>") == NUM_RANKS + 255
    assert tokenizer.end_ids == {NUM_RANKS + 1, NUM_RANKS + 9}
    assert tokenizer.vocab_size == VOCAB_SIZE
    hub = tokenizer_of("hf").controls
    assert [hub[name] - NUM_RANKS for name in HF_NAMES] == list(range(256))
    assert {name for name in hub if hub[name] != tokenizer.controls.get(name)} == {"<|video|>"}


@pytest.mark.parametrize("name", ALL)
def test_a_control_token_comes_from_its_name_only(name):
    tokenizer = tokenizer_of(name)
    ids = [tokenizer.control(control) for control in CONTROLS]
    assert len(set(ids)) == len(CONTROLS)
    assert tokenizer.decode_bytes(ids) == b""
    assert tokenizer.end_ids == {ids[1], ids[5]}
    with pytest.raises(InputError, match=r"no control token '<\|IMAGE\|>'"):
        tokenizer.control("<|IMAGE|>")
    with pytest.raises(TypeError):
        tokenizer.controls["<|image|>"] = 1


@pytest.mark.parametrize(("image", "others"), [
    (1023, [1018, 1019, 1020, 1021, 1022]),
    (1020, [1018, 1019, 1021, 1022, 1023]),
    (256, [1019, 1020, 1021, 1022, 1023]),
])  # fmt: skip
def test_control_tokens_of_bytes_are_the_last_ids(image, others):
    spec = TokenizerSpec(kind="bytes", vocab_size=1024, image_token_id=image)
    tokenizer = open_tokenizer(spec)
    assert tokenizer.control("<|image|>") == image
    assert sorted(set(tokenizer.controls.values()) - {image}) == others
    assert tokenizer.encode_text("é\0") == [0xC3, 0xA9, 0]
    assert tokenizer.decode_bytes([0xC3, 600, 1023, 0xA9]) == "é".encode()


def test_a_vocabulary_of_bytes_has_a_least_size():
    least = TokenizerSpec(kind="bytes", vocab_size=262, image_token_id=261)
    assert sorted(open_tokenizer(least).controls.values()) == list(range(256, 262))
    for size, image, words in ((261, 260, "at least 262 ids, not 261"), (300, 255, "at least 256")):
        with pytest.raises(PackageError, match=words):
            open_tokenizer(TokenizerSpec(kind="bytes", vocab_size=size, image_token_id=image))


def test_ids_equal_those_of_the_libraries():
    """TOK-06, with the libraries called as in the reference."""
    llama = tiktoken.Encoding("x", pat_str=LLAMA_WORD, mergeable_ranks=ranks(), special_tokens={})
    root = hf_root()
    root["added_tokens"] = []
    root["post_processor"] = None
    hub = tokenizers.Tokenizer.from_str(json.dumps(root))
    for text in [*TEXTS, *SPELLINGS, *tokenizer_files.CORPUS]:
        expected = llama.encode_ordinary(text)
        assert tokenizer_of("tiktoken").encode_text(text) == expected, ascii(text)
        assert hub.encode(text).ids == expected, ascii(text)
        assert tokenizer_of("hf").encode_text(text) == expected, ascii(text)
        for name in ("unigram", "bpe"):
            library = sentencepiece.SentencePieceProcessor(model_proto=FILES[name][1]())
            ids = tokenizer_of(name).encode_text(text)
            assert ids == library.encode(text), ascii(text)
            assert tokenizer_of(name).decode(ids) == library.decode(ids)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(max_size=60))
def test_both_kinds_of_llama_files_agree(text):
    ids = tokenizer_of("tiktoken").encode_text(text)
    assert ids == tokenizer_of("hf").encode_text(text)


@pytest.mark.parametrize("name", ALL)
def test_every_spelling_is_plain_text(name):
    """TOK-01: all names of special tokens, anywhere."""
    tokenizer = tokenizer_of(name)
    controls = set(tokenizer.controls.values())
    for spelling in SPELLINGS:
        text = f"{spelling}a{spelling}{spelling} photo {spelling}\n\n{spelling}"
        ids = tokenizer.encode_text(text)
        assert controls.isdisjoint(ids)
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(before=st.text(), spelling=st.sampled_from(SPELLINGS), after=st.text())
def test_user_text_has_no_control_ids(name, before, spelling, after):
    """TOK-01; SentencePiece cannot distinguish a space from U+2581."""
    tokenizer = tokenizer_of(name)
    text = before + spelling + after
    ids = tokenizer.encode_text(text)
    assert all(0 <= i < VOCAB_SIZE for i in ids)
    assert set(tokenizer.controls.values()).isdisjoint(ids)
    assert tokenizer.decode(ids) == text or "\u2581" in text


@pytest.mark.parametrize("name", ALL)
def test_bytes_of_ids_are_joined_as_they_are(name):
    tokenizer = tokenizer_of(name)
    text = "".join(TEXTS)
    ids = tokenizer.encode_text(text)
    one_by_one = [tokenizer.decode_bytes([i]) for i in ids]
    assert b"".join(one_by_one) == tokenizer.decode_bytes(ids) == text.encode()
    assert any("\ufffd" in part.decode(errors="replace") for part in one_by_one)


@pytest.mark.parametrize("name", ALL)
def test_lone_surrogates_are_replaced(name):
    """TOK-06"""
    encode = tokenizer_of(name).encode_text
    assert encode("a\ud800b") == encode("a\ufffdb")
    assert encode("\udc00\ud83d") == encode("\ufffd\ufffd")
    assert encode("\ud83d\ude00") == encode("😀")


@pytest.mark.parametrize("name", ALL)
def test_ids_that_are_not_ids(name):
    tokenizer = tokenizer_of(name)
    assert tokenizer.decode_bytes([VOCAB_SIZE - 1]) == b""
    for bad in (-1, VOCAB_SIZE, 2**70, "3", 1.5, None):
        with pytest.raises(InputError, match=f"from 0 to {VOCAB_SIZE - 1}"):
            tokenizer.decode_bytes([bad])


@pytest.mark.parametrize("name", ALL)
def test_the_limit_on_bytes_is_inclusive(name):
    """TOK-04, SEC-06; text of the chat format before the user's does not count."""
    tokenizer = tokenizer_of(name, Limits(text_bytes=6))
    assert tokenizer.decode(tokenizer.encode_text("ééé")) == "ééé"
    assert tokenizer.decode(tokenizer.encode_text("ééé", before="\n\n")) == "\n\nééé"
    assert tokenizer.encode_text("ab", before="c") == tokenizer.encode_text("cab")
    for text in ("ééé.", "seven..", "\ud800\ud800\ud800"):
        with pytest.raises(InputError, match="the limit is 6"):
            tokenizer.encode_text(text)
    for text in (None, 3, b"a", ["a"]):
        with pytest.raises(InputError, match="must be a string"):
            tokenizer.encode_text(text)


@pytest.mark.parametrize("unit", ["a", "no_space", "\u0301", "👨‍👩‍👧"])
@pytest.mark.parametrize("name", ALL)
def test_a_mebibyte_is_refused(name, unit):
    """TOK-04"""
    text = unit * (2**20 // len(unit.encode()) + 1)
    start = time.thread_time()
    with pytest.raises(InputError, match=f"the limit is {BYTES}"):
        tokenizer_of(name).encode_text(text)
    assert time.thread_time() - start < 0.25


def seconds_of(function, *arguments):
    start = time.thread_time()
    for argument in arguments:
        function(argument)
    return time.thread_time() - start


def best_of(tries, enough, *calls):
    """The least processor time of each call, tried until `enough` says so."""
    best = [math.inf] * len(calls)
    for _ in range(tries):
        best = [min(old, seconds_of(*call)) for old, call in zip(best, calls, strict=True)]
        if enough(*best):
            break
    return best


@pytest.mark.parametrize("name", ALL)
def test_hostile_text_takes_at_most_250_ms(name):
    """TOK-04"""
    tokenizer = tokenizer_of(name)
    for title, text in HOSTILE.items():
        assert BYTES - 32 < len(text.encode()) <= BYTES
        ids = tokenizer.encode_text(text)
        assert tokenizer.decode(ids) == text, title
        calls = (tokenizer.encode_text, text), (tokenizer.decode_bytes, ids)
        assert max(best_of(5, lambda *best: max(best) < 0.25, *calls)) < 0.25, title


@pytest.mark.parametrize("name", ["tiktoken", "hf", "unigram", "bpe"])
def test_time_grows_almost_linearly(name):
    """TOK-04: at most as the length to the power of 1.3."""
    encode = tokenizer_of(name).encode_text
    most = 8**0.3  # of a text over its eight parts
    for title in ("one letter", "no space", "spaces"):
        text = HOSTILE[title]
        parts = [text[i : i + BYTES // 8] for i in range(0, BYTES, BYTES // 8)]
        calls = (encode, text), (encode, *parts)
        whole, in_parts = best_of(40, lambda whole, parts: whole < most * parts, *calls)
        assert whole < most * in_parts, title


def test_threads_may_share_a_tokenizer():
    texts = [*TEXTS, *SPELLINGS[:20], *tokenizer_files.CORPUS] * 4
    for name in ALL:
        tokenizer = tokenizer_of(name)
        serial = [tokenizer.encode_text(text) for text in texts]
        with ThreadPoolExecutor(8) as pool:
            for _ in range(3):
                assert list(pool.map(tokenizer.encode_text, texts)) == serial


def test_hub_tokens_cannot_be_spelled_even_as_whole_words():
    """A vocabulary may contain a control token, and a split may produce it in one piece."""
    root = hf_root()
    root["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False,
    }  # fmt: skip
    root["model"]["vocab"]["<|image|>"] = LLAMA_IMAGE
    plain = {**root, "added_tokens": [], "post_processor": None}
    assert tokenizers.Tokenizer.from_str(json.dumps(plain)).encode("<|image|>").ids == [LLAMA_IMAGE]
    tokenizer = opened("hf", json.dumps(root).encode(), LLAMA_IMAGE)
    ids = tokenizer.encode_text("<|image|>")
    assert LLAMA_IMAGE not in ids
    assert tokenizer.decode(ids) == "<|image|>"


def test_a_space_before_every_text_is_removed_again():
    root = hf_root()
    root["pre_tokenizer"] = {
        "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
    }  # fmt: skip
    data = sentencepiece_file(exact=False)
    for tokenizer in (
        opened("hf", json.dumps(root).encode(), LLAMA_IMAGE),
        opened("sentencepiece", data, tokenizer_files.SENTENCEPIECE_IMAGE),
    ):
        ids = tokenizer.encode_text("a photo")
        assert tokenizer.prefix == b" "
        assert tokenizer.decode_bytes(ids) == b" a photo"
        assert tokenizer.decode(ids) == "a photo"


def test_unknown_pieces_of_sentencepiece():
    data = sentencepiece_file(byte_fallback=False)
    tokenizer = opened("sentencepiece", data, tokenizer_files.SENTENCEPIECE_IMAGE)
    ids = tokenizer.encode_text("a\u0e01b")
    library = sentencepiece.SentencePieceProcessor(model_proto=data)
    assert tokenizer.decode(ids) == library.decode(ids) == "a \u2047 b"


def test_user_defined_symbols_are_refused():
    for symbol in ("<|image|>", "<extra>"):
        controls = tuple(name for name in CONTROLS if name != symbol)
        data = sentencepiece_file(controls=controls, user_defined=(symbol,))
        with pytest.raises(PackageError, match="user-defined"):
            opened("sentencepiece", data, tokenizer_files.SENTENCEPIECE_IMAGE)


@pytest.mark.parametrize("name", FILES)
def test_files_are_recognised(name, tmp_path):
    kind, make, image = FILES[name]
    path = tmp_path / "any.name"
    path.write_bytes(make())
    spec, data = detect_tokenizer(path, vocab_size=VOCAB_SIZE, image_token_id=image)
    assert data == make()
    assert spec.kind == kind
    assert spec.file == ("tokenizer.json" if kind == "hf" else "tokenizer.model")
    assert TokenizerSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    tokenizer = open_tokenizer(spec, data)
    assert tokenizer.encode_text("Hello") == tokenizer_of(name).encode_text("Hello")
    with pytest.raises(InputError, match=rf"<\|image\|> is {image} in the tokenizer and 7 in"):
        detect_tokenizer(path, vocab_size=VOCAB_SIZE, image_token_id=7)
    with pytest.raises(InputError) as too_small:
        detect_tokenizer(path, vocab_size=1, image_token_id=image)
    last = int(re.search(r"ids up to (\d+)", str(too_small.value))[1])
    detect_tokenizer(path, vocab_size=last + 1, image_token_id=image)
    with pytest.raises(InputError, match=rf"ids up to {last}.*ends at {last - 1}"):
        detect_tokenizer(path, vocab_size=last, image_token_id=image)


@pytest.mark.parametrize("data", [
    b"", b"hello", b"\x80\x04pickle", b"PK\x03\x04", b"[1, 2]", b"IQ==", b"\x08\x01",
    b"#version: 0.2\n",
])  # fmt: skip
def test_other_files_are_unknown(data, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(data)
    with pytest.raises(InputError, match="is an unknown tokenizer") as caught:
        detect_tokenizer(path, vocab_size=VOCAB_SIZE, image_token_id=5)
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot be read"):
        detect_tokenizer(tmp_path / "none", vocab_size=VOCAB_SIZE, image_token_id=5)


@pytest.mark.parametrize("name", FILES)
def test_damage_is_found_at_load(name):
    """TOK-07: every truncation and changed bit, if the manifest has the file's digest."""
    kind, make, image = FILES[name]
    data = make()
    spec = spec_of(kind, data, image)
    rng = random.Random(0)
    flips = [(rng.randrange(len(data)), 1 << rng.randrange(8)) for _ in range(100)]
    changed = [data[:i] + bytes([data[i] ^ bit]) + data[i + 1 :] for i, bit in flips]
    cuts = [data[:i] for i in (0, 1, 7, len(data) // 2, len(data) - 1)]
    for damaged in (*changed, *cuts, data + b"\n"):
        with pytest.raises(PackageError, match="damaged"):
            open_tokenizer(spec, damaged)
    with pytest.raises(PackageError, match="needs a file"):
        open_tokenizer(spec, None)


@pytest.mark.parametrize("name", FILES)
def test_a_cut_file_is_not_exported(name, tmp_path):
    """TOK-07, without a digest."""
    _, make, image = FILES[name]
    data = make()
    path = tmp_path / "file"
    for size in [0, 1, 7, len(data) - 2, *random.Random(0).sample(range(len(data) - 2), 40)]:
        path.write_bytes(data[:size])
        with pytest.raises(InputError) as caught:
            detect_tokenizer(path, vocab_size=VOCAB_SIZE, image_token_id=image)
        assert "0x" not in str(caught.value)


def lines(*changes):
    """The ranks file with lines replaced."""
    result = ranks_file().splitlines()
    for index, line in changes:
        result[index] = line
    return b"\n".join(result)


BAD_RANKS = {
    "not all the integers": lines((300, b"enp6enp6 999")),
    "a token twice": lines((300, lines().splitlines()[299].split()[0] + b" 300")),
    "not a token in base64": lines((300, b"enp6enp6enp6 300 x")),
    "and its rank": lines((300, b"enp6enp6e 300")),
    "for every byte": lines((65, base64.b64encode(b"zzzzzz") + b" 65")),
}


@pytest.mark.parametrize("words", BAD_RANKS)
def test_bad_ranks(words):
    with pytest.raises(PackageError, match=words):
        opened("tiktoken", BAD_RANKS[words], LLAMA_IMAGE)


def changed_root(*path, value):
    root = node = hf_root()
    for key in path[:-1]:
        node = node[key]
    node[path[-1]] = value
    return root


BAD_ROOTS = {
    "not an object": [],
    "model is not BPE": changed_root("model", "type", value="Unigram"),
    "not a byte-level": changed_root("pre_tokenizer", value={"type": "Whitespace"}),
    "a byte-level BPE": changed_root("model", "byte_fallback", value=True),
    "changes the text": changed_root("normalizer", value={"type": "NFKC"}),
    "token for every byte": changed_root("model", "vocab", value={"a": 0}),
    "tokens with their ids": changed_root("model", "vocab", "a", value=-1),
    "names with their ids": changed_root("added_tokens", 3, "id", value="3"),
    "added token '<|image|>' twice": changed_root("added_tokens", 3, "content", value="<|image|>"),
    "two ids for an added": changed_root("model", "vocab", "<|image|>", value=5),
    "an id twice": changed_root("added_tokens", 3, "id", value=5),
    "does not have <|eot_id|>": changed_root("added_tokens", 9, "content", value="<|eot|>"),
    "ids up to 1099511627776": changed_root("added_tokens", 255, "id", value=2**40),
    "JSON is not one that": changed_root("model", "merges", value=[["a", "zzzz"]]),
}


@pytest.mark.parametrize("words", BAD_ROOTS)
def test_bad_hub_files(words):
    data = json.dumps(BAD_ROOTS[words]).encode()
    with pytest.raises(PackageError) as caught:
        opened("hf", data, LLAMA_IMAGE)
    assert words in str(caught.value)


def test_hub_files_that_are_not_json():
    for data in (b"{", b"[" * 100_000, b'{"model": \xff}'):
        with pytest.raises(PackageError, match="not JSON"):
            opened("hf", data, LLAMA_IMAGE)


def test_mutated_hub_files_load_or_are_refused():
    """TOK-07: an untrusted file causes no errors but ours."""
    rng = random.Random(0)
    junk = [None, True, -1, 2**63, 1.5, "", "\ud800", [], {}, [["a"]], {"type": "ByteLevel"}]
    for _ in range(150):
        root = node = hf_root()
        while True:
            key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
            if not node[key] or not isinstance(node[key], dict | list) or rng.random() < 0.3:
                break
            node = node[key]
        node[key] = rng.choice(junk)
        try:
            tokenizer = opened("hf", json.dumps(root).encode(), LLAMA_IMAGE)
        except PackageError:
            continue
        assert LLAMA_IMAGE not in tokenizer.encode_text("a <|image|> 日本\n")


@pytest.mark.parametrize("name", FILES)
def test_a_missing_library_is_named(name, monkeypatch):
    kind, make, image = FILES[name]
    data = make()
    monkeypatch.setitem(sys.modules, "tokenizers" if kind == "hf" else kind, None)
    with pytest.raises(BackendError, match=r'pip install "perception_rt\[plm\]"'):
        opened(kind, data, image)


@pytest.mark.parametrize(("changes", "words"), [
    ({"kind": "wordpiece"}, "must be one of"),
    ({"kind": "tiktoken"}, "has a file and its sha256"),
    ({"file": "tokenizer.model"}, "unless its kind is 'bytes'"),
    ({"image_token_id": 1024}, "1024 is not in 0 to 1023"),
    ({"image_token_id": -1}, "-1 is not in"),
    ({"pattern": "x"}, "unknown keys"),
])  # fmt: skip
def test_specs_are_checked(changes, words):
    values = {"kind": "bytes", "vocab_size": 1024, "image_token_id": 1023}
    with pytest.raises(InputError, match=words):
        TokenizerSpec.from_dict(values | changes)
