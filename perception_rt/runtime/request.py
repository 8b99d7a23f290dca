"""Requests to a language model and their results, as data; every field is checked here.

Bounds that depend on a model are arguments. Images, videos and texts are checked where they are
opened.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal, TypedDict

import numpy as np
from numpy.typing import NDArray

from perception_rt.errors import InputError, describe
from perception_rt.limits import Limits
from perception_rt.processing.boxes import Box, parse_boxes
from perception_rt.processing.image import ImageSource
from perception_rt.processing.video import VideoSource
from perception_rt.records import INTEGER_BOUND, check_integer, check_text, plain_number

Array = np.ndarray[Any, Any]
FinishReason = Literal["stop", "length", "cancelled", "deadline"]
Phase = Literal["vision", "prefill", "decode"]
# Fields of a request that are numbers, and may be NumPy's.
_NUMBERS = (
    "max_new_tokens",
    "temperature",
    "top_p",
    "top_k",
    "seed",
    "max_tiles",
    "num_frames",
    "deadline_s",
    "repetition_penalty",
)
_PENALTIES = (0.01, 100)
CONSTRAINTS = ("json_schema", "choices", "regex")


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """Progress of a request.

    Attributes:
        phase: "vision" counts tiles, "prefill" prompt tokens, "decode" answer tokens.
        done: tiles or tokens that are finished, cached ones included.
        total: tiles or tokens in this phase; for "decode", `max_new_tokens`.
    """

    phase: Phase
    done: int
    total: int


OnProgress = Callable[[GenerationProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exchange:
    """An earlier question and its answer.

    Attributes:
        prompt: the question.
        answer: the model's answer.
        images: images of the question; see `Request`.
        videos: videos of the question; see `Request`.
        literal: whether marks in the question are text; see `Request`.
    """

    prompt: str
    answer: str
    images: Sequence[ImageSource] = ()
    videos: Sequence[VideoSource] = ()
    literal: bool = False


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One question to a language model.

    Attributes:
        prompt: the question. Several images and videos are placed at its `<image>` and `<video>`
            marks, one mark per item, or before the text if it has no marks. A single image or
            video is placed first, as in training, and its mark is dropped, unless it is one tile
            or has a mark per tile. Without images and videos, marks are text. No other text is
            special.
        images: paths, encoded JPEG, PNG or WebP bytes, Pillow images, or uint8 (H, W, 3) RGB.
        videos: paths or bytes of files, or uint8 (T, H, W, 3) RGB frames; without marks they follow
            the images.
        history: earlier exchanges of the conversation, oldest first.
        max_new_tokens: most tokens of the answer.
        temperature: divides the logits. 0 always takes the likeliest token; top_k, top_p and seed
            then have no effect.
        top_p: sample from the smallest set of likeliest tokens whose probabilities sum to at least
            this, in (0, 1], after temperature and top_k; None for no such limit.
        top_k: sample from this many of the likeliest tokens; None for no such limit.
        seed: RNG seed; results repeat whatever other requests run. None draws a fresh one.
        stop: strings that end the answer and are not part of it.
        max_tiles: tiles per image, at most the model's own limit; None for that limit.
        num_frames: frames per video, at most the model's own limit; None for that limit.
        deadline_s: seconds after which the answer ends unfinished, counted from the call; None for
            no deadline. Opening images and videos counts but is not interrupted.
        lookup: draft tokens from the prompt and verify several per decoder call. This is faster
            when an answer repeats its question. The answer stays the same except for ties: an
            integer engine may round sums of another order differently. Needs temperature 0.
        on_progress: called after each tile, prompt chunk and token, possibly before `submit`
            returns. It runs in the thread that serves all requests and delays them. If it raises,
            the request ends and `Handle.result` raises that exception.
        ignore_eos: end tokens do not end the answer. They count as tokens of the answer, and their
            text is empty.
        lookup_tokens: token ids of text that drafts are also taken from, such as an expected
            answer; the first drafts continue the prompt with it. Needs `lookup`.
        literal: whether `<image>` and `<video>` in the prompt are text. Images and videos then come
            first.
        repetition_penalty: divides positive logits of the tokens of prompt and answer so far, and
            multiplies negative ones, before temperature, as in transformers. Above 1 repeats less,
            1 changes nothing; from 0.01 to 100.
        system: system text in place of the one of the training; None for that one.
        json_schema: JSON schema that the answer follows, as a dictionary. The answer is spelled as
            `json.dumps` does, unless the schema has `x-guidance`, and its members come in the
            order of the schema.
        choices: texts, one of which is the answer.
        regex: regular expression that matches the whole answer, in the syntax of Rust's `regex`
            crate, without look-around.
    """

    prompt: str
    images: Sequence[ImageSource] = ()
    videos: Sequence[VideoSource] = ()
    history: Sequence[Exchange] = ()
    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    stop: Sequence[str] = ()
    max_tiles: int | None = None
    num_frames: int | None = None
    deadline_s: float | None = None
    lookup: bool = False
    on_progress: OnProgress | None = None
    ignore_eos: bool = False
    lookup_tokens: Sequence[int] | None = None
    literal: bool = False
    repetition_penalty: float = 1.0
    system: str | None = None
    json_schema: dict[str, Any] | None = None
    choices: Sequence[str] | None = None
    regex: str | None = None

    def __post_init__(self) -> None:
        for name in _NUMBERS:
            object.__setattr__(self, name, plain_number(getattr(self, name)))


