"""Constrained answers: always valid, whatever the sampling and the batch."""

import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import llguidance
import numpy as np
import pytest

import perception_rt as prt
from perception_rt.runtime.generation.json_closer import JsonCloser

SCHEMA = {
    "type": "object",
    "properties": {
        "n": {"type": "integer", "minimum": -5, "maximum": 50},
        "s": {"type": "string", "maxLength": 2},
        "k": {"enum": ["a", "b"]},
    },
    "required": ["n", "s", "k"],
    "additionalProperties": False,
}
CHOICES = ["yes", "yes, two", " no", 'a "b" \\ c']
REGEX = r"[0-9]{1,3}/(cm|mm)\n[a-z]?"
ASKED = "How many digits are there?"


def follows_schema(text: str) -> bool:
    value = json.loads(text)
    assert list(value) == ["n", "s", "k"]
    assert type(value["n"]) is int and isinstance(value["s"], str) and len(value["s"]) <= 2
    return -5 <= value["n"] <= 50 and value["k"] in ("a", "b")


FORMS: list[tuple[dict[str, Any], Any]] = [
    ({"json_schema": SCHEMA}, follows_schema),
    ({"choices": CHOICES}, CHOICES.__contains__),
    ({"regex": REGEX}, re.compile(REGEX).fullmatch),
]


@pytest.fixture(scope="module")
def plm() -> Iterator[prt.Generator]:
    with prt.load("demo:plm", threads=1) as generator:
        assert isinstance(generator, prt.Generator)
        yield generator


def test_a_hundred_sampled_answers_follow_the_schema(plm: prt.Generator) -> None:
    requests = [
        prt.Request(ASKED, json_schema=SCHEMA, temperature=1.0, seed=seed) for seed in range(100)
    ]
    results = plm.generate_batch(requests)
    assert {result.finish_reason for result in results} == {"stop"}
    assert all(follows_schema(result.text) for result in results)
    assert len({result.text for result in results}) > 15


def test_answers_end_without_bounds_on_numbers_and_strings(plm: prt.Generator) -> None:
    free = {name: {"type": name} for name in ("string", "integer", "number")}
    free["a"] = {"type": "array", "items": {"type": "integer"}, "minItems": 2}
    schema = {"type": "object", "properties": free, "required": list(free)}
    schema["additionalProperties"] = False
    for form in (schema, {"type": "object"}):
        requests = [
            prt.Request(ASKED, json_schema=form, temperature=float(seed > 0), seed=seed)
            for seed in range(20)
        ]
        for result in plm.generate_batch(requests):
            assert result.finish_reason == "stop" and isinstance(json.loads(result.text), dict)


def test_the_closing_token_of_json() -> None:
    spellings = [b'"', b"}", b"]", b",", b"{", b"a", b"\\", b'": [1', b'"}', b""]
    ids = {data: token for token, data in enumerate(spellings)}

    def closer(text: list[bytes], *allowed: bytes) -> bytes | None:
        found = JsonCloser(spellings, ids)
        for data in text:
            found.push(ids[data])
        token = found.closer(np.isin(np.arange(len(spellings)), [ids[data] for data in allowed]))
        return None if token is None else spellings[token]

    everything = spellings[:-1]
    assert closer([b"{", b'"', b"a"], *everything) == b'"'
    assert closer([b"{", b'"', b"a", b"\\", b'"'], *everything) == b'"'
    assert closer([b"{", b'"', b"a", b"\\"], b"a") is None
    assert closer([b"{", b'"', b"a", b'": [1'], *everything) == b"}"
    assert closer([b"{", b'"', b"a", b'": [1'], b"]", b",") == b"]"
    assert closer([b"{", b'"', b"a", b'": [1'], b",", b"a") == b","
    assert closer([b"{", b'"', b'"}'], b"a", b'"') is None


@pytest.mark.parametrize(
    "sampling",
    [
        {},
        {"temperature": 1.5, "top_p": 0.5},
        {"temperature": 1.0, "top_k": 3, "repetition_penalty": 1.5},
    ],
)
def test_a_mixed_batch_gives_what_each_request_gives_alone(
    plm: prt.Generator, sampling: dict
) -> None:
    plain = [prt.Request("Is there a 4?", max_new_tokens=12, seed=1, **sampling)] * 2
    forms = [prt.Request(ASKED, seed=2, **sampling, **fields) for fields, _ in FORMS]
    results = plm.generate_batch([plain[0], *forms, plain[1]])
    alone = [plm.generate_batch([request])[0] for request in (plain[0], *forms, plain[1])]
    assert [result.tokens for result in results] == [result.tokens for result in alone]
    for result, (_, valid) in zip(results[1:4], FORMS, strict=True):
        assert result.finish_reason == "stop" and valid(result.text), result.text


