"""What the training tests share: the tiny recipe, in a directory of its own."""

from collections.abc import Callable
from pathlib import Path

import pytest
from jobs import EXACT, finish

from training.recipe.schema import TrainConfig, load_config

ROOT = Path(__file__).parents[2]
TINY = ROOT / "training" / "configs" / "pe_tiny.yaml"


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., TrainConfig]:
    """Builds the tiny recipe's configuration; arguments are `key=value` overrides."""

    def build(*overrides: str) -> TrainConfig:
        return load_config(TINY, [f"run.out_dir={tmp_path / 'run'}", *overrides])

    return build


@pytest.fixture(scope="session")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupted."""
    out_dir = tmp_path_factory.mktemp("whole") / "run"
    finish(out_dir)
    return out_dir


@pytest.fixture(scope="session")
def exact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same without stochastic depth."""
    out_dir = tmp_path_factory.mktemp("exact") / "run"
    finish(out_dir, EXACT)
    return out_dir
