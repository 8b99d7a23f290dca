"""Fixtures for tests of the runtime: packages with engines, a fake GPU, a language model."""

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_plm import LONG_PLM, write_plm
from gpu_bench import Bench, make_bench, use_bench

from perception_rt.config import PeConfig
from perception_rt.limits import Limits
from perception_rt.package.reader import open_package
from perception_rt.runtime.generation.preprocess import RequestPreprocessor
from perception_rt.runtime.generator import Generator


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


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A language model on the reference backend."""
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=LONG_PLM)


@pytest.fixture(scope="module")
def plm(package: Path) -> Iterator[Generator]:
    with Generator.load(package) as plm:
        yield plm


@pytest.fixture(scope="module")
def preprocessor(package: Path) -> RequestPreprocessor:
    """A preprocessor without a generator."""
    with open_package(package) as opened:
        return RequestPreprocessor(
            opened, LONG_PLM, limits=Limits(), cached=True, clock=time.monotonic
        )
