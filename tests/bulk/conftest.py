"""Fixtures: the shipped encoder, and a folder of images."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from bulk_files import write_photos

import perception_rt as prt
from perception_rt.demo import package_paths

BROKEN = frozenset({3, 17})


@pytest.fixture(scope="session")
def engine() -> Iterator[prt.Embedder]:
    with prt.Embedder.load(package_paths()["demo:pe"], threads=1) as engine:
        yield engine


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of 20 images; numbers 3 and 17 are broken."""
    write_photos(tmp_path / "photos", 20, BROKEN)
    return tmp_path / "photos"
