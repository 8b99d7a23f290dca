"""Shared by the training tests: the tiny recipe, and uninterrupted runs of it."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import EXACT, TINY, finish

from training.recipe.schema import TrainConfig, load_config


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the tiny recipe's configuration; arguments are `key=value` overrides."""

    def build(*overrides: str) -> TrainConfig:
        return load_config(TINY, [f"run.out_dir={tmp_path / 'run'}", *overrides])

    return build


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(out_dir)
    return out_dir


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted run without stochastic depth."""
    out_dir = tmp_path_factory.mktemp("exact") / "run"
    finish(out_dir, *EXACT)
    return out_dir
