"""Questions about images and videos to answers, with an engine package.

Puts the parts together: `intake.py` makes jobs of requests, `scheduler.py` runs them, `handle.py`
steps it in a thread of its own, for all requests at once, and waits for them.

Legend: T tokens, n tiles, S tile side in pixels, V vocabulary.
"""

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np

from perception_rt.errors import InputError
from perception_rt.families import PLM
from perception_rt.limits import DEFAULT_LIMITS, Limits
from perception_rt.package.reader import Package
from perception_rt.processing.image import ImageSource
from perception_rt.processing.tiles import TileSpec
from perception_rt.processing.video import VideoSource
from perception_rt.runtime.cache.feature_cache import FeatureCache
from perception_rt.runtime.cache.kv_pool import KvPool
from perception_rt.runtime.cache.prefix_cache import PrefixCache
from perception_rt.runtime.generation.plm_engine import Decoder
from perception_rt.runtime.generation.preprocess import Intake
from perception_rt.runtime.generation.request_state import Job
from perception_rt.runtime.generation.scheduler import Scheduler
from perception_rt.runtime.generation.worker import Handle, Turns
from perception_rt.runtime.load_options import (
    FEATURE_CACHE_BYTES,
    PREFIX_CACHE_BYTES,
    LoadOptions,
    open_model,
)
from perception_rt.runtime.request import (
    Exchange,
    OnProgress,
    Request,
    Result,
    check_integer,
    check_list,
)
from perception_rt.runtime.session import AUTO, LoadedModel, is_replaced

Array = np.ndarray[Any, Any]

_KV_BYTES = 2 * 2**30


