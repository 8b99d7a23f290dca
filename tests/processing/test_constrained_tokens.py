"""Constraints with every kind of tokenizer: random tokens that are allowed give valid texts."""

import functools
import json
import re

import numpy as np
import pytest
import tokenizer_files
from tokenizer_files import ALL, LLAMA_IMAGE, hf_root, opened, sentencepiece_file, tokenizer_of

from perception_rt.errors import InputError
from perception_rt.runtime.generation.constraint import ConstraintCompiler
from perception_rt.runtime.generation.sampling import Sampler
from perception_rt.runtime.request import Request

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 3},
        "kind": {"enum": ["digit", "dice"]},
        "seen": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2},
    },
    "required": ["name", "kind", "seen"],
    "additionalProperties": False,
}
CHOICES = ["yes", "yes, two", " no", 'a "b" \\ c', "caf\u00e9 \U0001f600\n", "<|eot_id|>"]
REGEX = r"[0-9]{1,3}/(cm|mm)\n[a-z\u00e9]?"


def follows_schema(text):
    value = json.loads(text)
    assert list(value) == ["name", "kind", "seen"] and len(value["name"]) <= 3
    return value["kind"] in ("digit", "dice") and set(value["seen"]) <= {True, False}


FORMS = {
    "schema": ({"json_schema": SCHEMA}, follows_schema),
    "choices": ({"choices": CHOICES}, CHOICES.__contains__),
    "regex": ({"regex": REGEX}, re.compile(REGEX).fullmatch),
}


@functools.cache
def tokenizer(name):
    if name == "hf with a space":
        root = hf_root()
        root["pre_tokenizer"] = {
            "type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True,
        }  # fmt: skip
        return opened("hf", json.dumps(root).encode(), LLAMA_IMAGE)
    if name == "sentencepiece with a space":
        data = sentencepiece_file(exact=False)
        return opened("sentencepiece", data, tokenizer_files.SENTENCEPIECE_IMAGE)
    return tokenizer_of(name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", [*ALL, "hf with a space", "sentencepiece with a space"])
def test_random_answers_are_valid_with_every_tokenizer(name, form):
    fields, valid = FORMS[form]
    vocabulary = tokenizer(name)
    compiler = ConstraintCompiler(vocabulary)
    found = set()
    for seed in range(8):
        constraint = compiler.compile(Request("a", **fields))
        sampler = Sampler(temperature=1.0, seed=seed, constraint=constraint)
        tokens = []
        while not tokens or tokens[-1] not in vocabulary.end_ids:
            tokens.append(sampler.choose(np.zeros(vocabulary.vocab_size, np.float32)))
            assert len(tokens) < 200
        assert sampler.choose(np.zeros(vocabulary.vocab_size)) in vocabulary.end_ids
        text = vocabulary.decode(tokens)
        assert valid(text), text
        found.add(text)
    assert len(found) > 2


def test_a_text_that_no_tokens_spell_is_refused():
    data = sentencepiece_file(byte_fallback=False)
    vocabulary = opened("sentencepiece", data, tokenizer_files.SENTENCEPIECE_IMAGE)
    compiler = ConstraintCompiler(vocabulary)
    with pytest.raises(InputError, match="choices cannot be followed: no token of the vocabulary"):
        compiler.compile(Request("a", choices=["\u20ac"])).allowed()
    both = compiler.compile(Request("a", choices=["a\u20ac", "ab"]))
    both.accept(vocabulary.encode_text("a")[0])
    assert vocabulary.decode(np.flatnonzero(both.allowed())) == "b"
