"""Packages exported at 41f3a48 load, verify and return the numbers that they returned then."""

import json
from pathlib import Path

import numpy as np
import package_results
import pytest

import perception_rt as prt
from perception_rt.package.reader import read_manifest, verify_package

PACKAGES = Path(__file__).parent / "packages"
TOLERANCE = 1e-5  # sums of float32 in another order, as another processor takes them

EXPECTED = json.loads((PACKAGES / "expected.json").read_text("utf-8"))


@pytest.mark.parametrize("name", ["pe", "plm"])
def test_old_packages_are_intact_under_their_ids(name: str) -> None:
    verify_package(PACKAGES / name)
    assert read_manifest(PACKAGES / name).id == EXPECTED[f"{name}_id"]
    prt.load(PACKAGES / name, expect=EXPECTED[f"{name}_id"]).close()


def test_old_packages_return_the_same_numbers() -> None:
    found = package_results.results(PACKAGES)
    assert found.keys() == EXPECTED.keys()
    for name, expected in EXPECTED.items():
        if name in ("embedding", "features", "logits"):
            np.testing.assert_allclose(
                found[name], expected, rtol=TOLERANCE, atol=TOLERANCE, err_msg=name
            )
        else:
            assert found[name] == expected, name


def test_the_fixtures_are_small() -> None:
    files = [path for path in PACKAGES.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 300_000