def test_streamed_pieces_are_the_answer(plm: prt.Generator) -> None:
    for fields, valid in FORMS:
        options = {"temperature": 1.0, "seed": 3, **fields}
        pieces = list(plm.stream(ASKED, **options))
        assert valid("".join(pieces)) and "".join(pieces) == plm.generate(ASKED, **options).text


def test_lookup_gives_the_same_answer_in_fewer_steps(plm: prt.Generator) -> None:
    for fields, _ in FORMS:
        plain = plm.generate(ASKED, **fields)
        # Drafts that are right, and drafts that the constraint forbids.
        for expected in (plain.tokens, [*plain.tokens[:2], *plain.tokens[:1] * 6]):
            found = plm.generate(ASKED, lookup=True, lookup_tokens=expected, **fields)
            assert (found.text, found.tokens) == (plain.text, plain.tokens)
    quoted = f"Say {plm.generate(ASKED, json_schema=SCHEMA).text} again."
    plain, found = (plm.generate(quoted, json_schema=SCHEMA, lookup=on) for on in (False, True))
    assert found.tokens == plain.tokens and found.timings.steps < plain.timings.steps


def test_an_answer_that_is_cut_says_so(plm: prt.Generator) -> None:
    result = plm.generate(ASKED, json_schema=SCHEMA, max_new_tokens=3)
    assert (result.finish_reason, len(result.tokens)) == ("length", 3)
    assert '{"n": '.startswith(result.text[:6])
    result = plm.generate(ASKED, regex="ab+", stop=["bb"], temperature=1.0, seed=0, top_k=2)
    assert result.finish_reason == "stop" and result.text in ("a", "ab")


REFUSED = [
    ({"regex": "("}, "regex cannot be used: unclosed group"),
    ({"regex": "(?=a)b"}, "regex cannot be used: look-around"),
    ({"choices": ["\ud800"]}, "choices cannot be used: "),
    ({"json_schema": {"type": "word"}}, "json_schema cannot be used: Invalid type: word"),
    ({"json_schema": {"not": {}}}, r'cannot be used: Unimplemented keys: \["not"\]'),
    ({"json_schema": {"x-guidance": {"style": 1}, "type": "null"}}, "unknown field `style`"),
    ({"json_schema": {}, "regex": "a"}, "json_schema and regex cannot both be given"),
    ({"choices": ["a"], "ignore_eos": True}, "choices cannot be followed with ignore_eos"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_refused(plm: prt.Generator, fields: dict, message: str) -> None:
    with pytest.raises(prt.InputError, match=message) as caught:
        plm.generate(ASKED, **fields)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    requests = [prt.Request(ASKED, max_new_tokens=1), prt.Request(ASKED, **fields)]
    with pytest.raises(prt.InputError, match=f"request 1: .*{message}"):
        plm.generate_batch(requests)


def test_choices_may_be_many(plm: prt.Generator) -> None:
    choices = [f"choice {number}" for number in range(5000)]
    assert plm.generate(ASKED, choices=choices, temperature=1.0, seed=1).text in choices


def test_a_schema_without_an_answer_is_refused_before_it_runs(plm: prt.Generator) -> None:
    with pytest.raises(prt.InputError, match="json_schema cannot be followed: no token"):
        plm.submit(prt.Request(ASKED, json_schema={"$ref": "#"}))


def test_a_schema_without_a_bottom_is_refused(plm: prt.Generator) -> None:
    deep: dict[str, Any] = {"type": "null"}
    for _ in range(400):
        deep = {"items": deep}
    with pytest.raises(prt.InputError, match="json_schema cannot be used: recursion limit"):
        plm.generate(ASKED, json_schema=deep)
    deep["items"] = deep
    with pytest.raises(prt.InputError, match="json_schema cannot be written as JSON: Circular"):
        plm.generate(ASKED, json_schema=deep)


def test_a_grammar_that_becomes_too_complex_ends_one_request_only(
    plm: prt.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = functools.partial(llguidance.LLParserLimits, max_lexer_states=10)
    with monkeypatch.context() as patch:
        patch.setattr(llguidance, "LLParserLimits", small)
        hard = plm.submit(prt.Request(ASKED, regex="(a|b)*a(a|b){5}c"))
    other = plm.submit(prt.Request(ASKED, choices=["one"]))
    with pytest.raises(prt.InputError, match=r"regex cannot be followed: .* too many states"):
        hard.result()
    assert other.result().text == "one"
    assert plm.stats.running == 0


def test_white_space_and_style_are_up_to_the_schema(plm: prt.Generator) -> None:
    schema = {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}
    assert plm.generate(ASKED, json_schema=schema).text == "[1, 1]"
    style = {"item_separator": ","}
    assert plm.generate(ASKED, json_schema={**schema, "x-guidance": style}).text == "[1,1]"


def test_the_missing_library_is_named(plm: prt.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(prt.BackendError, match=r"choices needs llguidance: pip install .*guided"):
        plm.generate(ASKED, choices=["a"])
    assert plm.generate(ASKED, max_new_tokens=1).tokens
