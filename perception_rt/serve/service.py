"""State shared by the routes of one process: models, threads, metrics and bounds."""

import asyncio
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from perception_rt.cores import available_cores
from perception_rt.limits import Limits
from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generation.messages import MediaReader
from perception_rt.runtime.request import Result
from perception_rt.serve.body import BodyBudget
from perception_rt.serve.fetch import MediaFetcher
from perception_rt.serve.health import Health
from perception_rt.serve.metrics import Metrics
from perception_rt.serve.models import Models
from perception_rt.serve.options import MIB, ServeOptions, read_key_digests

_BODIES = 8  # bodies of the largest size that fit into memory together
_T = TypeVar("_T")


class Service:
    """The state of a server process.

    Attributes:
        options: the options it was started with.
        models: the open packages.
        metrics: its metrics.
        health: notices engines that fail.
        keys: SHA-256 digests of API keys; empty if none is needed.
        media: reads images and videos of requests.
        budget: counts the bytes of bodies.
        max_body_bytes: bound on one body.
    """

    def __init__(self, options: ServeOptions) -> None:
        """Loads every package.

        Raises:
            PerceptionError: a package cannot be loaded, or an option is unusable.
        """
        self.options = options
        self.keys = read_key_digests(options.api_key_file)
        self.metrics = Metrics()
        self.health = Health()
        self.max_body_bytes = options.max_body_mb * MIB
        self.media = MediaReader(
            fetch=MediaFetcher(options.media_hosts).fetch,
            limits=Limits(video_bytes=max(self.max_body_bytes, Limits().image_bytes)),
        )
        self.budget = BodyBudget(_BODIES * self.max_body_bytes)
        self.models = Models(options, self.metrics)
        self._preparing = ThreadPoolExecutor(max(2, available_cores()), "prepare")
        self._waiting = ThreadPoolExecutor(options.max_requests + 1, "wait")

    async def in_thread(self, function: Callable[..., _T], *arguments: Any, **more: Any) -> _T:
        """Runs a function that decodes or encodes data in a thread."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._preparing, partial(function, *arguments, **more))

    async def pieces(self, handle: Handle) -> AsyncGenerator[str | Result]:
        """Yields the text of an answer as it grows, then its result.

        Closing the iterator early cancels the request.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[str | Result | Exception] = asyncio.Queue()

        def put(item: str | Result | Exception) -> None:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(queue.put_nowait, item)

        def follow() -> None:
            try:
                for piece in handle:
                    put(piece)
                put(handle.result())
            except Exception as error:
                put(error)

        try:
            self._waiting.submit(follow)
            while True:
                item = await queue.get()
                if isinstance(item, Exception):
                    raise item
                yield item
                if isinstance(item, Result):
                    return
        finally:
            handle.cancel()

    def close(self) -> None:
        """Ends unfinished requests and frees the engines."""
        self.models.close()
        self._preparing.shutdown()
        self._waiting.shutdown()
