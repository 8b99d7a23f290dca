"""Every field of a request: at its bounds, beyond them, and of another type."""

import math
import re
from dataclasses import fields, replace
from typing import get_type_hints

import numpy as np
import pytest

from perception_rt.errors import InputError
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.runtime.request import (
    Exchange,
    Request,
    RequestOptions,
    Result,
    Timings,
    check_request,
)

BIG = 2**63


def check(limits: Limits = DEFAULT_LIMITS, **changes: object) -> None:
    request = replace(Request("Why?"), **changes)
    bounds = {"vocab_size": 320, "max_length": 2048, "max_tiles": 36, "max_frames": 32}
    check_request(request, **bounds, limits=limits)


@pytest.mark.parametrize(
    "changes",
    [
        {"prompt": ""},
        {"max_new_tokens": 1},
        {"max_new_tokens": BIG - 1},  # bounded by the context later
        {"temperature": 0},
        {"temperature": 1e-9},
        {"temperature": 5},
        {"top_k": 1},
        {"top_k": 320},
        {"top_p": 1},
        {"top_p": 1e-9},
        {"seed": 0},
        {"seed": BIG - 1},
        {"max_tiles": 0},
        {"max_tiles": 36},
        {"num_frames": 1},
        {"num_frames": 32},
        {"deadline_s": 0},
        {"deadline_s": 0.5},
        {"stop": ("a",)},
        {"stop": ["a"] * 16},
        {"stop": ["a" * 256]},
        {"lookup": True},
        {"on_progress": print},
        {"ignore_eos": True},
        {"lookup": True, "lookup_tokens": [0, 319]},
        {"lookup": True, "lookup_tokens": (5,) * 2048},
        {"history": (Exchange(prompt="a", answer=""),)},
        {"history": [Exchange(prompt="a", answer="b")] * 256},
        {"prompt": "a" * 256 * 1024},
        {"literal": True},
        {"repetition_penalty": 1},
        {"repetition_penalty": 0.01},
        {"repetition_penalty": 100},
        {"history": [Exchange(prompt="a", answer="b", literal=True)]},
        {"max_new_tokens": np.int64(3), "top_k": np.uint8(4), "seed": np.int32(5)},
        {"max_tiles": np.int16(2), "num_frames": np.uint64(2)},
        {"temperature": np.float32(0.5), "top_p": np.float64(0.5), "deadline_s": np.float16(2)},
        {"repetition_penalty": np.float32(1.5), "temperature": np.int64(1)},
        {"json_schema": {}},
        {"choices": ("a", "b"), "lookup": True},
        {"regex": "a" * 65536},
    ],
)
def test_accepted(changes: dict) -> None:
    """GEN-05, GEN-06: each at its bound."""
    check(**changes)


