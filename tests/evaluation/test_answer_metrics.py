"""Metrics of answers against scikit-learn, counted cells, and values of other projects' code.

`test_other_scorers.py` runs that code itself, where it is installed.
"""

import random
from functools import cache

import numpy as np
import pytest
from sklearn.metrics import precision_recall_fscore_support

from perception_rt.evaluation.metrics import binary, localization
from perception_rt.evaluation.metrics.caption_tokens import caption_tokens
from perception_rt.evaluation.metrics.choices import chosen_number
from perception_rt.evaluation.metrics.cider import cider
from perception_rt.evaluation.metrics.text_answers import (
    anls,
    edit_distance,
    exact_match,
    relaxed_match,
)
from perception_rt.evaluation.metrics.vqa import normalized_answer, vqa_accuracy

# Of pycocoevalcap 1.2 with Stanford's PTBTokenizer 3.4.1.
REFERENCES = [
    ["A man rides a horse.", "A man is riding a brown horse on the beach."],
    ["Two dogs play with a ball.", "The dogs' ball is red."],
    ["A plate of food on a table", "Food on a plate, next to a glass."],
    ["A red bus (number 5) isn't moving."],
]
CAPTIONS = ["a man riding a horse on the beach", "Two dogs run.", "a plate of food", "a bus"]
CIDER = [3.36889373, 1.3465849, 3.67890337, 0.38057956]


def test_exact_match_ignores_white_space_only() -> None:
    assert exact_match(" a cat\n", ["dog", "a cat"]) == 1
    assert exact_match("A cat", ["a cat"]) == 0


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The red car", "red car"),
        ("two", "2"),
        ("None", "0"),
        ("a t-shirt", "t shirt"),
        ("t-shirt - blue", "tshirt blue"),
        ("1,000 and/or", "1000 andor"),
        ("3.5 p.m.", "3.5 pm"),
        ("dont know", "don't know"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        ("what ?", "what"),
        ("U.S.", "us"),
        ("yes!\n", "yes"),
    ],
)
def test_normalisation_of_vqav2(text: str, expected: str) -> None:
    assert normalized_answer(text) == expected


@pytest.mark.parametrize(
    ("agreeing", "expected"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)]
)
def test_vqa_accuracy_leaves_one_annotator_out(agreeing: int, expected: float) -> None:
    """Two agree: eight times 2/3, and twice 1/3, are 0.6 of 10."""
    annotated = ["The cat"] * agreeing + ["a dog"] * (10 - agreeing)
    assert vqa_accuracy("cat!", annotated) == pytest.approx(expected)


def distance_by_definition(first: str, second: str) -> int:
    @cache
    def distance(i: int, j: int) -> int:
        if not i or not j:
            return i + j
        replaced = distance(i - 1, j - 1) + (first[i - 1] != second[j - 1])
        return min(replaced, distance(i - 1, j) + 1, distance(i, j - 1) + 1)

    return distance(len(first), len(second))


def test_edit_distance_equals_its_definition() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        first, second = ("".join(drawn.choices("abc", k=drawn.randint(0, 8))) for _ in range(2))
        assert edit_distance(first, second) == distance_by_definition(first, second)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Hello  World", 1),
        ("hello worlt", 1 - 1 / 11),
        ("helloworlds", 1 - 2 / 11),
        ("goodbye", 0),
        ("hellx", 0),  # 1 - 7 / 11 is below 0.5
        ("ab", 0.5),  # of the second answer
        ("", 0),
    ],
)
def test_anls(answer: str, expected: float) -> None:
    assert anls(answer, ["hello world", "abcd"]) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("answer", "accepted", "expected"),
    [
        ("105", "100", 1),
        ("94.9", "100", 0),
        ("-95", "-100", 1),
        ("12%", "0.12", 1),
        ("12", "12%", 0),
        ("0.0", "0", 0),  # of a right answer of 0, the text must be equal
        ("0", "0", 1),
        ("Blue", "blue", 1),
        ("blues", "blue", 0),
        ("nan", "5", 0),
        ("inf", "inf", 1),
    ],
)
def test_relaxed_match(answer: str, accepted: str, expected: float) -> None:
    assert relaxed_match(answer, [accepted]) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("B", 1), ("b.", 1), ("(b)", 1), ("(B) a dog", 1), ("b) dog", 1), ("Answer: B", 1),
        ("**(c)**", 2), ("A\nbecause", 0), ("Because B", None), ("", None), ("(", None),
        ("Answer:", None), ("AB", None), ("2", None),
    ],
)  # fmt: skip
def test_letters_of_choices(answer: str, expected: int | None) -> None:
    assert chosen_number(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [("Yes.", "yes"), (" no, it is not", "no"), ("**NO**", "no"), ("Yesterday", None), ("", None),
     ("It does, yes", None)],
)  # fmt: skip
def test_yes_or_no(answer: str, expected: str | None) -> None:
    assert binary.yes_or_no(answer) == expected


