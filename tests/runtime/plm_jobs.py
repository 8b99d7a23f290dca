"""Jobs for a scheduler over the reference backend: made-up prompts, small rows, poisoned memory."""

from collections.abc import Iterator, Sequence
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
from perception_rt.runtime.generation.plm_engine import Decoder
from perception_rt.runtime.generation.prompt_lookup import PromptLookup
from perception_rt.runtime.generation.request_state import Job
from perception_rt.runtime.generation.sampling import Sampler
from perception_rt.runtime.generation.scheduler import Scheduler

PER_TILE = 4
PLM = replace(CONFIG, pooling_ratio=1)  # four tokens per tile instead of one
ENDS = frozenset(range(12))  # one token in 27 ends an answer


class PoisonedBlock(CacheBlock):
    """NaN where nothing was written, and again where a row was given back."""

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
    """Seconds that pass when they are told to, and a little at each look."""

    def __init__(self, look_s: float = 0.0) -> None:
        self.now = 0.0
        self._look_s = look_s

    def __call__(self) -> float:
        self.now += self._look_s
        return self.now


@contextmanager
def open_decoder(directory: Path) -> Iterator[Decoder]:
    package = open_package(write_plm(directory / "plm", config=PLM))
    decoder = Decoder(package, backend="reference", device="cpu", threads=1)
    yield decoder
    decoder.close()


def make_scheduler(
    decoder: Decoder,
    *,
    slots: int = 4096,
    rows: int = 4,
    block: type[CacheBlock] = CacheBlock,
    cached: bool = False,
    **options: Any,
) -> Scheduler:
    """A scheduler with rows of 32, 64, 128, 256 and 512 tokens, in a budget of `slots`."""
    shape = decoder.cache_shape
    pool = KvPool(
        shape.bytes_per_token,
        max_length=decoder.max_length,
        max_bytes=slots * shape.bytes_per_token,
        max_rows=rows,
        allocate=lambda rows, slots: block(shape, rows, slots),
        smallest=32,
    )
    if cached:
        options["features"] = FeatureCache(1 << 20, package_id="sha256:0")
        options["prefixes"] = PrefixCache(1 << 20, package_id="sha256:0")
    return Scheduler(decoder, pool, **{"max_queued": 1000, "chunk_tokens": 16, **options})


def make_job(
    seed: int = 0,
    *,
    prompt: int | Sequence[int] = 10,
    tiles: int = 0,
    image: int | None = None,
    new: int = 8,
    lookup: bool = False,
    **fields: Any,
) -> Job:
    """A job that is a function of its arguments.

    Args:
        seed: of the prompt, the tiles and the draws.
        prompt: how many tokens besides those of tiles, or which.
        tiles: how many, at random places.
        image: seed of the tiles, if another.
        new: the most new tokens.
        lookup: whether to guess.
        fields: of the `Job`; `temperature` and so on are the sampler's.
    """
    rng = np.random.default_rng(seed)
    ids = rng.integers(20, 300, prompt) if isinstance(prompt, int) else np.array(prompt)
    for _ in range(tiles):
        place = rng.integers(0, len(ids))
        ids = np.insert(ids, place, [PLM.image_token_id] * PER_TILE)
    side = PLM.vision.image_size
    source = rng if image is None else np.random.default_rng(image)
    pixels = source.integers(0, 256, (tiles, side, side, 3), np.uint8) if tiles else None
    keys = [] if pixels is None else [feature_key("", "", contract.VISION, tile) for tile in pixels]
    is_image = ids == PLM.image_token_id
    allowed = np.arange(PLM.decoder.vocab_size) != PLM.image_token_id
    sampling = {k: fields.pop(k) for k in ("temperature", "top_k", "top_p") if k in fields}
    guess = PromptLookup(np.where(is_image, -1, ids), new) if lookup else None
    return Job(
        **{
            "ids": ids.astype(np.int64),
            "image_positions": np.flatnonzero(is_image),
            "tiles": pixels,
            "tile_keys": keys,
            "max_new_tokens": new,
            "sampler": Sampler(seed=seed, allowed=allowed, **sampling),
            "end_ids": ENDS,
            "lookup": guess,
            "called_at": 0.0,
            **fields,
        }
    )


def run(scheduler: Scheduler, jobs: Sequence[Job] = (), *, most: int = 10_000) -> int:
    """Submits jobs and steps until all have ended, checking all there is to check; the steps."""
    for job in jobs:
        scheduler.submit(job)
    for step in range(most):
        scheduler.invariants()
        if not scheduler.jobs:
            return step
        scheduler.step()
    raise AssertionError(f"jobs are left after {most} steps")


def alone(decoder: Decoder, *arguments: Any, **fields: Any) -> tuple[int, ...]:
    """The tokens of a job that has a scheduler for itself and nothing cached."""
    job = make_job(*arguments, **fields)
    run(make_scheduler(decoder), [job])
    return job.result().tokens
