"""Generated texts for the tokenizer tests: the same list for the same seed, on every machine.

`clip_ids.json` holds a digest of the original tokenizer's ids.
"""

import random

CAPTIONS = 5000
MULTILINGUAL = 500
SNIPPETS = 200

_WORDS = (
    "a an the photo picture painting close-up cropped blurry of with and on under near two three "
    "small large red blue shiny old dog cat bicycle airplane tench goldfish lighthouse astronaut "
    "Golden Retriever sunset over Mount Fuji it's don't they're I've we'll he'd I'm New York 2025 "
    '42nd street 3.14 100% #travel @user http://example.com/a?b=c&d=e (left) [right] "quoted" '
    "unbelievable internationalization xylophone qwertyuiop naive cafe MRI X-ray CT-scan S&P "
    "!!! ... -- ; : / e.g. i.e. U.S.A. 10,000 1/2 5pm -40C $9.99 :-) <3 C++ C#"
)
_SCRIPTS = (
    "\u732b\u304c\u7a93\u8fba\u3067\u7720\u308b",  # Japanese
    "\u4e00\u5f20\u732b\u7684\u7167\u7247",  # Chinese
    "\u0444\u043e\u0442\u043e\u0433\u0440\u0430\u0444\u0438\u044f \u043a\u043e\u0448\u043a\u0438",
    "\u03a6\u03a9\u03a4\u039f\u0393\u03a1\u0391\u03a6\u0399\u0391 \u0393\u0391\u03a4\u0391\u03a3",
    "\u0635\u0648\u0631\u0629 \u0642\u0637\u0629",  # Arabic
    "\u05ea\u05de\u05d5\u05e0\u05d4 \u05e9\u05dc \u05d7\u05ea\u05d5\u05dc",  # Hebrew
    "\u092c\u093f\u0932\u094d\u0932\u0940 \u0915\u0940 \u0924\u0938\u094d\u0935\u0940\u0930",
    "\uace0\uc591\uc774 \uc0ac\uc9c4",  # Korean
    "\u0e20\u0e32\u0e1e\u0e16\u0e48\u0e32\u0e22\u0e41\u0e21\u0e27",  # Thai
    "Stra\u00dfe \u00c4rger \u00fcber Fu\u00dfg\u00e4nger",
    "\u00e7a va? d\u00e9j\u00e0 vu, na\u00efve fa\u00e7ade \u0153uvre",
    "\u0130stanbul'da \u0131\u015f\u0131k",  # Turkish dotted and dotless i
    "ti\u1ebfng Vi\u1ec7t e\u0302\u0301 A\u030a",  # composed and decomposed
    "\U0001f408\u200d\u2b1b \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f1eb\U0001f1f7",
    "\uff26\uff35\uff2c\uff2c \uff8a\uff9d\uff76\uff78 \ufb01ne \u201cquotes\u201d \u2026 \u2014",
    "sch\u00c3\u00b6n \u00e2\u20ac\u0153quoted\u00e2\u20ac\u009d caf\u00c3\u00a9",  # mojibake
    "\u00c3 la mode \u00c2\u00a9 2020 l\u00e2\u20ac\u2122oeil",
)
_CODE = (
    "def f(x: int) -> str:\n    return f'{x!r:>10}'\n",
    "for (int i = 0; i < n; ++i) { a[i] += b[i] * 2; }",
    "SELECT * FROM t WHERE a >= 10 AND b != 'x'; -- done",
    '<div class="a b">&lt;p&gt; &amp; &nbsp; &#39;hi&#39; &copy;</div>',
    "&lt;b&gt; &amp;amp;amp; &eacute; &EACUTE; &bogus; &#x1F408; &notit;",
    "grep -rn --include='*.py' \"foo\\(\" . | sort -u > out.txt 2>&1",
    "\u001b[36;44mcolour\u001b[0m\ttab\r\nnext\u0085line\u2028sep\x00nul\x7f",
    "#include <stdio.h>\n\nint main(void)\n{\n\treturn 0; /* ok */\n}\n",
    '{"key": [1, 2.5e-3, null, true], "k2": "\\u00e9"}',
    "x = [y ** 2 for y in range(10) if y % 2 == 0] # squares",
)
_CHARACTERS = (
    [chr(c) for c in range(0x20, 0x180)]
    + list("\u2018\u2019\u201c\u201d\u2026\u20ac\u017f\u212a\ufb03\u3000\ufeff\u200d\u0301\u0327")
    + list("\n\t\r&;<>#'\"") * 8
    + list("abcdefghijklmnopqrstuvwxyz ") * 6
)