def test_f1_equals_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        answered, expected = rng.integers(0, 2, (2, rng.integers(1, 12))).astype(float)
        wanted = precision_recall_fscore_support(
            expected, answered, average="binary", zero_division=0
        )
        found = [f(answered, expected) for f in (binary.precision, binary.recall, binary.f1_score)]
        assert found == pytest.approx(wanted[:3], abs=1e-15)


def test_box_iou_equals_counted_cells() -> None:
    drawn = random.Random(0)

    def box() -> tuple[str, np.ndarray]:
        (left, right), (top, bottom) = (sorted(drawn.sample(range(1000), 2)) for _ in range(2))
        cells = np.zeros((1000, 1000), bool)
        cells[top:bottom, left:right] = True
        return f"[{left:03},{top:03},{right:03},{bottom:03}]", cells

    for _ in range(50):
        (first, own), (second, other) = box(), box()
        share = (own & other).sum() / (own | other).sum()
        assert localization.box_iou(f"At {first}.", second) == pytest.approx(share, abs=1e-15)


@pytest.mark.parametrize("answer", ["there", "[100,100,200,200] or [300,300,400,400]", "[1,2,3,4]"])
def test_an_answer_without_exactly_one_box_scores_nothing(answer: str) -> None:
    assert localization.box_iou(answer, "[100,100,200,200]") == 0


def test_segment_iou_equals_counted_seconds() -> None:
    drawn = random.Random(0)
    for _ in range(300):
        first, second = (sorted(drawn.choices(range(12), k=2)) for _ in range(2))
        own, other = set(range(*first)), set(range(*second))
        share = len(own & other) / len(own | other) if own | other else 0
        found = localization.parse_segment(f"From {first[1]} [{first[1]}, {first[0]}].")
        assert found == tuple(first)
        assert localization.segment_iou(found, (second[0], second[1])) == pytest.approx(share)


def test_recalls_are_above_the_threshold() -> None:
    three_tenths = localization.segment_iou((0, 18), (1, 6.4))  # 0.30000000000000004 in floats
    assert localization.segment_recalls(three_tenths) == {
        "recall@0.3": 0, "recall@0.5": 0, "recall@0.7": 0, "recall@0.9": 0
    }  # fmt: skip
    assert list(localization.segment_recalls(0.75).values()) == [1, 1, 1, 0]


@pytest.mark.parametrize("text", ["3 to 5", "[3]", "[3, 4, 5]", "[-3, 4]", "(3, 5)", ""])
def test_texts_without_a_segment(text: str) -> None:
    assert localization.parse_segment(text) is None


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        ("A man's dog isn't running, and they'll go.",
         "a man 's dog is n't running and they 'll go"),
        ('The sign says "STOP" (in red) - near a t-shirt.',
         "the sign says stop -lrb- in red -rrb- near a t-shirt"),
        ("He can't; she cannot! I'm gonna", "he ca n't she can not i 'm gon na"),
        ("It costs $5.50, or 1,000 dollars: 50% off.",
         "it costs $ 5.50 or 1,000 dollars 50 % off"),
        ("Mr. Smith at 5 p.m. on St. James St. in the U.S.",
         "mr. smith at 5 p.m. on st. james st. in the u.s."),
        ("black/white cat... wow!! ok--yes", "black/white cat wow !! ok yes"),
        ("a 5'10\" man at 3:30 in '90s style", "a 5 10 man at 3:30 in '90s style"),
        ("rock 'n' roll, the dogs' bowls", "rock 'n' roll the dogs bowls"),
        ("it\u2019s a \u201cbig\u201d dog \u2014 maybe", "it 's a big dog maybe"),
        ("", ""),
    ],
)  # fmt: skip
def test_tokens_are_those_of_the_penn_treebank(caption: str, expected: str) -> None:
    """Values of Stanford's PTBTokenizer 3.4.1, without the punctuation that COCO removes."""
    assert caption_tokens(caption) == expected.split()


def test_cider_equals_pycocoevalcap() -> None:
    assert cider(CAPTIONS, REFERENCES).tolist() == pytest.approx(CIDER, abs=1e-8)


def test_cider_of_a_reference_itself_is_10() -> None:
    texts = [[f"word{n} in front of a house{n}"] for n in range(5)]
    assert cider([text for (text,) in texts], texts).tolist() == pytest.approx([10] * 5)
