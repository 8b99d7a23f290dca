"""Answers to the demo's questions are true of the image, and the first is a fair coin toss."""

import numpy as np
import pytest

from training.demo import questions
from training.demo.digits import training_digits
from training.demo.questions import LEARNED, held_out_record, is_right, record


def exchanges(found: questions.Record) -> list[tuple[str, str]]:
    """Returns pairs of question and answer."""
    texts = [turn["value"] for turn in found["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> questions.Row:
    """The row that all questions are about: 3733."""
    fixed = questions.draw_row(np.random.default_rng(0), training_digits(), wanted="3733")
    monkeypatch.setattr(questions, "draw_row", lambda *args, **kwargs: fixed)
    return fixed


def test_questions_about_one_picture_have_true_answers(row: questions.Row) -> None:
    for number in range(50):
        for question, answer in exchanges(record("exists", 1, number)):
            assert answer == ("yes" if question[-2] in "37" else "no")
        assert exchanges(record("colour", 1, number)) == [("What colour is the 7?", row.inks[1])]
        (located,) = exchanges(record("locate", 1, number))
        assert located[0] == "Where is the 7?"


def test_no_digit_is_asked_about_twice() -> None:
    for name in ("exists", "colour", "locate"):
        asked = [[question for question, _ in exchanges(record(name, 1, n))] for n in range(60)]
        assert all(len(set(texts)) == len(texts) for texts in asked)
        assert max(map(len, asked)) == questions.MAX_QUESTIONS[name]


def test_the_first_answer_is_a_coin() -> None:
    answers = [exchanges(record("exists", 2, number))[0][1] for number in range(200)]
    assert 70 <= answers.count("yes") <= 130


def test_held_out_questions_are_single_and_their_own_answers_are_right() -> None:
    for name in (*LEARNED, "read3"):
        found = held_out_record(name, 5)
        ((_, answer),) = exchanges(found)
        assert is_right(name, answer, found)
        assert not is_right(name, "[000,000,001,001]" if name == "locate" else "maybe", found)
