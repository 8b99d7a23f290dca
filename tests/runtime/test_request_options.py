"""Marks as text, NumPy's numbers and the repetition penalty, from a request to its answer."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_plm import LONG_PLM, picture

import perception_rt as prt
from perception_rt.errors import InputError
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Exchange, Request

IMAGE_ID = LONG_PLM.image_token_id


def text_of(ids: np.ndarray) -> bytes:
    """Text of the prompt; ids of other tokens than bytes are left out."""
    return bytes(i for i in ids.tolist() if i < 256)


def test_marks_without_media_are_text(plm: Generator, preprocessor: RequestPreprocessor) -> None:
    """In the question and in the history, and in both with other media in the other."""
    question = "What do <video> and <image><image> mean in HTML?"
    history = [Exchange(prompt=question, answer="<video>")]
    for request in (
        Request(question),
        Request("And <image>?", history=history),
        Request("And <image>?", history=history, images=[picture(0)]),
        Request(question, history=[Exchange(prompt="<image>?", answer="a", images=[picture(0)])]),
    ):
        preprocessor.check(request)
        state = preprocessor.prepare(request)
        assert question.encode() in text_of(state.ids)
        assert plm.submit(replace(request, max_new_tokens=1)).result().timings.new_tokens <= 1
    assert plm.score(question, "a").tokens


def test_literal_marks_are_text(plm: Generator, preprocessor: RequestPreprocessor) -> None:
    question = "<video> and <image>, <image>?"
    literal = Request(question, images=[picture(0)], literal=True)
    with pytest.raises(InputError, match="literal=True"):
        preprocessor.check(replace(literal, literal=False))
    earlier = Exchange(prompt=question, answer="", images=[picture(0)], literal=True)
    past = Request("a", history=[earlier])
    with pytest.raises(InputError, match=r"^history 0: the question has 1 <video> marks for 0 vid"):
        preprocessor.check(replace(past, history=[replace(earlier, literal=False)]))
    two = Request("<image>?", images=[picture(0), picture(1)])
    with pytest.raises(InputError, match=r"1 <image> or <video> marks for 2 .*literal=True"):
        preprocessor.prepare(two)
    for request in (literal, past):
        preprocessor.check(request)
        ids = preprocessor.prepare(request).ids
        assert question.encode() in text_of(ids)
    places = np.flatnonzero(preprocessor.prepare(literal).ids == IMAGE_ID)
    assert np.array_equal(places, places[0] + np.arange(5 * 4))  # first, as without marks
    one = preprocessor.prepare(Request("<image>?", images=[picture(0, 28, 28)], max_tiles=0))
    text = preprocessor.prepare(
        Request("<image>?", images=[picture(0, 28, 28)], max_tiles=0, literal=True)
    )
    assert len(text.ids) == len(one.ids) + len("<image>")
    assert plm.score(question, "a", images=[picture(0)], literal=True).tokens


def test_numbers_of_numpy_are_numbers(plm: Generator, package: Path) -> None:
    plain = {"max_new_tokens": 5, "temperature": 0.5, "top_k": 9, "top_p": 0.75, "seed": 3}
    kinds = (np.int64, np.float32, np.uint16, np.float64, np.int32)
    numpy = {name: kind(value) for (name, value), kind in zip(plain.items(), kinds, strict=True)}
    assert plm.generate("a", **numpy).tokens == plm.generate("a", **plain).tokens
    ids = plm.generate_tokens([1, 2], max_new_tokens=np.int64(4))
    assert ids == plm.generate_tokens([1, 2], max_new_tokens=4)
    sizes = {"kv_bytes": 2**24, "max_batch": 2, "threads": 1, "feature_cache_bytes": 2**20}
    numpy_sizes = {name: np.int64(size) for name, size in sizes.items()}
    with prt.load(package, cache=np.True_, **numpy_sizes) as other:
        assert other.generate("a", **plain).tokens == plm.generate("a", **plain).tokens
    yes = plm.generate("a", ignore_eos=np.bool_(True), literal=np.False_, max_new_tokens=3)
    assert yes.tokens == plm.generate("a", ignore_eos=True, max_new_tokens=3).tokens


@pytest.mark.parametrize("lookup", [False, True])
def test_a_penalty_is_that_of_transformers(
    plm: Generator, preprocessor: RequestPreprocessor, lookup: bool
) -> None:
    """Token by token with `prefill_logits`; prompt tokens count, and drafts change nothing."""
    request = Request("again and again and again", max_new_tokens=24, ignore_eos=True)
    penalty = np.float32(1.3)
    plain = plm.submit(request).result().tokens
    ids = preprocessor.prepare(request).ids.tolist()
    expected: list[int] = []
    for _ in range(24):
        logits = plm.prefill_logits([*ids, *expected])
        known = np.unique([*ids, *expected])
        scores = logits[known]
        logits[known] = np.where(scores < 0, scores * penalty, scores / penalty)
        logits[IMAGE_ID] = -np.inf
        expected.append(int(np.argmax(logits)))
    options = {"lookup": lookup, "lookup_tokens": [*expected[:9], 5, *expected] if lookup else None}
    found = plm.submit(replace(request, repetition_penalty=1.3, **options)).result()
    assert list(found.tokens) == expected != list(plain)
    assert found.timings.steps < 23 if lookup else found.timings.steps == 23
    assert plm.submit(replace(request, repetition_penalty=1.0)).result().tokens == plain
