"""Makes small tokenizer files of each kind, and tokenizers from them.

`ranks_file` and `hf_root` hold the same vocabulary, so they must give the same ids.
"""

import base64
import functools
import hashlib
import io
import json

import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.processing.byte_symbols import byte_symbols
from perception_rt.processing.llm_tokenizer import Tokenizer, TokenizerSpec, open_tokenizer
from perception_rt.processing.llm_vocabulary import CONTROLS

CORPUS = [
    "The quick brown fox jumps over the lazy dog, 1234567 times.\n\n",
    "You are a helpful language and vision assistant that sees images and videos.\n",
    "<|image|> <|eot_id|> <|start_header_id|>user<|end_header_id|>\n\n reserved special token\n",
    "def f(x):\n        return x + 10\n\n\n    # it's what we'll say, isn't it?\r\n",
    "日本語の文章。 Привет, мир! café naïve 👨‍👩‍👧\n",
    "a" * 64,
    " " * 32 + "thing " * 8,
]
LLAMA_WORD = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
NUM_RANKS = 420
VOCAB_SIZE = 1024
# In the order of the ids, as the hub's Perception-LM has them.
HF_NAMES = [
    "<|begin_of_text|>", "<|end_of_text|>", "<|image|>", "<|video|>",
    "<|reserved_special_token_2|>", "<|reserved_special_token_3|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|reserved_special_token_4|>", "<|eot_id|>",
    *(f"<|reserved_special_token_{i}|>" for i in range(5, 251)),
]  # fmt: skip
SPELLINGS = [*HF_NAMES, "<|reserved_special_token_1|>"]


@functools.cache
def _trained() -> str:
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(LLAMA_WORD), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_RANKS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS * 3, trainer)
    return tokenizer.to_str()


@functools.cache
def ranks() -> dict[bytes, int]:
    values = {symbol: value for value, symbol in byte_symbols().items()}
    vocab = json.loads(_trained())["model"]["vocab"]
    assert len(vocab) == NUM_RANKS
    return {bytes(values[c] for c in token): rank for token, rank in vocab.items()}


def ranks_file() -> bytes:
    """Like Llama 3's `tokenizer.model`, with `NUM_RANKS` ranks."""
    lines = sorted((rank, base64.b64encode(token)) for token, rank in ranks().items())
    return b"".join(b"%s %d\n" % (token, rank) for rank, token in lines)


def hf_root() -> dict:
    """A `tokenizer.json` with the 256 added tokens of Perception-LM's, some of them not special."""
    root = json.loads(_trained())
    root["added_tokens"] = [
        {
            "id": NUM_RANKS + i,
            "content": name,
            "single_word": False,
            "lstrip": False,
            "rstrip": False,
            "normalized": False,
            "special": i % 2 == 0,
        }
        for i, name in enumerate(HF_NAMES)
    ]
    root["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|begin_of_text|>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|begin_of_text|>": {
            "id": "<|begin_of_text|>", "ids": [NUM_RANKS], "tokens": ["<|begin_of_text|>"]}},
    }  # fmt: skip
    return root


def hf_file() -> bytes:
    return json.dumps(hf_root()).encode()


@functools.cache
def sentencepiece_file(
    *,
    controls: tuple[str, ...] = CONTROLS,
    user_defined: tuple[str, ...] = (),
    model_type: str = "unigram",
    byte_fallback: bool = True,
    exact: bool = True,
) -> bytes:
    """A SentencePiece model; with `exact`, it does not normalise or add a space."""
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([line for text in CORPUS for line in text.split("\n") if line]),
        model_writer=out,
        model_type=model_type,
        vocab_size=420,
        hard_vocab_limit=False,
        byte_fallback=byte_fallback,
        control_symbols=list(controls),
        user_defined_symbols=list(user_defined),
        normalization_rule_name="identity" if exact else "nmt_nfkc",
        add_dummy_prefix=not exact,
        remove_extra_whitespaces=not exact,
        minloglevel=2,
        num_threads=1,
    )
    return out.getvalue()


def opened(kind: str, data: bytes, image_token_id: int, limits: Limits = DEFAULT_LIMITS):
    """Opens the tokenizer of a file, with a vocabulary of `VOCAB_SIZE`."""
    return open_tokenizer(spec_of(kind, data, image_token_id), data, limits=limits)


def spec_of(kind: str, data: bytes, image_token_id: int) -> TokenizerSpec:
    return TokenizerSpec(
        kind=kind,
        file="tokenizer",
        sha256=hashlib.sha256(data).hexdigest(),
        vocab_size=VOCAB_SIZE,
        image_token_id=image_token_id,
    )


LLAMA_IMAGE = NUM_RANKS + 2
SENTENCEPIECE_IMAGE = 5  # after unknown, begin, end, and two of our control tokens
FILES = {
    "tiktoken": ("tiktoken", ranks_file, LLAMA_IMAGE),
    "hf": ("hf", hf_file, LLAMA_IMAGE),
    "unigram": ("sentencepiece", sentencepiece_file, SENTENCEPIECE_IMAGE),
    "bpe": (
        "sentencepiece",
        functools.partial(sentencepiece_file, model_type="bpe"),
        SENTENCEPIECE_IMAGE,
    ),
}
ALL = (*FILES, "bytes")


@functools.cache
def tokenizer_of(name: str, limits: Limits = DEFAULT_LIMITS) -> Tokenizer:
    """One of `ALL`, shared between tests."""
    if name == "bytes":
        spec = TokenizerSpec(kind="bytes", vocab_size=VOCAB_SIZE, image_token_id=VOCAB_SIZE - 1)
        return open_tokenizer(spec, limits=limits)
    kind, make, image_token_id = FILES[name]
    return opened(kind, make(), image_token_id, limits)