class RequestOptions(TypedDict, total=False):
    """The fields of `Request` after `prompt`, as keyword arguments."""

    images: Sequence[ImageSource]
    videos: Sequence[VideoSource]
    history: Sequence[Exchange]
    max_new_tokens: int
    temperature: float
    top_p: float | None
    top_k: int | None
    seed: int | None
    stop: Sequence[str]
    max_tiles: int | None
    num_frames: int | None
    deadline_s: float | None
    lookup: bool
    on_progress: OnProgress | None
    ignore_eos: bool
    lookup_tokens: Sequence[int] | None
    literal: bool
    repetition_penalty: float
    system: str | None
    json_schema: dict[str, Any] | None
    choices: Sequence[str] | None
    regex: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Seconds that a request spent in each phase, and the amount of work.

    Attributes:
        preprocess_s: opening images and videos, tokenising.
        queue_s: waiting between preprocessing and the first work.
        vision_s: encoding tiles.
        prefill_s: running the prompt through the decoder.
        token_times_s: time of each token since the call, an end token included.
        total_s: from the call to the end.
        prompt_tokens: prompt length, image tokens included.
        cached_tokens: prompt tokens whose keys and values came from the prefix cache.
        image_tiles: image tiles and video frames, encoded or cached.
        new_tokens: answer length.
        steps: decoder calls after the prompt.
    """

    preprocess_s: float
    queue_s: float
    vision_s: float
    prefill_s: float
    token_times_s: tuple[float, ...]
    total_s: float
    prompt_tokens: int
    cached_tokens: int
    image_tiles: int
    new_tokens: int
    steps: int

    @property
    def ttft_s(self) -> float | None:
        """Time to first token, in seconds; None without a token."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def per_token_s(self) -> float | None:
        """Median seconds between tokens; None for fewer than two tokens."""
        times = self.token_times_s
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return median(gaps) if gaps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer.

    Attributes:
        text: the decoded tokens, up to a stop string.
        tokens: token ids, including those of a stop string. The end token is included only with
            `ignore_eos`.
        finish_reason: "stop" at an end token or stop string, "length" at `max_new_tokens`;
            "cancelled" and "deadline" mark an unfinished answer.
        timings: where the time went.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def boxes(self) -> list[Box]:
        """Returns the boxes that the text mentions, in order."""
        return parse_boxes(self.text)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Score:
    """Log-probabilities of a given answer.

    Attributes:
        tokens: token ids of the answer, without an end token.
        logprobs: float64 (T,), natural logarithm of each token's probability given the prompt and
            the tokens before it, over the whole vocabulary.
    """

    tokens: tuple[int, ...]
    logprobs: NDArray[np.float64]

    @property
    def total(self) -> float:
        """Log-probability of the whole answer."""
        return float(self.logprobs.sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorStats:
    """Load and memory of a generator at one moment.

    Attributes:
        queued: requests that wait for memory.
        running: requests with a row of the key-value cache.
        kv_bytes: bytes of keys and values in use or promised to running requests.
        kv_bytes_limit: bound on `kv_bytes`.
        feature_cache_bytes: bytes of cached image features in memory.
        prefix_cache_bytes: bytes of cached prompts in memory.
    """

    queued: int
    running: int
    kv_bytes: int
    kv_bytes_limit: int
    feature_cache_bytes: int
    prefix_cache_bytes: int


def check_request(
    request: Request,
    *,
    vocab_size: int,
    max_length: int,
    max_tiles: int,
    max_frames: int,
    limits: Limits,
) -> None:
    """Checks type and bounds of every field.

    Args:
        request: a user's request.
        vocab_size: bound on `top_k` and on the ids in `lookup_tokens`.
        max_length: bound on the number of `lookup_tokens`.
        max_tiles: the model's tiles per image.
        max_frames: the model's frames per video.
        limits: bounds on counts and on sizes of strings.

    Raises:
        InputError: names the field and its value.
    """
    if not isinstance(request, Request):
        raise InputError(f"a request must be a Request, not {describe(request)}")
    _check_conversation(request, limits)
    check_integer("max_new_tokens", request.max_new_tokens, 1)
    _check_number("temperature", request.temperature, 0, math.inf)
    if request.top_p is not None:
        _check_number("top_p", request.top_p, 0, 1)
        if request.top_p == 0:
            raise InputError("top_p must be above 0")
    for name, least, most in (
        ("top_k", 1, vocab_size),
        ("seed", 0, INTEGER_BOUND - 1),
        ("max_tiles", 0, max_tiles),
        ("num_frames", 1, max_frames),
    ):
        value = getattr(request, name)
        if value is not None:
            check_integer(name, value, least, most)
    if request.deadline_s is not None:
        _check_number("deadline_s", request.deadline_s, 0, math.inf)
    _check_stop(request.stop, limits)
    _check_number("repetition_penalty", request.repetition_penalty, *_PENALTIES)
    for name in ("lookup", "ignore_eos", "literal"):
        check_bool(name, getattr(request, name))
    _check_lookup(request, vocab_size, max_length)
    _check_constraint(request, limits)
    if request.on_progress is not None and not callable(request.on_progress):
        raise InputError(f"on_progress must be callable, not {describe(request.on_progress)}")


def check_bool(name: str, value: object) -> None:
    """InputError unless a value is True or False."""
    if not isinstance(value, bool | np.bool_):
        raise InputError(f"{name} must be True or False, not {describe(value)}")


def check_list(name: str, items: object) -> Sequence[Any]:
    """Returns the items; InputError unless they are a list or a tuple."""
    if not isinstance(items, list | tuple):
        raise InputError(f"{name} must be a list, not {describe(items)}")
    return items


def check_ids(name: str, ids: object, vocab_size: int, most: int) -> Array:
    """Returns token ids as int64 (T,); InputError unless 1 to `most` are given, all in range."""
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError):
        array = np.empty(0)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise InputError(f"{name} must be a list of at least one integer")
    if len(array) > most:
        raise InputError(f"{name} has {len(array)} tokens; the context has {most}")
    if not 0 <= array.min() <= array.max() < vocab_size:
        raise InputError(f"{name} must be from 0 to {vocab_size - 1}")
    return array.astype(np.int64)


