"""Splits captions into words as the Penn Treebank does, for `metrics.cider`.

COCO's captions are scored on the tokens of Stanford's PTBTokenizer, in lower case and without
punctuation. This follows its rules for captions in English; docs/evaluation.md has what differs.
"""

import re

# COCO removes these. Brackets stay, because COCO looks for "-LRB-" in texts in lower case.
_REMOVED = frozenset(["''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"])
_QUOTES = str.maketrans({
    "\u201c": '"', "\u201d": '"', "\u2018": "'", "\u2019": "'", "\u2013": "--", "\u2014": "--",
    "\u2026": "...",
})  # fmt: skip
_BRACKETS = {
    "(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-",
}  # fmt: skip
_SPLIT_WORDS = {
    "cannot": ("can", "not"), "gonna": ("gon", "na"), "gotta": ("got", "ta"),
    "wanna": ("wan", "na"), "lemme": ("lem", "me"), "gimme": ("gim", "me"), "'tis": ("'t", "is"),
    "'twas": ("'t", "was"),
}  # fmt: skip
_ABBREVIATIONS = (
    "mr|mrs|ms|dr|st|jr|sr|prof|gen|sen|rep|gov|capt|lt|sgt|col|vs|etc|inc|ltd|co|corp|ave|blvd|rd"
    "|no|jan|feb|mar|apr|aug|sept|sep|oct|nov|dec|mt|ft"
)
_TOKEN = re.compile(
    rf"""
    \S+@\S+\.\w+ | www\.\S+\w | https?://\S+\w    # addresses
  | (?:[a-z]\.)+(?![a-z0-9])(?<=\.\w\.)           # initials: u.s.
  | (?:{_ABBREVIATIONS})\.(?![a-z0-9])
  | (?<!\w)'\d\ds?(?!\w)                          # '90s
  | '(?:tis|twas)(?!\w)
  | y'(?=all)
  | 'n'(?!\w)                                    # rock 'n' roll
  | \d+(?:[.,:/]\d+)+(?!\w)                       # 1,000  3.5  3:30  1/2
  | [#][^\W\d]\w*                                 # hashtags
  | \w+(?:&\w+)+                                  # at&t
  | (?:n't|'(?:s|re|ve|ll|d|m))(?!\w)
  | \w+?(?=n't(?!\w))                             # the verb before n't
  | \w+(?:[-/.]\w+)*
  | \.\.\. | -- | '' | `` | [?!]+
  | \S
    """,
    re.VERBOSE,
)


def caption_tokens(caption: str) -> list[str]:
    """Words of a caption in lower case, without punctuation."""
    text = caption.translate(_QUOTES).lower().replace('"', " '' ")
    tokens = list[str]()
    for token in _TOKEN.findall(text):
        tokens += _SPLIT_WORDS.get(token, (_BRACKETS.get(token, token),))
    return [token for token in tokens if token not in _REMOVED]
