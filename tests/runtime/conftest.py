"""Fixtures for tests of the runtime: packages with engines, and a fake GPU that runs them."""

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
from gpu_bench import Bench, make_bench, use_bench

from perception_rt.config import PeConfig


@pytest.fixture(scope="session")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_config: PeConfig) -> tuple[Bench, Path]:
    """The packages, and the state directory that notes their exports."""
    state = tmp_path_factory.mktemp("state")
    return make_bench(tmp_path_factory.mktemp("tensorrt"), state, tiny_config), state


@pytest.fixture
def bench(made: tuple[Bench, Path], monkeypatch: pytest.MonkeyPatch) -> Bench:
    """The packages, on a machine with the fake GPU."""
    use_bench(*made, monkeypatch)
    return made[0]


@pytest.fixture
def frozen_heap() -> Iterator[None]:
    """Keeps `gc.collect` to objects made by the test; those of the whole suite take it seconds."""
    gc.freeze()
    yield
    gc.unfreeze()