def _check_lookup(request: Request, vocab_size: int, max_length: int) -> None:
    if request.lookup and request.temperature != 0:
        raise InputError("lookup is for temperature 0 only")
    if request.lookup_tokens is None:
        return
    check_ids("lookup_tokens", request.lookup_tokens, vocab_size, max_length)
    if not request.lookup:
        raise InputError("lookup_tokens need lookup=True")


def _check_constraint(request: Request, limits: Limits) -> None:
    """Checks type and size of the constraint; whether it has a meaning is checked by its library.

    The check of `json_schema` bounds its depth too, since JSON of a cyclic or very deep dictionary
    cannot be written.
    """
    given = [name for name in CONSTRAINTS if getattr(request, name) is not None]
    if not given:
        return
    if len(given) > 1:
        raise InputError(f"{given[0]} and {given[1]} cannot both be given")
    if request.ignore_eos:
        raise InputError(f"{given[0]} cannot be followed with ignore_eos, which has no end")
    if request.regex is not None:
        check_text("regex", request.regex, limits.text_bytes)
    elif request.choices is not None:
        choices = check_list("choices", request.choices)
        if not choices or not all(isinstance(text, str) and text for text in choices):
            raise InputError("choices must be a list of at least one text, none of them empty")
        check_text("choices", "".join(choices), limits.text_bytes)
    else:
        if not isinstance(request.json_schema, dict):
            shown = describe(request.json_schema)
            raise InputError(f"json_schema must be a dictionary, not {shown}")
        try:
            text = json.dumps(request.json_schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as error:
            reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
            raise InputError(f"json_schema cannot be written as JSON: {reason:.200}") from None
        check_text("json_schema", text, limits.text_bytes)


def _check_conversation(request: Request, limits: Limits) -> None:
    """Checks types and sizes of the prompt, the history and their images and videos."""
    check_list("history", request.history)
    if len(request.history) > limits.history_turns:
        raise InputError(
            f"history has {len(request.history)} exchanges; the limit is {limits.history_turns}"
        )
    size = _text_bytes("prompt", request.prompt)
    if request.system is not None:
        size += _text_bytes("system", request.system)
    for index, exchange in enumerate(request.history):
        where = f"history {index}: "
        if not isinstance(exchange, Exchange):
            raise InputError(f"{where}must be an Exchange, not {describe(exchange)}")
        size += _text_bytes(f"{where}prompt", exchange.prompt)
        size += _text_bytes(f"{where}answer", exchange.answer)
        check_list(f"{where}images", exchange.images)
        check_list(f"{where}videos", exchange.videos)
        check_bool(f"{where}literal", exchange.literal)
    if size > limits.conversation_bytes:
        raise InputError(
            f"prompt and history have {size} bytes in UTF-8; "
            f"the limit is {limits.conversation_bytes}"
        )
    check_list("images", request.images)
    check_list("videos", request.videos)


def _check_stop(stop: object, limits: Limits) -> None:
    strings = check_list("stop", stop)
    if len(strings) > limits.stop_strings:
        raise InputError(f"stop has {len(strings)} strings; the limit is {limits.stop_strings}")
    for text in strings:
        if not isinstance(text, str) or not 1 <= len(text) <= limits.stop_chars:
            shown = f"one of {len(text)}" if isinstance(text, str) else describe(text)
            raise InputError(
                f"stop must hold strings of 1 to {limits.stop_chars} characters, not {shown}"
            )


def _check_number(name: str, value: object, least: float, most: float) -> None:
    """InputError unless a value is a finite int or float, not a bool, and within bounds."""
    fits = type(value) is float and math.isfinite(value)
    fits = fits or (type(value) is int and abs(value) < INTEGER_BOUND)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{name} must be a finite number {bounds}, not {describe(value)}")


def _text_bytes(name: str, text: object) -> int:
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string, not {describe(text)}")
    return len(text.encode("utf-8", errors="surrogatepass"))
