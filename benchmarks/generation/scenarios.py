"""Times requests as a user makes them: a photograph, a second question, speculation, batches.

Each function takes an open generator and returns plain JSON with times in milliseconds. End tokens
are ignored, because random weights may choose one at any time. Nothing here imports torch.
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
    """Asks the same question twice, of a generator without caches; the first opens the engines."""
    request = _request(QUESTION, tokens, images=[photo], max_tiles=max_tiles)
    return {"first": _record(_answer(plm, request)), "warm": _record(_answer(plm, request))}


def ask_again(plm: Generator, photo: Path, max_tiles: int) -> dict[str, Any]:
    """Asks two questions about one picture, after one about another picture opens the engines."""
    other = np.asarray(decode_image(photo))[:, ::-1]
    _answer(plm, _request(QUESTION, 1, images=[other], max_tiles=0))
    records = {}
    for name, question in (("first", QUESTION), ("second", NEXT_QUESTION)):
        request = _request(question, 1, images=[photo], max_tiles=max_tiles)
        records[name] = _record(_answer(plm, request))
    return records


def ask_with_lookup(plm: Generator, tokens: int) -> dict[str, Any]:
    """Asks for a copy of a text without and with prompt lookup, which must not change a token.

    "prompt" drafts from the prompt. Random weights copy nothing from it, so "answer" also searches
    the whole expected answer (`Request.lookup_tokens`), as if the model copied perfectly.
    """
    request = _request(COPY, tokens)
    prompt = replace(request, lookup=True)
    _answer(plm, replace(prompt, max_new_tokens=_WARM_UP_TOKENS))
    plain = _answer(plm, request)
    answer = replace(prompt, lookup_tokens=plain.tokens)
    results = {"prompt": _answer(plm, prompt), "answer": _answer(plm, answer)}
    return {
        "plain": _record(plain),
        **{
            name: {**_record(result), "identical": result.tokens == plain.tokens}
            for name, result in results.items()
        },
    }


def ask_together(plm: Generator, batches: list[int], tokens: int) -> dict[str, dict[str, float]]:
    """Counts tokens while all requests of a batch are decoding, by batch size."""
    _answer(plm, _request(short_question(0), _WARM_UP_TOKENS))
    records = {}
    for batch in batches:
        times: list[list[float]] = [[] for _ in range(batch)]
        requests = [
            _request(short_question(index), tokens, on_progress=_clock(times[index]))
            for index in range(batch)
        ]
        plm.generate_batch(requests)
        start, stop = max(t[0] for t in times), min(t[-1] for t in times)
        if start >= stop:
            raise BackendError(f"{batch} answers did not overlap: increase --tokens")
        count = sum(start < at <= stop for t in times for at in t)
        records[str(batch)] = {"tokens": count, "ms": (stop - start) * 1e3}
    return records


def _request(prompt: str, tokens: int, **options: Any) -> Request:
    return Request(prompt, max_new_tokens=tokens, ignore_eos=True, **options)


def _answer(plm: Generator, request: Request) -> Result:
    (result,) = plm.generate_batch([request])
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
    """An `on_progress` callback that appends the time of each token."""

    def note(progress: GenerationProgress) -> None:
        if progress.phase == "decode":
            times.append(time.perf_counter())

    return note
