"""VQA accuracy: agreement with several annotators, after VQAv2's normalisation of answers."""

import re

LEAST_ANNOTATORS = 4  # with fewer, no answer could score 1
_AGREEING = 3  # annotators who make an answer fully right

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_ARTICLES = ("a", "an", "the")
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"(?<=\d),+(?=\d)")
_PERIOD = re.compile(r"\.(?!\d)")

# VQAv2 restores the apostrophe of these words.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't
mightn't've must've mustn't needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's
won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""


def vqa_accuracy(answer: str, annotated: list[str]) -> float:
    """VQA accuracy of one question, 0 to 1.

    Without one annotator at a time, an answer scores a third for each of the others who gave it, at
    most 1; the result is the mean over the annotators left out.

    Args:
        answer: the model's answer.
        annotated: the answer of each annotator, 10 in VQAv2.
    """
    found = normalized_answer(answer)
    equal = [normalized_answer(text) == found for text in annotated]
    total = sum(equal)
    return sum(min(1.0, (total - own) / _AGREEING) for own in equal) / len(equal)


def normalized_answer(text: str) -> str:
    """An answer as VQAv2 compares it.

    Lower case, without articles and punctuation, number words up to ten as digits, contractions
    with their apostrophe. As in VQAv2's code, a mark inside a word becomes a space, unless the same
    mark occurs beside a space or the text has a number with a comma; and a period stays only before
    a digit.
    """
    text = text.replace("\n", " ").replace("\t", " ").strip()
    removed = _COMMA_IN_NUMBER.search(text) is not None
    plain = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        plain = plain.replace(mark, "" if removed or beside_space else " ")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", plain).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_apostrophe(word: str) -> list[str]:
    """The word with one of its apostrophes left out, in each way."""
    return [word[:i] + word[i + 1 :] for i, letter in enumerate(word) if letter == "'"]


_CONTRACTIONS = {bare: word for word in _CONTRACTED.split() for bare in _without_apostrophe(word)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # so in VQAv2
