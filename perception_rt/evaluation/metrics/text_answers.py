"""Metrics of short answers: equality, edit distance and numbers within 5 %."""

import math

_LEAST_SIMILARITY = 0.5  # ANLS below this is 0
_TOLERANCE = 0.05


def exact_match(answer: str, accepted: list[str]) -> float:
    """1 if the answer is one of the accepted ones, else 0; white space around them is ignored."""
    return float(answer.strip() in [text.strip() for text in accepted])


def anls(answer: str, accepted: list[str]) -> float:
    """Average normalised Levenshtein similarity of one question, as DocVQA defines it.

    It is 1 - distance / (length of the longer text) for the accepted answer that suits best, and 0
    below 0.5. Case and surplus white space are ignored.

    Args:
        answer: the model's answer.
        accepted: at least one right answer.
    """
    similarity = max(_similarity(_folded(answer), _folded(text)) for text in accepted)
    return similarity if similarity >= _LEAST_SIMILARITY else 0.0


def relaxed_match(answer: str, accepted: list[str]) -> float:
    """1 if the answer matches an accepted one as in ChartQA, else 0.

    Numbers match within 5 % of the accepted one, which must not be 0; "12%" is 0.12. Other texts
    match if they are equal but for case.
    """
    return float(any(_relaxed(answer.strip(), text.strip()) for text in accepted))


def edit_distance(first: str, second: str) -> int:
    """Levenshtein distance: insertions, deletions and replacements that turn one into the other."""
    row = list(range(len(second) + 1))
    for number, left in enumerate(first, 1):
        diagonal, row[0] = row[0], number
        for place, right in enumerate(second, 1):
            replaced = diagonal + (left != right)
            diagonal = row[place]
            row[place] = min(replaced, diagonal + 1, row[place - 1] + 1)
    return row[-1]


def _similarity(first: str, second: str) -> float:
    longest = max(len(first), len(second))
    return 1.0 if longest == 0 else 1 - edit_distance(first, second) / longest


def _folded(text: str) -> str:
    return " ".join(text.lower().split())


def _relaxed(answer: str, accepted: str) -> bool:
    found, wanted = _number(answer), _number(accepted)
    if found is None or not wanted:
        return answer.lower() == accepted.lower()
    return abs(found - wanted) / abs(wanted) <= _TOLERANCE


def _number(text: str) -> float | None:
    """The number that a text is; None if it is none."""
    try:
        number = float(text.rstrip("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        return None
    return number if math.isfinite(number) else None
