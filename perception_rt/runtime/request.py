"""What is asked of a language model and what comes back, as data; every field is checked here.

Knows no model: bounds that depend on one are arguments. What images, videos and texts hold is
checked where they are opened.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Any, Literal

from perception_rt.errors import InputError, describe
from perception_rt.limits import Limits
from perception_rt.processing.boxes import Box, parse_boxes
from perception_rt.processing.image import ImageSource
from perception_rt.processing.video import VideoSource

FinishReason = Literal["stop", "length", "cancelled", "deadline"]
Phase = Literal["vision", "prefill", "decode"]

_INT_BOUND = 2**63


@dataclass(frozen=True, slots=True)
class GenerationProgress:
    """How far a request is: tiles of "vision", tokens of "prefill", tokens of "decode".

    Attributes:
        phase: what was just done a part of.
        done: parts that are done; what a cache knew counts as done.
        total: parts in all; of "decode", the most that there can be.
    """

    phase: Phase
    done: int
    total: int


OnProgress = Callable[[GenerationProgress], None]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Exchange:
    """A question of before and its answer.

    Attributes:
        prompt: the question.
        answer: what the model said.
        images: that the question came with; see `Request`.
        videos: the same.
    """

    prompt: str
    answer: str
    images: Sequence[ImageSource] = ()
    videos: Sequence[VideoSource] = ()


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """One question to a language model.

    Attributes:
        prompt: the question. Several images and videos go where it has `<image>` or `<video>`, one
            mark for each of them, or first if it has neither. A single one goes first, as the
            models were trained, and its mark is dropped, unless it is one tile, or has a mark for
            each of its tiles. Nothing else in it is special.
        images: paths, encoded JPEG, PNG or WebP bytes, Pillow images, or uint8 (H, W, 3) RGB.
        videos: paths, or uint8 (T, H, W, 3) RGB frames; they follow the images.
        history: what was said before, the oldest first.
        max_new_tokens: the longest answer.
        temperature: what logits are divided by; 0 takes the likeliest token each time, and then
            top_k, top_p and seed change nothing.
        top_p: draw from the fewest likeliest tokens that have this probability together, after
            temperature and top_k; in (0, 1], None for no such cut.
        top_k: draw from this many of the likeliest tokens; None for no such cut.
        seed: makes the draws repeatable, in any company of other requests; None for chance.
        stop: strings that end the answer, and that it never contains.
        max_tiles: a tighter budget of tiles per image than the model's.
        num_frames: a tighter budget of frames per video than the model's.
        deadline_s: seconds after which the answer ends where it is, counted from when its images
            are opened, which is not cut short; None for no end.
        lookup: guess tokens from what was said, and check several at once: faster where an answer
            repeats its question, and the same answer but for ties: sums in another order may
            round differently in an integer engine. For temperature 0 only.
        on_progress: called after each tile, part of the prompt and token, in the thread that works
            on all requests and waits for it, perhaps before `submit` returns. An exception from it
            ends the request and is raised where that is waited for.
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Where the time of a request went, in seconds, and how much work there was.

    Attributes:
        preprocess_s: opening images and videos, tokenising.
        queue_s: from then until the first work on it.
        vision_s: encoding tiles.
        prefill_s: running the prompt through the decoder.
        token_times_s: of each token, from the call on. An end token is among them.
        total_s: from the call to the end.
        prompt_tokens: image tokens among them.
        cached_tokens: those of the prompt whose keys and values were in the cache.
        image_tiles: tiles and frames, encoded or cached.
        new_tokens: of the answer.
        steps: runs of the decoder after the prompt.
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
        """From the call to the first token; None if there is none."""
        return self.token_times_s[0] if self.token_times_s else None

    @property
    def per_token_s(self) -> float | None:
        """Median from one token to the next; None if there are not two."""
        times = self.token_times_s
        gaps = [later - earlier for earlier, later in pairwise(times)]
        return median(gaps) if gaps else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """An answer.

    Attributes:
        text: what the tokens spell, up to a stop string.
        tokens: their ids, without the end token, and with those of a stop string.
        finish_reason: "stop" for an end token or a stop string, "length" for `max_new_tokens`;
            "cancelled" and "deadline" for an answer that is not whole.
        timings: where the time went.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings

    def boxes(self) -> list[Box]:
        """The boxes that the text mentions, in order."""
        return parse_boxes(self.text)


def check_request(
    request: Request, *, vocab_size: int, max_tiles: int, max_frames: int, limits: Limits
) -> None:
    """InputError unless every field is of its type and within its bounds.

    Args:
        request: as a user made it.
        vocab_size: bound on top_k.
        max_tiles: the model's own.
        max_frames: the model's own.
        limits: bounds on numbers and sizes of strings.
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
        ("seed", 0, _INT_BOUND - 1),
        ("max_tiles", 0, max_tiles),
        ("num_frames", 1, max_frames),
    ):
        value = getattr(request, name)
        if value is not None:
            check_integer(name, value, least, most)
    if request.deadline_s is not None:
        _check_number("deadline_s", request.deadline_s, 0, math.inf)
    _check_stop(request.stop, limits)
    if type(request.lookup) is not bool:
        raise InputError(f"lookup must be True or False, not {describe(request.lookup)}")
    if request.lookup and request.temperature != 0:
        raise InputError("lookup is for temperature 0 only")
    if request.on_progress is not None and not callable(request.on_progress):
        raise InputError(f"on_progress must be callable, not {describe(request.on_progress)}")


def check_integer(name: str, value: object, least: int, most: int = _INT_BOUND - 1) -> None:
    """InputError unless a value is an integer, and no bool, within bounds."""
    if type(value) is not int or not least <= value <= most:
        bounds = f"of at least {least}" if most == _INT_BOUND - 1 else f"from {least} to {most}"
        raise InputError(f"{name} must be an integer {bounds}, not {describe(value)}")


def _check_conversation(request: Request, limits: Limits) -> None:
    """Types of everything that is said or shown, and how much of it there is."""
    check_list("history", request.history)
    if len(request.history) > limits.history_turns:
        raise InputError(
            f"history has {len(request.history)} exchanges; the limit is {limits.history_turns}"
        )
    size = _text_bytes("prompt", request.prompt)
    for index, exchange in enumerate(request.history):
        where = f"history {index}: "
        if not isinstance(exchange, Exchange):
            raise InputError(f"{where}must be an Exchange, not {describe(exchange)}")
        size += _text_bytes(f"{where}prompt", exchange.prompt)
        size += _text_bytes(f"{where}answer", exchange.answer)
        check_list(f"{where}images", exchange.images)
        check_list(f"{where}videos", exchange.videos)
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


def check_list(name: str, items: object) -> Sequence[Any]:
    """The items; InputError unless they are a list or a tuple, and not one item on its own."""
    if not isinstance(items, list | tuple):
        raise InputError(f"{name} must be a list, not {describe(items)}")
    return items


def _check_number(name: str, value: object, least: float, most: float) -> None:
    """InputError unless a value is a finite int or float, and no bool, within bounds."""
    fits = type(value) is float and math.isfinite(value)
    fits = fits or (type(value) is int and abs(value) < _INT_BOUND)
    if not fits or not least <= value <= most:  # type: ignore[operator]
        bounds = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise InputError(f"{name} must be a finite number {bounds}, not {describe(value)}")


def _text_bytes(name: str, text: object) -> int:
    if not isinstance(text, str):
        raise InputError(f"{name} must be a string, not {describe(text)}")
    return len(text.encode("utf-8", errors="surrogatepass"))
