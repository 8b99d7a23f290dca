"""Worker of `generate.py`: performs one task in a process of its own.

A task that runs engines imports no torch.
"""

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.generation.prepare import prepare, small_tokenizer
from benchmarks.generation.runners import GENAI_DIRECTORY, Row, Runner, build_genai, open_runner
from benchmarks.generation.scenarios import (
    ask_about_photo,
    ask_again,
    ask_together,
    ask_with_lookup,
)
from benchmarks.subprocess_task import serve
from perception_rt.memory import peak_rss_bytes
from perception_rt.plm_config import PlmConfig
from perception_rt.runtime.generator import Generator

_WARM_UP_STEPS = 2
_PREFILL_CALLS = 3
_PREFILL_BUDGET_MS = 2000.0  # later calls are skipped


def perform(task: Mapping[str, Any]) -> Any:
    """Performs a task in this process; returns plain JSON."""
    match task["do"]:
        case "prepare":
            return prepare(
                PlmConfig.from_dict(task["config"]),
                Path(task["work"]),
                name=task["model"],
                precision=task["precision"],
                blocks=task["blocks"],
            )
        case "build genai":
            config = PlmConfig.from_dict(task["config"])
            _, tokenizer = small_tokenizer(config)
            return build_genai(config.decoder, tokenizer, Path(task["work"]) / GENAI_DIRECTORY)
        case "decoder":
            return _run_decoder(task)
        case _:
            return _ask(task)


def measure_decoder(
    runner: Runner, ids: np.ndarray[Any, Any], prompts: Sequence[int], steps: int
) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of prefills and steps by prompt length, after a short untimed prompt.

    Args:
        runner: an open decoder.
        ids: token ids of the longest prompt, int64 (T,).
        prompts: prompt lengths in tokens.
        steps: tokens after each prompt, at least 1.
    """
    runner.prefill(ids[: min(prompts)], _WARM_UP_STEPS)
    for _ in range(_WARM_UP_STEPS):
        runner.step()
    result = {}
    for length in prompts:
        prefill = partial(runner.prefill, ids[:length], steps)
        times = [_ms(prefill)]
        while len(times) < _PREFILL_CALLS and sum(times) < _PREFILL_BUDGET_MS:
            times.append(_ms(prefill))
        token_ms = [_ms(runner.step) for _ in range(steps)]
        result[str(length)] = {"prefill_ms": times, "token_ms": token_ms}
    return result


def _run_decoder(task: Mapping[str, Any]) -> dict[str, Any]:
    config = PlmConfig.from_dict(task["config"])
    runner = open_runner(
        Row(**task["row"]),
        config.decoder,
        package=Path(task["package"]),
        work=Path(task["work"]),
        threads=task["threads"],
    )
    rng = np.random.default_rng(0)
    ids = rng.integers(0, config.decoder.vocab_size, max(task["prompts"]), np.int64)
    ids[ids == config.image_token_id] = 0
    return {
        "lengths": measure_decoder(runner, ids, task["prompts"], task["steps"]),
        "read_bytes": runner.read_bytes,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def _ask(task: Mapping[str, Any]) -> dict[str, Any]:
    """Asks a generator; only the `again` task has caches."""
    start = time.perf_counter()
    cache = task["do"] == "again"
    with Generator.load(task["package"], threads=task["threads"], cache=cache) as plm:
        load_ms = (time.perf_counter() - start) * 1e3
        records: dict[str, Any]
        match task["do"]:
            case "photo":
                photo = Path(task["photo"])
                records = ask_about_photo(plm, photo, task["max_tiles"], task["tokens"])
            case "again":
                records = ask_again(plm, Path(task["photo"]), task["max_tiles"])
            case "lookup":
                records = ask_with_lookup(plm, task["tokens"])
            case _:
                records = ask_together(plm, task["batches"], task["tokens"])
    return {"records": records, "load_ms": load_ms, "peak_rss_bytes": peak_rss_bytes()}


def _ms(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return (time.perf_counter() - start) * 1e3


if __name__ == "__main__":
    sys.exit(serve(perform))