REFUSED = [
    ("prompt", 5, "a string, not 5"),
    ("prompt", None, "a NoneType"),
    ("prompt", b"a", "a bytes"),
    ("max_new_tokens", 0, "of at least 1, not 0"),
    ("max_new_tokens", -1, "of at least 1, not -1"),
    ("max_new_tokens", True, "not True"),
    ("max_new_tokens", BIG, f"not {BIG}"),
    ("max_new_tokens", 2**64, "an integer of 65 bits"),
    ("max_new_tokens", 1.0, "not 1.0"),
    ("max_new_tokens", None, "a NoneType"),
    ("temperature", -0.1, "not -0.1"),
    ("temperature", math.inf, "not inf"),
    ("temperature", math.nan, "not nan"),
    ("temperature", True, "not True"),
    ("temperature", "1", "a str"),
    ("temperature", 10**400, "bits"),
    ("temperature", None, "a NoneType"),
    ("top_p", 0, "above 0"),
    ("top_p", 0.0, "above 0"),
    ("top_p", 1.0001, "from 0 to 1, not 1.0001"),
    ("top_p", -1, "not -1"),
    ("top_p", math.nan, "not nan"),
    ("top_p", True, "not True"),
    ("top_k", 0, "from 1 to 320, not 0"),
    ("top_k", 321, "from 1 to 320, not 321"),
    ("top_k", True, "not True"),
    ("top_k", 1.5, "not 1.5"),
    ("seed", -1, "not -1"),
    ("seed", BIG, f"not {BIG}"),
    ("seed", False, "not False"),
    ("max_tiles", -1, "from 0 to 36, not -1"),
    ("max_tiles", 37, "not 37"),
    ("max_tiles", True, "not True"),
    ("num_frames", 0, "from 1 to 32, not 0"),
    ("num_frames", 33, "not 33"),
    ("deadline_s", -1, "not -1"),
    ("deadline_s", math.inf, "not inf"),
    ("deadline_s", math.nan, "not nan"),
    ("deadline_s", "1", "a str"),
    ("stop", "END", "a str"),
    ("stop", {"END"}, "a set"),
    ("stop", [""], "1 to 256 characters, not one of 0"),
    ("stop", ["a" * 257], "not one of 257"),
    ("stop", [b"END"], "a bytes"),
    ("stop", ["a"] * 17, "17 strings; the limit is 16"),
    ("lookup", 1, "not 1"),
    ("on_progress", 3, "not 3"),
    ("ignore_eos", 1, "not 1"),
    ("ignore_eos", None, "a NoneType"),
    ("lookup_tokens", [1], "need lookup=True"),
    ("lookup_tokens", [], "at least one integer"),
    ("lookup_tokens", "1", "at least one integer"),
    ("lookup_tokens", [1.0], "at least one integer"),
    ("lookup_tokens", [320], "from 0 to 319"),
    ("lookup_tokens", [-1], "from 0 to 319"),
    ("lookup_tokens", [1] * 2049, "2049 tokens; the context has 2048"),
    ("max_new_tokens", np.int64(0), "of at least 1, not 0"),
    ("max_new_tokens", np.float64(3), "not 3.0"),
    ("max_new_tokens", np.bool_(True), "a bool"),
    ("max_new_tokens", np.array([3]), "a ndarray"),
    ("temperature", np.float32("nan"), "not nan"),
    ("temperature", 1j, "a complex"),
    ("top_k", np.uint64(2**63), "not 9223372036854775808"),
    ("system", 5, "system must be a string, not 5"),
    ("literal", 1, "not 1"),
    ("literal", None, "a NoneType"),
    ("repetition_penalty", 0, "from 0.01 to 100, not 0"),
    ("repetition_penalty", -1.5, "not -1.5"),
    ("repetition_penalty", 100.5, "not 100.5"),
    ("repetition_penalty", math.nan, "not nan"),
    ("repetition_penalty", math.inf, "not inf"),
    ("repetition_penalty", True, "not True"),
    ("repetition_penalty", "1.2", "a str"),
    ("repetition_penalty", None, "a NoneType"),
    ("images", "cat.png", "a str"),
    ("images", b"\x89PNG", "a bytes"),
    ("images", np.zeros((2, 2, 3), np.uint8), "a ndarray"),
    ("images", None, "a NoneType"),
    ("videos", "cat.mp4", "a str"),
    ("history", "before", "a str"),
    ("history", [("a", "b")], "a tuple"),
    ("history", [Exchange(prompt="a", answer=None)], "history 0: answer must be a string"),
    ("history", [Exchange(prompt=1, answer="b")], "history 0: prompt must be a string"),
    ("history", [Exchange(prompt="a", answer="b", images="x")], "history 0: images must be"),
    ("history", [Exchange(prompt="a", answer="b", videos="x")], "history 0: videos must be"),
    ("history", [Exchange(prompt="a", answer="b", literal=2)], "history 0: literal must be True"),
    ("history", [Exchange(prompt="", answer="")] * 257, "257 exchanges; the limit is 256"),
    ("json_schema", "{}", "a dictionary, not a str"),
    ("json_schema", {"const": {1, 2}}, "cannot be written as JSON: Object of type set"),
    ("json_schema", {"const": math.nan}, "cannot be written as JSON"),
    ("json_schema", {"const": "a" * 65536}, "the limit is 65536"),
    ("choices", [], "at least one text"),
    ("choices", "yes", "a list, not a str"),
    ("choices", ["a", ""], "none of them empty"),
    ("choices", ["a", 3], "at least one text"),
    ("choices", ["a" * 40_000] * 2, "80000 bytes in UTF-8; the limit is 65536"),
    ("regex", 3, "a string, not 3"),
    ("regex", "a" * 65537, "65537 bytes in UTF-8; the limit is 65536"),
]


