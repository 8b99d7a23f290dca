"""Transcripts for training equal the prompts at run time, id by id."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizer_files import ALL, tokenizer_of

from perception_rt.processing.llm_tokenizer import TokenizerSpec, open_tokenizer
from perception_rt.processing.prompt import (
    SYSTEM,
    Tiles,
    Turn,
    encode_prompt,
    encode_transcript,
)

BYTES = open_tokenizer(TokenizerSpec(kind="bytes", vocab_size=512, image_token_id=400))
QUESTION = Turn("user", (Tiles(2), "What is this?"))
ANSWER = Turn("assistant", ("A cat.",))
MORE = [Turn("user", ("Sure?",)), Turn("assistant", ("Yes.",))]


def shown(tokenizer, ids):
    """Shows ids as text, control tokens by name."""
    names = {i: name for name, i in tokenizer.controls.items()}
    parts = [names.get(i) or tokenizer.decode_bytes([i]).decode("latin-1") for i in ids.tolist()]
    return "".join(parts)


def head(role):
    return f"<|start_header_id|>{role}<|end_header_id|>\n\n"


def test_a_chat_by_eye():
    got = encode_transcript(BYTES, [QUESTION, ANSWER, *MORE], 3)
    first = (
        f"<|begin_of_text|>{head('system')}{SYSTEM}<|eot_id|>"
        f"{head('user')}{'<|image|>' * 6}What is this?<|eot_id|>{head('assistant')}A cat.<|eot_id|>"
    )
    second = f"{head('user')}Sure?<|eot_id|>{head('assistant')}Yes.<|eot_id|><|end_of_text|>"
    assert shown(BYTES, got.ids) == first + second
    assert shown(BYTES, got.ids[got.learned]) == "A cat.<|eot_id|>Yes.<|eot_id|><|end_of_text|>"
    assert shown(BYTES, got.ids[: got.ends[0]]) == first
    assert got.ends[1] == len(got.ids)
    assert got.ids.dtype == np.int64
    assert got.learned.dtype == np.bool_


def test_captions_by_eye():
    got = encode_transcript(BYTES, [QUESTION, ANSWER, *MORE], 3, "warmup")
    # As in the reference: no begin of text, no headers, no system; later questions stay.
    assert shown(BYTES, got.ids) == "<|image|>" * 6 + "A cat.\nSure?Yes.\n"
    assert shown(BYTES, got.ids[got.learned]) == "A cat.\nYes.\n"
    assert got.ends == (13, 23)


TEXTS = st.text(st.sampled_from("ab \n1,<|>é"), max_size=12)


@pytest.mark.parametrize("kind", ALL)
@given(question=TEXTS, answer=TEXTS)
@example(question="a", answer="\n\nb")  # merges with the header's new lines
@settings(max_examples=60, deadline=None)
def test_the_part_before_an_answer_is_its_prompt(kind, question, answer):
    tokenizer = tokenizer_of(kind)
    user = Turn("user", (Tiles(1), question))
    got = encode_transcript(tokenizer, [user, Turn("assistant", (answer,))], 4)
    prompt = encode_prompt(tokenizer, [user], 4).ids
    start = int(np.flatnonzero(got.learned)[0])
    assert got.ids[:start].tolist() == prompt.tolist()
    assert got.learned[start:].all()  # nothing but the answer and its ends
    text = tokenizer.decode_bytes(got.ids[start:])
    assert text in (answer.encode(), tokenizer.prefix + answer.encode())


@pytest.mark.parametrize("kind", ALL)
def test_the_part_before_a_second_answer_is_its_prompt(kind):
    tokenizer = tokenizer_of(kind)
    turns = [QUESTION, ANSWER, *MORE]
    got = encode_transcript(tokenizer, turns, 4)
    prompt = encode_prompt(tokenizer, turns[:-1], 4).ids
    assert got.ids[: len(prompt)].tolist() == prompt.tolist()
    assert got.learned[len(prompt) :].all()
    assert not got.learned[len(prompt) - 1]


def test_a_system_of_its_own():
    system = Turn("system", ("Be brief.",))
    got = encode_transcript(BYTES, [system, QUESTION, ANSWER], 1)
    assert "Be brief." in shown(BYTES, got.ids)
    assert SYSTEM not in shown(BYTES, got.ids)
    captions = encode_transcript(BYTES, [system, QUESTION, ANSWER], 1, "warmup")
    assert shown(BYTES, captions.ids) == "<|image|>" * 2 + "A cat.\n"


@pytest.mark.parametrize(
    "turns",
    [
        [],
        [QUESTION],
        [Turn("system", ("a",))],
        [ANSWER],
        [QUESTION, ANSWER, ANSWER],
    ],
)
def test_turns_out_of_order_are_a_mistake_of_ours(turns):
    with pytest.raises(AssertionError):
        encode_transcript(BYTES, turns, 1)
