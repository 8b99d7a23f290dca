"""Metrics in the format of Prometheus.

With several workers, the environment variable PROMETHEUS_MULTIPROC_DIR names a directory that all
of them write to, and each of them reports the sum.
"""

import os

from prometheus_client import (
    CONTENT_TYPE_LATEST,
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    generate_latest,
)
from prometheus_client.multiprocess import MultiProcessCollector

from perception_rt.runtime.request import GeneratorStats, Result

DIRECTORY_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"
CONTENT_TYPE = CONTENT_TYPE_LATEST
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)
_ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Metrics:
    """The metrics of one server; thread-safe."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        name = "perception_rt_"

        def gauge(title: str, text: str, *labels: str) -> Gauge:
            return Gauge(name + title, text, labels, registry=registry, multiprocess_mode="livesum")

        def counter(title: str, text: str, *labels: str) -> Counter:
            return Counter(name + title, text, labels, registry=registry)

        def histogram(title: str, text: str, buckets: tuple[float, ...], *labels: str) -> Histogram:
            return Histogram(name + title, text, labels, registry=registry, buckets=buckets)

        self._requests = counter("requests", "Requests by route and status.", "route", "status")
        self._seconds = histogram("request_seconds", "Time of requests.", _SECONDS, "route")
        self._errors = counter("errors", "Refused and failed requests by reason.", "code")
        self._active = gauge("requests_in_progress", "Requests in progress.")
        self._queued = gauge("queued_requests", "Questions that wait for memory.", "model")
        self._running = gauge("running_requests", "Questions that are being answered.", "model")
        self._tokens = counter("tokens", "Tokens of prompts and answers.", "model", "kind")
        self._cached = counter("cached_prompt_tokens", "Prompt tokens from the cache.", "model")
        self._ttft = histogram("ttft_seconds", "Time to first token.", _SECONDS, "model")
        self._per_token = histogram(
            "token_seconds", "Median time between tokens of an answer.", _TOKEN_SECONDS, "model"
        )
        self._items = counter("embedded_items", "Embedded items.", "model", "kind")
        self._batch = histogram("batch_items", "Items per batch.", _ITEMS, "model", "kind")

    def began(self) -> None:
        """Counts a request that began."""
        self._active.inc()

    def ended(self, route: str, status: int, seconds: float) -> None:
        """Counts a request that ended."""
        self._active.dec()
        self._requests.labels(route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)

    def failed(self, code: str) -> None:
        """Counts an error by its short name."""
        self._errors.labels(code).inc()

    def load(self, model: str, stats: GeneratorStats) -> None:
        """Notes the load of a language model."""
        self._queued.labels(model).set(stats.queued)
        self._running.labels(model).set(stats.running)

    def answered(self, model: str, result: Result) -> None:
        """Counts the tokens and times of an answer."""
        timings = result.timings
        self._tokens.labels(model, "prompt").inc(timings.prompt_tokens)
        self._tokens.labels(model, "answer").inc(timings.new_tokens)
        self._cached.labels(model).inc(timings.cached_tokens)
        if timings.ttft_s is not None:
            self._ttft.labels(model).observe(timings.ttft_s)
        if timings.per_token_s is not None:
            self._per_token.labels(model).observe(timings.per_token_s)

    def embedded(self, model: str, kind: str, items: int) -> None:
        """Counts a batch of embeddings."""
        self._items.labels(model, kind).inc(items)
        self._batch.labels(model, kind).observe(items)

    def text(self) -> bytes:
        """All metrics; with several workers, of all of them."""
        if DIRECTORY_VARIABLE not in os.environ:
            return generate_latest(self._registry)
        registry = CollectorRegistry()
        MultiProcessCollector(registry)  # type: ignore[no-untyped-call]
        return generate_latest(registry)