@pytest.mark.parametrize(("name", "value", "message"), REFUSED)
def test_refused(name: str, value: object, message: str) -> None:
    """GEN-05, GEN-06: the message names the field and the value, and shows no foreign repr."""
    with pytest.raises(InputError, match=re.escape(message)) as caught:
        check(**{name: value})
    text = str(caught.value)
    assert name in text and len(text) < 200 and not re.search(r"0x[0-9a-f]{6}|<", text)


def test_numbers_of_numpy_become_plain_ones() -> None:
    request = Request("a", seed=np.int64(7), temperature=np.float32(0.5), top_k=np.uint8(9))
    assert (request.seed, request.temperature, request.top_k) == (7, 0.5, 9)
    assert [type(v) for v in (request.seed, request.temperature, request.top_k)] == [
        int,
        float,
        int,
    ]
    assert replace(request, max_new_tokens=np.int32(3)).max_new_tokens == 3


def test_every_field_is_checked() -> None:
    assert {name for name, _, _ in REFUSED} == {field.name for field in fields(Request)}


def test_options_are_the_fields_of_a_request() -> None:
    names = [field.name for field in fields(Request)]
    assert ["prompt", *get_type_hints(RequestOptions)] == names
    types = get_type_hints(Request)
    assert get_type_hints(RequestOptions) == {name: types[name] for name in names[1:]}


def test_other_types_than_requests_are_refused() -> None:
    with pytest.raises(InputError, match="must be a Request, not a str"):
        check_request(
            "Why?", vocab_size=1, max_length=1, max_tiles=1, max_frames=1, limits=DEFAULT_LIMITS
        )


def test_drafting_is_for_greedy_decoding() -> None:
    with pytest.raises(InputError, match="temperature 0"):
        check(lookup=True, temperature=1.0)


def test_limits_are_arguments() -> None:
    """SEC-06: a request at each limit, and one beyond."""
    tight = Limits(conversation_bytes=8, history_turns=1, stop_strings=1, stop_chars=3)
    check(tight, prompt="12345", history=[Exchange(prompt="6", answer="\u00e9")], stop=["abc"])
    for changes in (
        {"prompt": "123456", "history": [Exchange(prompt="6", answer="\u00e9")]},
        {"prompt": "123456789"},
        {"prompt": "", "history": [Exchange(prompt="", answer="")] * 2},
        {"stop": ["a", "b"]},
        {"stop": ["abcd"]},
    ):
        with pytest.raises(InputError, match=r"limit|1 to 3"):
            check(tight, **changes)


def timings(*times: float) -> Timings:
    return Timings(
        preprocess_s=0, queue_s=0, vision_s=0, prefill_s=0, token_times_s=times, total_s=9,
        prompt_tokens=1, cached_tokens=0, image_tiles=0, new_tokens=len(times), steps=0,
    )  # fmt: skip


def test_timings_are_summed_up() -> None:
    assert (timings().ttft_s, timings().per_token_s) == (None, None)
    assert (timings(2.0).ttft_s, timings(2.0).per_token_s) == (2.0, None)
    assert timings(1.0, 2.0, 5.0, 6.0).per_token_s == 1.0


def test_a_result_finds_its_boxes() -> None:
    text = "A cat [100,200,300,400] and [500,500,400,600]."
    result = Result(text=text, tokens=(), finish_reason="stop", timings=timings())
    assert [box.to_pixels(10, 10) for box in result.boxes()] == [(1, 2, 3, 4)]
