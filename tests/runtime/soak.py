"""Random requests and their answers, threads with time limits, and resources of the process."""

import ctypes
import gc
import string
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Self

import numpy as np
import psutil
import pytest
from fake_plm import CONFIG

import perception_rt as prt
from perception_rt.plm_config import DecoderConfig, PlmConfig
from perception_rt.processing.llm_tokenizer import TokenizerSpec
from perception_rt.processing.tiles import TileSpec
from perception_rt.runtime import generator as generators
from perception_rt.runtime.cache.kv_pool import KvPool, Lease
from perception_rt.runtime.generation import plm_engine
from perception_rt.runtime.generation.pipeline import Pipeline
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.prompt_lookup import MAX_DRAFTS
from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.generation.scheduler import Scheduler
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Exchange, Request, Result

_LETTERS = list(string.ascii_letters + "  .,\u00e9\u4e16\U0001f600")
_LIBC = ctypes.CDLL(None)


def onnx_package(factory: pytest.TempPathFactory) -> Path:
    """A tiny model for ONNX Runtime, in float32; exported once per session."""
    out = factory.getbasetemp() / "onnx-plm"
    if not out.exists():
        export_onnx(out)
    return out


def export_onnx(out: Path) -> None:
    """Exports random weights with a context of 1024 tokens and a tokenizer of bytes."""
    # torch and onnx are imported only for those tests that need a package.
    from perception_rt.checkpoint.random import RandomWeights
    from perception_rt.export.build import export_package
    from perception_rt.export.plan import PlmPlan

    config = PlmConfig(
        decoder=DecoderConfig(
            dim=32,
            n_layers=2,
            n_heads=2,
            n_kv_heads=1,
            vocab_size=320,
            max_seqlen=1024,
            multiple_of=16,
            ffn_dim_multiplier=0.5,
        ),
        vision=CONFIG.vision,
        image_token_id=319,
    )
    text = TokenizerSpec(kind="bytes", vocab_size=320, image_token_id=319)
    plan = PlmPlan(
        name="tiny",
        config=config,
        backend="onnxruntime",
        precision="fp32",
        tiles=TileSpec(tile_size=config.vision.image_size, max_tiles=4, max_frames=4),
        tokenizer=(text, None),
    )
    export_package(plan, RandomWeights(config, 0), out)


@cache
def picture(seed: int) -> np.ndarray:
    """A random image of random size; few seeds are used, so that caches hit."""
    rng = np.random.default_rng(seed)
    height, width = rng.integers(20, 120, 2)
    return rng.integers(0, 256, (height, width, 3), np.uint8)


@cache
def clip(seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (rng.integers(1, 7), 40, 50, 3), np.uint8)


