"""Requests for a scheduler over the reference backend: random prompts, small or poisoned rows."""

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from fake_plm import CONFIG, write_plm

from perception_rt.package import contract
from perception_rt.package.reader import open_package
from perception_rt.runtime.cache.feature_cache import FeatureCache, feature_key
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.kv_pool import KvPool
from perception_rt.runtime.cache.prefix_cache import PrefixCache
from perception_rt.runtime.generation.model_runner import ModelRunner
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.prompt_lookup import PromptLookup
from perception_rt.runtime.generation.request_state import RequestState
from perception_rt.runtime.generation.sampling import Sampler
from perception_rt.runtime.generation.scheduler import Scheduler

PER_TILE = 4
PLM = replace(CONFIG, pooling_ratio=1)  # four tokens per tile instead of one
ENDS = frozenset(range(12))  # one token in 27 ends an answer


class PoisonedBlock(CacheBlock):
    """A block filled with NaN wherever nothing is written, and again when a row is released."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        for row in range(self.rows):
            self.poison(row)

    def clear(self, row: int, length: int) -> None:
        self.poison(row)

    def poison(self, row: int) -> None:
        for array in self.keys + self.values:
            array[row] = np.nan


class FakeClock:
    """A clock that a test advances; each reading advances it by `look_s`."""

    def __init__(self, look_s: float = 0.0) -> None:
        self.now = 0.0
        self._look_s = look_s

    def __call__(self) -> float:
        self.now += self._look_s
        return self.now


@contextmanager
def open_engine(directory: Path) -> Iterator[PlmEngine]:
    package = open_package(write_plm(directory / "plm", config=PLM))
    engine = PlmEngine(package, backend="reference", device="cpu", threads=1)
    yield engine
    engine.close()


def make_pool(
    engine: PlmEngine, *, slots: int = 4096, rows: int = 4, block: type[CacheBlock] = CacheBlock
) -> KvPool:
    """A pool with rows of 32, 64, 128, 256 and 512 tokens, `slots` tokens in all."""
    shape = engine.cache_shape
    return KvPool(
        shape.bytes_per_token,
        max_length=engine.max_length,
        max_bytes=slots * shape.bytes_per_token,
        max_rows=rows,
        allocate=lambda rows, slots: block(shape, rows, slots),
        smallest=32,
    )


def make_scheduler(
    engine: PlmEngine,
    *,
    pool: KvPool | None = None,
    features: FeatureCache | None = None,
    prefixes: PrefixCache | None = None,
    cached: bool = False,
    max_queued: int = 1000,
    chunk_tokens: int = 16,
    clock: Callable[[], float] = time.monotonic,
    **memory: Any,
) -> Scheduler:
    """A scheduler; `memory` holds arguments of `make_pool`."""
    if cached:
        features = FeatureCache(1 << 20, package_id="sha256:0")
        prefixes = PrefixCache(1 << 20, package_id="sha256:0")
    return Scheduler(
        ModelRunner(engine, features=features, prefixes=prefixes),
        make_pool(engine, **memory) if pool is None else pool,
        max_queued=max_queued,
        chunk_tokens=chunk_tokens,
        clock=clock,
    )


def make_request(
    seed: int = 0,
    *,
    prompt: int | Sequence[int] = 10,
    tiles: int = 0,
    image: int | None = None,
    new: int = 8,
    lookup: bool = False,
    **fields: Any,
) -> RequestState:
    """A reproducible request.

    Args:
        seed: RNG seed of the prompt, the tiles and the sampler.
        prompt: number of text tokens, or their ids.
        tiles: number of tiles, at random positions.
        image: RNG seed of the tiles, if another.
        new: most new tokens.
        lookup: whether to draft tokens.
        fields: fields of `RequestState`; `temperature` and so on are the sampler's.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(20, 300, prompt) if isinstance(prompt, int) else np.array(prompt)
    for _ in range(tiles):
        place = rng.integers(0, len(ids))
        ids = np.insert(ids, place, [PLM.image_token_id] * PER_TILE)
    side = PLM.vision.image_size
    source = rng if image is None else np.random.default_rng(image)
    pixels = source.integers(0, 256, (tiles, side, side, 3), np.uint8) if tiles else None
    keys = [] if pixels is None else [feature_key("", contract.VISION, tile) for tile in pixels]
    is_image = ids == PLM.image_token_id
    allowed = np.arange(PLM.decoder.vocab_size) != PLM.image_token_id
    sampling = {k: fields.pop(k) for k in ("temperature", "top_k", "top_p") if k in fields}
    drafts = PromptLookup(np.where(is_image, -1, ids), new) if lookup else None
    return RequestState(
        **{
            "ids": ids.astype(np.int64),
            "image_positions": np.flatnonzero(is_image),
            "tiles": pixels,
            "tile_keys": keys,
            "max_new_tokens": new,
            "sampler": Sampler(seed=seed, allowed=allowed, **sampling),
            "end_ids": ENDS,
            "lookup": drafts,
            "called_at": 0.0,
            **fields,
        }
    )


def run(scheduler: Scheduler, requests: Sequence[RequestState] = (), *, most: int = 10_000) -> int:
    """Submits requests and steps until all end, checking invariants; returns the step count."""
    for request in requests:
        scheduler.submit(request)
    for step in range(most):
        scheduler.invariants()
        if not scheduler.requests:
            return step
        scheduler.step()
    raise AssertionError(f"requests are left after {most} steps")


def alone(engine: PlmEngine, *arguments: Any, **fields: Any) -> tuple[int, ...]:
    """Tokens of a request that runs by itself, without caches."""
    request = make_request(*arguments, **fields)
    run(make_scheduler(engine), [request])
    return request.result().tokens