def generate_texts(seed: int) -> list[str]:
    """Captions, then texts in many scripts, then code and random characters."""
    rng = random.Random(seed)
    texts = [_caption(rng) for _ in range(CAPTIONS)]
    texts += [" ".join(rng.choices(_SCRIPTS, k=rng.randint(1, 3))) for _ in range(MULTILINGUAL)]
    for _ in range(SNIPPETS // 2):
        texts.append("\n".join(rng.choices(_CODE, k=rng.randint(1, 3))))
        texts.append("".join(rng.choices(_CHARACTERS, k=rng.randint(0, 60))))
    return texts


def _caption(rng: random.Random) -> str:
    words = rng.choices(_WORDS.split(), k=rng.randint(1, 24))
    if rng.random() < 0.3:  # a word that is in no vocabulary
        letters = rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 18))
        words.insert(rng.randrange(len(words)), "".join(letters))
    text = rng.choice((" ", " ", " ", "  ", "\t", "\n")).join(words)
    return rng.choice((text, text.upper(), text.title(), text + "."))


def explicit_texts() -> list[str]:
    """About a hundred texts whose ids are stored one by one."""
    return [
        "", " ", "\n\t ", "\x00", "a", "A", "  a  ", "a photo of a cat", "diagram", "'s", "'S",
        "it's", "IT'S", "''s", "'\u017f", "don't won't can't I've we'll he'd I'm you're",
        "12345", "1 2 3", "3.14159", "\u0661\u0662\u0663", "\u00bd", "H\u2082O", "!!!", "?!?!",
        "hello, world!", "hello,world", "(a)(b)", "a_b_c", "a-b-c", "C++", "C#", "<b>bold</b>",
        "&lt;b&gt;", "&amp;lt;", "&amp;amp;lt;", "<&amp;amp;lt;", "&amp", "&ampx", "&#65;", "&#x41",
        "&#0;", "&#128;", "&#xD800;", "&#99999999;", "&nbsp;", "&NewLine;x", "AT&T", "R&D;",
        "\ud83d\udc08", "\ud83d", "a\ud800b", "\udc08\ud83d", "\ufffd", "\ufeffbom", "z\u200bw",
        "e\u0301", "\u00e9", "\u0344", "a\u0316\u0301", "a\u0301\u0316", "\u1e9e", "\u0130",
        "\u0149",
        "\u03a3\u03a3", "\u03a3\n\u03a3", "\u212b", "\ufb03", "\uff21\uff22", "\u2460", "\u3000x",
        "sch\u00c3\u00b6n", "\u00c3\u00a9\n\u00c3\u00a9", "\u00c3 la", "x\n\u00c3 y",
        "\u00c2\u00a0",
        "\u0153", "\u0153\n", "\u0153\r", "a\x85b", "caf\u00e9 \u00c3\u00a9", "\u00e2\u20ac\u2122s",
        "\x1b[31mred\x1b[0m", "\x1b[", "a\r\nb\rc", "a\u2028b", "tab\there", "x" * 200, "ab" * 100,
        "the " * 100, "\U0001f468\u200d\U0001f469\u200d\U0001f467", "\U0001f1eb\U0001f1f7",
        "\u4e00\u5f20\u732b\u7684\u7167\u7247", "\uace0\uc591\uc774", "\u0e41\u0e21\u0e27",
        "\u092c\u093f\u0932\u094d\u0932\u0940", "</w>", "a</w>b", "<|image|>", "[CLS] [SEP]",
        "supercalifragilisticexpialidocious", "pneumonoultramicroscopicsilicovolcanoconiosis",
    ]  # fmt: skip
