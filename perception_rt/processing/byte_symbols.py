"""The characters that stand for bytes in byte-pair vocabularies, as in GPT-2."""

import functools
from collections.abc import Mapping
from types import MappingProxyType


@functools.cache
def byte_symbols() -> Mapping[int, str]:
    """Returns the character of each byte, in the order of the vocabularies' ids.

    Printable Latin-1 characters stand for themselves. The other bytes come last, as U+0100 and up.
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = sorted(set(range(256)) - set(printable))
    symbols = {value: chr(value) for value in printable}
    return MappingProxyType(symbols | {value: chr(256 + i) for i, value in enumerate(others)})