class Generator(LoadedModel):
    """A loaded Perception Language Model package; `perception_rt.load` makes it.

    All methods may be called from several threads, and requests of several threads are decoded
    together. A child process cannot use the generator of its parent: it gets a BackendError.

    Attributes:
        manifest: what the package says of itself.
        tile_spec: how images and videos are prepared.
        max_length: tokens of the longest prompt and answer together.
    """

    def __init__(
        self,
        package: Package,
        *,
        backend: str,
        device: str,
        threads: int | None,
        kv_bytes: int | None,
        max_batch: int,
        feature_cache_bytes: int,
        prefix_cache_bytes: int,
        cache_dir: str | os.PathLike[str] | None,
        limits: Limits = DEFAULT_LIMITS,
    ) -> None:
        clock = time.monotonic
        super().__init__(package.manifest, backend=backend, device=device)
        if is_replaced(package.manifest.content, backend):
            cache_dir = None  # a test double's numbers must not reach the engine that is meant
        self._decoder = Decoder(
            package, backend=backend, device=device, threads=threads, cache_dir=cache_dir
        )
        self.max_length = self._decoder.max_length
        self._intake = Intake(
            package,
            self._decoder.config,
            limits=limits,
            cached=feature_cache_bytes + prefix_cache_bytes > 0,
            clock=clock,
        )
        self.tile_spec: TileSpec = self._intake.tiles
        shape, package_id = self._decoder.cache_shape, package.manifest.id
        self._pool = KvPool(
            shape.bytes_per_token,
            max_length=self.max_length,
            max_bytes=kv_bytes or max(_KV_BYTES, shape.bytes_per_token * self.max_length),
            max_rows=max_batch,
            smallest=self._decoder.smallest_row,
            allocate=self._decoder.new_cache,
        )
        features = prefixes = None
        if feature_cache_bytes > 0:
            features = FeatureCache(feature_cache_bytes, package_id=package_id, directory=cache_dir)
        if prefix_cache_bytes > 0:
            prefixes = PrefixCache(prefix_cache_bytes, package_id=package_id, directory=cache_dir)
        self._scheduler = Scheduler(
            self._decoder,
            self._pool,
            max_queued=limits.queued_requests,
            features=features,
            prefixes=prefixes,
            clock=clock,
        )
        self._turns = Turns(self._scheduler)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike[str],
        *,
        backend: str = AUTO,
        device: str = "cpu",
        threads: int | None = None,
        expect: str | None = None,
        limits: Limits = DEFAULT_LIMITS,
        kv_bytes: int | None = None,
        max_batch: int = 8,
        cache: bool = True,
        feature_cache_bytes: int = FEATURE_CACHE_BYTES,
        prefix_cache_bytes: int = PREFIX_CACHE_BYTES,
        cache_dir: str | os.PathLike[str] | None = None,
    ) -> Self:
        """Loads a language model package; arguments and errors as `perception_rt.load`.

        Raises:
            InputError: also if the package holds a model of another family.
        """
        options = LoadOptions(
            backend=backend,
            device=device,
            threads=threads,
            expect=expect,
            limits=limits,
            kv_bytes=kv_bytes,
            max_batch=max_batch,
            cache=cache,
            feature_cache_bytes=feature_cache_bytes,
            prefix_cache_bytes=prefix_cache_bytes,
            cache_dir=cache_dir,
        )
        with open_model(path, options, PLM) as package:
            return cls.from_package(package, options)

    @classmethod
    def from_package(cls, package: Package, options: LoadOptions) -> Self:
        """Takes over an open, verified package; closes it with itself."""
        return cls(
            package,
            backend=options.backend,
            device=options.device,
            threads=options.threads,
            kv_bytes=options.kv_bytes,
            max_batch=options.max_batch,
            feature_cache_bytes=options.feature_cache_bytes if options.cache else 0,
            prefix_cache_bytes=options.prefix_cache_bytes if options.cache else 0,
            cache_dir=options.cache_dir,
            limits=options.limits,
        )

    def generate(
        self,
        prompt: str,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        history: Sequence[Exchange] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        max_tiles: int | None = None,
        num_frames: int | None = None,
        deadline_s: float | None = None,
        lookup: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Result:
        """Answers one question. Arguments are the fields of `Request`.

        Raises:
            InputError: an argument, an image, a video or a text is unusable, or it is too long.
            CapacityError: too many requests wait, or this one does not fit `kv_bytes`.
            BackendError: the engine failed, or the generator was closed.
        """
        request = Request(
            prompt,
            images=images,
            videos=videos,
            history=history,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            max_tiles=max_tiles,
            num_frames=num_frames,
            deadline_s=deadline_s,
            lookup=lookup,
            on_progress=on_progress,
        )
        handle = self.submit(request)
        try:
            return handle.result()
        finally:
            handle.cancel()  # of an interrupt's; one that has ended is not changed

    def stream(
        self,
        prompt: str,
        *,
        images: Sequence[ImageSource] = (),
        videos: Sequence[VideoSource] = (),
        history: Sequence[Exchange] = (),
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float | None = None,
        top_k: int | None = None,
        seed: int | None = None,
        stop: Sequence[str] = (),
        max_tiles: int | None = None,
        num_frames: int | None = None,
        deadline_s: float | None = None,
        lookup: bool = False,
        on_progress: OnProgress | None = None,
    ) -> Iterator[str]:
        """The answer of `generate` as it grows, in whole characters; errors as there.

        Closing or dropping the iterator ends the request. For its `Result` use `submit`.
        """
        request = Request(
            prompt,
            images=images,
            videos=videos,
            history=history,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            seed=seed,
            stop=stop,
            max_tiles=max_tiles,
            num_frames=num_frames,
            deadline_s=deadline_s,
            lookup=lookup,
            on_progress=on_progress,
        )
        return _pieces(self.submit(request))

    def submit(self, request: Request) -> Handle:
        """Takes a request, whose images and videos are opened at once; errors as `generate`."""
        self._turns.check_place()
        return self._handle(self._intake.job(request))

    def generate_batch(self, requests: Sequence[Request]) -> list[Result]:
        """Answers questions together, as many at a time as fit; results in their order.

        Raises:
            InputError: a request is unusable; it is named by its index, and none is answered.
            CapacityError: one does not fit `kv_bytes`.
            BackendError: as `generate`, for the first that failed.
        """
        for index, request in enumerate(check_list("requests", requests)):
            try:
                self._intake.check(request)
            except InputError as error:
                raise InputError(f"request {index}: {error}") from None
        self._turns.check_open()
        handles: list[Handle] = []
        try:
            for index, request in enumerate(requests):
                try:
                    job = self._intake.job(request)
                except InputError as error:
                    raise InputError(f"request {index}: {error}") from None
                handles.append(self._handle(job, wait=True))
            return [handle.result() for handle in handles]
        finally:
            for handle in handles:
                handle.cancel()

    def generate_tokens(
        self, ids: Sequence[int] | Array, pixels: Array | None = None, *, max_new_tokens: int
    ) -> list[int]:
        """Greedy continuation of a prompt in ids, which need no tokenizer.

        Args:
            ids: (T,), with the image token's id where tiles go, in their order.
            pixels: float32 (n, 3, S, S), normalised, or None.
            max_new_tokens: how many to generate. It ends before that at an end token, if the
                package has a tokenizer that says which those are; that one is not returned.

        Returns:
            Ids of the new tokens; the image token is not among them.

        Raises:
            InputError: an argument is unusable, or tiles and image tokens differ in number.
            CapacityError: as `generate`.
            BackendError: as `generate`.
        """
        check_integer("max_new_tokens", max_new_tokens, 1)
        return list(self._run(self._intake.token_job(ids, pixels, max_new_tokens)).tokens)

    def prefill_logits(self, ids: Sequence[int] | Array, pixels: Array | None = None) -> Array:
        """Logits of what comes after a prompt, float32 (V,); arguments as `generate_tokens`."""
        job = self._intake.token_job(ids, pixels, 0)
        self._run(job)
        assert job.logits is not None
        return job.logits

    def close(self) -> None:
        """Fails what has not ended, frees every engine, closes the package; once is enough."""
        self._turns.close()
        self._pool.close()
        self._decoder.close()

    def _run(self, job: Job) -> Result:
        handle = self._handle(job)
        try:
            return handle.result()
        finally:
            handle.cancel()

    def _handle(self, job: Job, *, wait: bool = False) -> Handle:
        handle = Handle(self._turns, job)  # before: an interrupt in between drops it
        self._turns.submit(job, wait=wait)
        return handle


def _pieces(handle: Handle) -> Iterator[str]:
    try:
        yield from handle
    finally:
        handle.cancel()
