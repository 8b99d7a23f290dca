"""Notices engines that fail again and again."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from perception_rt.errors import BackendError

FAILURES = 3  # in a row; a single one may be a lack of memory that passes
REST_S = 60.0  # then the next request may try again


class Health:
    """Counts engine calls of each model that failed in a row. For one event loop."""

    def __init__(self) -> None:
        self._failures: dict[str, tuple[int, float]] = {}  # number, time of the last

    @contextmanager
    def watch(self, model: str) -> Iterator[None]:
        """Notes whether the engine call in this block fails; one that succeeds clears the model."""
        try:
            yield
        except BackendError:
            before, _ = self._failures.get(model, (0, 0.0))
            self._failures[model] = (before + 1, time.monotonic())
            raise
        self._failures.pop(model, None)

    @property
    def failed(self) -> list[str]:
        """Models whose last calls all failed, the latest within `REST_S`."""
        now = time.monotonic()
        return [
            model
            for model, (count, last) in self._failures.items()
            if count >= FAILURES and now - last < REST_S
        ]