def random_request(rng: np.random.Generator, *, text: int, new: int) -> Request:
    """A random request: with or without images, videos and history; greedy, drafting or sampled.

    Args:
        rng: source of all choices.
        text: most characters of the question, and of the history.
        new: bound on `max_new_tokens`.
    """

    def words(most: int) -> str:
        # Questions share beginnings, so that the prefix cache hits.
        start = ("What is this? ", "What is that? ", "")[rng.integers(3)]
        return start + "".join(rng.choice(_LETTERS, rng.integers(most)))

    def pictures(most: int) -> list[np.ndarray]:
        return [picture(int(seed)) for seed in rng.integers(6, size=rng.integers(most + 1))]

    media = rng.choice(["nothing", "image", "images", "video", "both", "history"])
    history = ()
    if media == "history":
        history = [
            Exchange(prompt=words(text // 2), answer=words(text // 2), images=pictures(1))
            for _ in range(rng.integers(1, 3))
        ]
    options = {}
    drawn = rng.random() < 0.4
    if drawn:
        options = {
            "temperature": float(rng.choice([0.3, 1.0, 2.0])),
            "seed": int(rng.integers(2**62)),
            "top_k": None if rng.random() < 0.5 else int(rng.integers(1, 300)),
            "top_p": None if rng.random() < 0.5 else float(rng.uniform(0.1, 1)),
        }
    return Request(
        words(text),
        images=pictures({"image": 1, "images": 3, "both": 1}.get(media, 0)),
        videos=[clip(int(rng.integers(4)))] if media in ("video", "both") else (),
        history=history,
        max_new_tokens=int(rng.integers(1, new)),
        max_tiles=None if rng.random() < 0.5 else int(rng.integers(4)),
        stop=[] if rng.random() < 0.8 else [str(rng.choice(_LETTERS))],
        lookup=not drawn and rng.random() < 0.5,
        **options,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Case:
    """A request, and its answer when it runs alone and without caches."""

    request: Request
    answer: Result

    def check(self, result: Result) -> None:
        """Checks that an answer is the same."""
        assert result.tokens == self.answer.tokens
        assert (result.text, result.finish_reason) == (self.answer.text, self.answer.finish_reason)

    def check_part(self, result: Result) -> bool:
        """Checks that an answer is the same or its beginning; returns whether it is cut short."""
        broken = result.finish_reason in ("cancelled", "deadline")
        if broken:
            assert result.tokens == self.answer.tokens[: len(result.tokens)]
        else:
            self.check(result)
        return broken


def make_cases(package: Path, count: int, *, seed: int, text: int, new: int) -> list[Case]:
    """Requests with their answers, one by one, without caches and without moves between rows."""
    rng = np.random.default_rng(seed)
    cases = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plm_engine, "SMALLEST_ROW", 2**20)  # rows are as long as they can be
        plm = prt.load(package, cache=False, max_batch=1, threads=1)
    with plm:
        for _ in range(count):
            # Without drafts: the tests show that drafts change no answer.
            request = random_request(rng, text=text, new=new)
            answer = plm.submit(replace(request, lookup=False)).result()
            cases.append(Case(request=request, answer=answer))
            assert plm.stats.running == 0
    return cases


@dataclass
class Watch:
    """Counts what generators do while the context is open, and checks invariants at every step.

    Attributes:
        decoded: number of decoder calls by how many tokens they decoded together.
        moves: moves of a request to a longer row.
        most_queued: most requests that waited for memory at once.
        steps: steps of the schedulers.
        left: rows that were released without being cleared. A release itself must not fail.
    """

    decoded: Counter[int] = field(default_factory=Counter)
    moves: int = 0
    most_queued: int = 0
    steps: int = 0
    left: int = 0

    def __enter__(self) -> Self:
        self._patch = pytest.MonkeyPatch()
        step, forward = Scheduler.step, PlmEngine.forward
        make_room, release = KvPool.make_room, KvPool.release

        def watched_step(scheduler: Scheduler) -> None:
            step(scheduler)
            scheduler.invariants()
            self.steps += 1
            self.most_queued = max(self.most_queued, scheduler.queued)

        def watched_room(pool: KvPool, lease: Lease, length: int) -> None:
            bucket, row = lease.bucket, lease.row
            make_room(pool, lease, length)
            if lease.bucket is not bucket:
                self.moves += 1
                self.left += not is_clear(bucket, row, lease.length)

        def watched_release(pool: KvPool, lease: Lease) -> None:
            bucket, row = lease.bucket, lease.row
            release(pool, lease)
            self.left += not is_clear(bucket, row, lease.length)

        def watched_forward(engine: PlmEngine, hidden: np.ndarray, *rest: Any) -> np.ndarray:
            if hidden.shape[1] == 1:
                self.decoded[len(hidden)] += 1
            return forward(engine, hidden, *rest)

        self._patch.setattr(Scheduler, "step", watched_step)
        self._patch.setattr(KvPool, "make_room", watched_room)
        self._patch.setattr(KvPool, "release", watched_release)
        self._patch.setattr(PlmEngine, "forward", watched_forward)
        return self

    def __exit__(self, *_: object) -> None:
        self._patch.undo()


def is_clear(bucket, row: int, length: int) -> bool:
    """Whether a released row holds no earlier contents; a test may have filled it with NaN."""
    if bucket.block is None:
        return True
    tokens = bucket.block.read(row, min(length + 2 * MAX_DRAFTS, bucket.slots))
    return not np.nan_to_num(tokens).any()


_pipelines: weakref.WeakKeyDictionary[Generator, Pipeline] = weakref.WeakKeyDictionary()


def load(package: Path, **options: Any) -> Generator:
    """A generator whose answers are as long as they may be, and whose `parts` are known.

    Not to be called by several threads at once.
    """
    opened: list[Pipeline] = []
    open_pipeline = generators.open_pipeline

    def remember(*arguments: Any, **keywords: Any) -> Pipeline:
        opened.append(open_pipeline(*arguments, **keywords))
        return opened[0]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generators, "open_pipeline", remember)
        plm = prt.load(package, **{"threads": 1, **options})
    (_pipelines[plm],) = opened
    opened[0].preprocessor.tokenizer.end_ids = frozenset()
    return plm


def parts(plm: Generator) -> Pipeline:
    """The parts of a generator that `load` opened."""
    return _pipelines[plm]


def assert_idle(plm: Generator) -> None:
    """Checks that no request is left, also in the parts if `load` opened the generator."""
    stats = plm.stats
    assert (stats.queued, stats.running, stats.kv_bytes) == (0, 0, 0)
    pipeline = _pipelines.get(plm)
    if pipeline is not None:
        pipeline.scheduler.invariants()
        assert pipeline.scheduler.requests == [] and pipeline.pool.used_rows == 0


def live_requests() -> int:
    """Number of request states that are still referenced."""
    gc.collect()
    return sum(type(item) is RequestState for item in gc.get_objects())


def run_threads(works: Iterable[Callable[[], object]], *, timeout_s: float = 60.0) -> None:
    """Runs each function in its own thread; raises the first error, fails if one does not end."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=[work], daemon=True) for work in works]
    for thread in threads:
        thread.start()
    deadline = time.monotonic() + timeout_s
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    stuck = sum(thread.is_alive() for thread in threads)
    if stuck:
        pytest.fail(f"{stuck} of {len(threads)} threads did not end in {timeout_s} s")


def eventually(condition: Callable[[], bool], *, timeout_s: float = 10.0) -> bool:
    """Whether the condition becomes true in time."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.002)
    return True


def descriptors() -> int:
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def threads() -> int:
    """Number of threads, native ones included."""
    return sum(1 for _ in Path("/proc/self/task").iterdir())


def resident_bytes() -> int:
    """Resident memory, after the allocator returned what it can."""
    if hasattr(_LIBC, "malloc_trim"):
        _LIBC.malloc_trim(0)
    return psutil.Process().memory_info().rss


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """Slope of the least-squares line."""
    return float(np.polyfit(xs, ys, 1)[0])
