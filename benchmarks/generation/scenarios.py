"""Requests to a package as a user makes them, timed: pictures, caches, guesses, batches.

Takes a loaded generator and returns plain JSON, times in milliseconds. Does not import torch.
"""

import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.prepare import COPY, NEXT_QUESTION, QUESTION, short_question
from perception_rt.errors import BackendError
from perception_rt.processing.image import decode_image
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import GenerationProgress, Request, Result

_WARM_UP_TOKENS = 2


def ask_about_photo(plm: Generator, photo: Path, max_tiles: int, tokens: int) -> dict[str, Any]:
    """The same question twice; the first opens the engines. For a generator without caches."""
    request = Request(QUESTION, images=[photo], max_new_tokens=tokens, max_tiles=max_tiles)
    return {"first": _record(_answer(plm, request)), "warm": _record(_answer(plm, request))}


def ask_again(plm: Generator, photo: Path, max_tiles: int) -> dict[str, Any]:
    """Two questions about one picture, after one about another that opens the engines."""
    other = np.asarray(decode_image(photo))[:, ::-1]
    _answer(plm, Request(QUESTION, images=[other], max_new_tokens=1, max_tiles=0))
    records = {}
    for name, question in (("first", QUESTION), ("second", NEXT_QUESTION)):
        request = Request(question, images=[photo], max_new_tokens=1, max_tiles=max_tiles)
        records[name] = _record(_answer(plm, request))
    return records


def guess(plm: Generator, tokens: int) -> dict[str, Any]:
    """A text to be copied, token by token and with guesses, which change no token.

    "prompt" drafts from the prompt. Random weights copy nothing from it, so "answer" also searches
    the whole expected answer (`Request.lookup_tokens`), as if the model copied perfectly.
    """
    request = Request(COPY, max_new_tokens=tokens)
    guessing = replace(request, lookup=True)
    _answer(plm, replace(guessing, max_new_tokens=_WARM_UP_TOKENS))
    plain = _answer(plm, request)
    knowing = replace(guessing, lookup_tokens=plain.tokens)
    results = {"prompt": _answer(plm, guessing), "answer": _answer(plm, knowing)}
    return {
        "plain": _record(plain),
        **{
            name: {**_record(result), "identical": result.tokens == plain.tokens}
            for name, result in results.items()
        },
    }


def ask_together(plm: Generator, batches: list[int], tokens: int) -> dict[str, dict[str, float]]:
    """Tokens of all requests while each of them has its first and none its last, by number."""
    _answer(plm, Request(short_question(0), max_new_tokens=_WARM_UP_TOKENS))
    records = {}
    for batch in batches:
        times: list[list[float]] = [[] for _ in range(batch)]
        requests = [
            Request(short_question(index), max_new_tokens=tokens, on_progress=_clock(times[index]))
            for index in range(batch)
        ]
        plm.generate_batch(requests)
        if not all(times):
            raise BackendError("an answer ended before it began")
        start, stop = max(t[0] for t in times), min(t[-1] for t in times)
        if start >= stop:
            raise BackendError(f"{batch} answers were not under way at once: ask for more tokens")
        count = sum(start < at <= stop for t in times for at in t)
        records[str(batch)] = {"tokens": count, "ms": (stop - start) * 1e3}
    return records


def _answer(plm: Generator, request: Request) -> Result:
    (result,) = plm.generate_batch([request])
    if len(result.timings.token_times_s) < min(2, request.max_new_tokens):
        raise BackendError("an answer ended before it began")
    return result


def _record(result: Result) -> dict[str, Any]:
    timings = result.timings
    return {
        "prompt_tokens": timings.prompt_tokens,
        "cached_tokens": timings.cached_tokens,
        "image_tiles": timings.image_tiles,
        "new_tokens": timings.new_tokens,
        "steps": timings.steps,
        "preprocess_ms": timings.preprocess_s * 1e3,
        "vision_ms": timings.vision_s * 1e3,
        "prefill_ms": timings.prefill_s * 1e3,
        "ttft_ms": timings.token_times_s[0] * 1e3,
        "token_ms": [(b - a) * 1e3 for a, b in pairwise(timings.token_times_s)],
    }


def _clock(times: list[float]) -> Any:
    """A request's `on_progress` that notes when each token came."""

    def note(progress: GenerationProgress) -> None:
        if progress.phase == "decode":
            times.append(time.perf_counter())

    return note
