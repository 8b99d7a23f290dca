"""GEN-01: an answer does not depend on other requests that run at the same time.

Five hundred random batches on ONNX Runtime, with and without caches, in little and in poisoned
memory, are compared with answers given one at a time without caches.
"""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from plm_requests import PoisonedBlock
from soak import Case, Watch, assert_idle, make_cases, onnx_package, run_threads

import perception_rt as prt
from perception_rt.runtime.generation import plm_engine
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import GenerationProgress, Result


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return onnx_package(tmp_path_factory)


@pytest.fixture(scope="module")
def cases(package: Path) -> list[Case]:
    return make_cases(package, 60, seed=2, text=120, new=40)


def test_the_cases_are_not_all_alike(cases: list[Case]) -> None:
    """A model that always gives the same answer would pass the other tests."""
    answers = [case.answer for case in cases]
    assert len({answer.tokens for answer in answers}) >= 50
    assert len({answer.timings.image_tiles for answer in answers}) >= 5
    prompts = [answer.timings.prompt_tokens for answer in answers]
    assert min(prompts) < 256 < 512 < max(prompts)  # the first row sizes
    assert {answer.finish_reason for answer in answers} == {"stop", "length"}


BYTES = 2 * 2 * 1 * 16 * 4  # per token: layers, keys and values, heads, channels, float32

SETTINGS = {
    "plenty": {"cache": False},
    "little": {"cache": False, "max_batch": 3, "kv_bytes": 3500 * BYTES},
    "poisoned": {"cache": False, "max_batch": 6},
    "cached": {},
    "cached in little": {
        "max_batch": 3,
        "kv_bytes": 3500 * BYTES,
        "feature_cache_bytes": 30_000,
        "prefix_cache_bytes": 3000 * BYTES,
    },
}
BATCHES = {"plenty": 150, "little": 100, "poisoned": 50, "cached": 120, "cached in little": 80}


@pytest.mark.parametrize("setting", SETTINGS)
def test_an_answer_does_not_depend_on_company(
    setting: str, package: Path, cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    if setting == "poisoned":
        monkeypatch.setattr(plm_engine, "CacheBlock", PoisonedBlock)
    rng = np.random.default_rng(list(SETTINGS).index(setting))
    with Watch() as watch, prt.load(package, threads=1, **SETTINGS[setting]) as plm:
        results: list[Result] = []
        for _ in range(BATCHES[setting]):
            batch = [cases[i] for i in rng.integers(len(cases), size=rng.integers(2, 9))]
            way = (together, staggered, in_threads)[rng.choice(3, p=[0.3, 0.6, 0.1])]
            # In threads with a time limit, so that a deadlock fails.
            run_threads([lambda way=way, batch=batch: results.extend(way(plm, batch, rng))])
            assert_idle(plm)
    assert watch.left == 0
    # Otherwise few requests ran together, and the test shows nothing.
    in_company = sum(calls for count, calls in watch.decoded.items() if count > 1)
    assert in_company > 0.2 * watch.decoded.total()
    assert max(watch.decoded) >= (3 if "max_batch" in SETTINGS[setting] else 5)
    assert watch.moves >= 5
    assert watch.most_queued >= (3 if "little" in setting else 0)
    cached = any(result.timings.cached_tokens for result in results)
    assert cached == ("cached" in setting)


def together(plm: Generator, batch: list[Case], _: np.random.Generator) -> list[Result]:
    results = plm.generate_batch([case.request for case in batch])
    for case, result in zip(batch, results, strict=True):
        case.check(result)
    return results


def in_threads(plm: Generator, batch: list[Case], rng: np.random.Generator) -> list[Result]:
    """Runs each request in its own thread."""
    results: list[Result] = []

    def ask(case: Case, delay_s: float) -> None:
        time.sleep(delay_s)
        results.append(plm.submit(case.request).result())
        case.check(results[-1])

    run_threads(
        lambda case=case, delay_s=delay_s: ask(case, delay_s)
        for case, delay_s in zip(batch, rng.uniform(0, 0.02, len(batch)), strict=True)
    )
    return results


@dataclass
class Arrivals:
    """Requests that arrive while others run, some of which are cancelled early.

    All but the first arrive and leave in `on_progress` of an earlier request.
    """

    plm: Generator
    batch: list[Case]
    starts: list[int]  # steps of any request before each arrives
    leaves: list[int | None]  # own tokens after which each is cancelled

    def run(self) -> list[Result]:
        self._handles = []
        self._ticks = 0
        self._lock = threading.Lock()  # `on_progress` is called in another thread
        results = []
        for index, case in enumerate(self.batch):
            with self._lock:
                self._arrive(at_least=index + 1)
            results.append(self._handles[index].result())
            case.check_part(results[-1])
            if self.leaves[index] is None:
                case.check(results[-1])
        return results

    def _arrive(self, *, at_least: int = 0) -> None:
        while len(self._handles) < len(self.batch):
            index = len(self._handles)
            if self._ticks < self.starts[index] and index >= at_least:
                return
            request = replace(self.batch[index].request, on_progress=self._ticker(index))
            self._handles.append(self.plm.submit(request))

    def _ticker(self, index: int) -> Callable[[GenerationProgress], None]:
        def tick(progress: GenerationProgress) -> None:
            with self._lock:
                self._ticks += 1
                self._arrive()
            if progress.phase == "decode" and progress.done == self.leaves[index]:
                self._handles[index].cancel()

        return tick


def staggered(plm: Generator, batch: list[Case], rng: np.random.Generator) -> list[Result]:
    starts = np.cumsum(rng.integers(0, 6, len(batch)))
    leaves = [int(rng.integers(1, 20)) if rng.random() < 0.15 else None for _ in batch]
    return Arrivals(plm, batch, starts.tolist(), leaves).run()
