"""Reads the letter of a choice from an answer, as PLM-VideoBench does."""

import re

_PREFIX = re.compile("answer:", re.IGNORECASE)
_OPTION = re.compile(r"\(?([a-z])\)?|\S*\(([a-z])\)\S*")


def letter(number: int) -> str:
    """Letter of a choice: A for 0."""
    return chr(ord("A") + number)


def chosen_number(answer: str) -> int | None:
    """Number of the choice that an answer names, from 0; None if it names none.

    The answer's first word decides: a letter, in any case and with or without brackets or a period,
    such as "B", "(b)" or "b.". "Answer:" before it is ignored.
    """
    words = _PREFIX.sub("", answer).lower().split()
    found = _OPTION.fullmatch(words[0].replace(".", "")) if words else None
    return None if found is None else ord(found[1] or found[2]) - ord("a")
