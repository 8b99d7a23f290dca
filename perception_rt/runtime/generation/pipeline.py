"""The parts of a generator, wired together: preprocessing, caches, engine, scheduler, thread."""

import time
from dataclasses import dataclass

from perception_rt.package.reader import Package
from perception_rt.runtime.cache.feature_cache import FeatureCache
from perception_rt.runtime.cache.kv_pool import KvPool
from perception_rt.runtime.cache.prefix_cache import PrefixCache
from perception_rt.runtime.generation.model_runner import ModelRunner
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generation.scheduler import Scheduler
from perception_rt.runtime.generation.worker import SchedulerThread
from perception_rt.runtime.load_options import LoadOptions
from perception_rt.runtime.session import is_replaced

_KV_BYTES = 2 * 2**30


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """The parts that answer requests.

    Attributes:
        preprocessor: makes a `RequestState` of a request.
        engine: runs the graphs.
        pool: gives cache rows to requests.
        features: image features; None without a cache.
        prefixes: keys and values of prompts; None without a cache.
        scheduler: decides which request runs next.
        thread: steps the scheduler.
    """

    preprocessor: RequestPreprocessor
    engine: PlmEngine
    pool: KvPool
    features: FeatureCache | None
    prefixes: PrefixCache | None
    scheduler: Scheduler
    thread: SchedulerThread

    def close(self) -> None:
        """Fails unfinished requests, frees the engines and closes the package."""
        self.thread.close()
        self.pool.close()
        self.engine.close()
        for cache in (self.features, self.prefixes):
            if cache is not None:
                cache.close()


def open_pipeline(package: Package, options: LoadOptions) -> Pipeline:
    """Builds the parts for a package.

    Raises:
        PackageError: the package's parts do not fit together.
        InputError: the cache directory cannot be used.
    """
    limits, cache_dir = options.effective_limits, options.cache_dir
    if is_replaced(package.manifest.content, options.backend):
        cache_dir = None  # files of a test double must not reach the real engine
    feature_bytes = options.feature_cache_bytes if options.cache else 0
    prefix_bytes = options.prefix_cache_bytes if options.cache else 0
    clock = time.monotonic
    engine = PlmEngine(
        package,
        backend=options.backend,
        device=options.device,
        threads=options.threads,
        cache_dir=cache_dir,
    )
    preprocessor = RequestPreprocessor(
        package,
        engine.config,
        limits=limits,
        images=options.images,
        cached=feature_bytes + prefix_bytes > 0,
        clock=clock,
    )
    token_bytes = engine.cache_shape.bytes_per_token
    pool = KvPool(
        token_bytes,
        max_length=engine.max_length,
        max_bytes=options.kv_bytes or max(_KV_BYTES, token_bytes * engine.max_length),
        max_rows=options.max_batch,
        smallest=engine.smallest_row,
        allocate=engine.new_cache,
    )
    features = prefixes = None
    package_id = package.manifest.id
    if feature_bytes > 0:
        features = FeatureCache(feature_bytes, package_id=package_id, directory=cache_dir)
    if prefix_bytes > 0:
        prefixes = PrefixCache(prefix_bytes, package_id=package_id, directory=cache_dir)
    runner = ModelRunner(engine, features=features, prefixes=prefixes)
    scheduler = Scheduler(runner, pool, max_queued=limits.queued_requests, clock=clock)
    return Pipeline(
        preprocessor=preprocessor,
        engine=engine,
        pool=pool,
        features=features,
        prefixes=prefixes,
        scheduler=scheduler,
        thread=SchedulerThread(scheduler),
    )
