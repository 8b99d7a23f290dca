"""The directory of the caches: whose it may be, and that it cannot be exchanged."""

import os
from pathlib import Path

import numpy as np
import pytest

from perception_rt.errors import InputError
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.runtime.cache.feature_cache import FeatureCache, feature_key
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.prefix_cache import PrefixCache, sequence_keys

SHAPE = CacheShape(layers=1, kv_heads=1, head_dim=4, dtype="float32")
FOLDER = "a" * 64
PACKAGE = f"sha256:{FOLDER}"


def filled(seed: int = 0) -> CacheBlock:
    block = CacheBlock(SHAPE, 1, 8)
    for array in block.keys + block.values:
        array[...] = np.random.default_rng(seed).standard_normal(array.shape)
    return block


def features(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((2, 4, 8)).astype(np.float32)


def name(seed: int) -> str:
    return feature_key(PACKAGE, "vision", np.array([seed]))


def text(*ids: int) -> np.ndarray:
    return sequence_keys(np.array(ids, np.int64), [], [])


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


@pytest.mark.parametrize("place", ["", FOLDER])
@pytest.mark.parametrize("mode", [0o777, 0o770, 0o702, 0o1777])
def test_a_directory_that_others_can_write_to_is_refused(
    tmp_path: Path, mode: int, place: str
) -> None:
    root = tmp_path / "cache"
    FeatureCache(2**20, package_id=PACKAGE, directory=root).put(name(0), features(0))
    (root / place).chmod(mode)
    for cache in (FeatureCache, PrefixCache):
        with pytest.raises(InputError, match=r"can be written to by others.*go-w") as caught:
            cache(2**20, package_id=PACKAGE, directory=root)
        assert str(root) in str(caught.value)
    (root / place).chmod(0o755)
    again = FeatureCache(2**20, package_id=PACKAGE, directory=root)
    assert np.array_equal(again.get(name(0)), features(0))


def test_a_directory_of_another_user_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also its entries, which a stranger may have left while the directory was open to all."""
    FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path).put(name(0), features(0))
    user = os.geteuid()
    opened = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
    monkeypatch.setattr(os, "geteuid", lambda: user + 1)
    with pytest.raises(InputError, match="belongs to another user") as caught:
        FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert opened.get(name(0)) is None and entries(tmp_path) == []


def test_an_entry_that_others_can_write_to_is_not_read(tmp_path: Path) -> None:
    FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path).put(name(0), features(0))
    entries(tmp_path)[0].chmod(0o666)
    cache = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
    assert cache.get(name(0)) is None and entries(tmp_path) == []


def test_the_directory_cannot_be_exchanged_while_it_is_open(tmp_path: Path) -> None:
    """Neither for one with forged entries, nor by a link."""
    block, question = filled(), text(1, 2, 3)
    root, forged = tmp_path / "cache", tmp_path / "forged"
    PrefixCache(2**20, package_id=PACKAGE, directory=forged).put(question, filled(seed=1), 0, 3)
    (entry,) = entries(forged)
    cache = PrefixCache(2**20, package_id=PACKAGE, directory=root)
    features_of = FeatureCache(2**20, package_id=PACKAGE, directory=root)
    root.rename(tmp_path / "moved")
    root.symlink_to(forged)
    cache.put(question, block, 0, 3)
    features_of.put(name(0), features(0))
    assert entries(forged) == [entry]
    assert len(entries(tmp_path / "moved")) == 2
    (tmp_path / "moved" / FOLDER).rename(tmp_path / "moved" / "old")
    (tmp_path / "moved" / FOLDER).symlink_to(forged / FOLDER)
    with pytest.raises(InputError, match="a folder of the cache directory cannot be made"):
        PrefixCache(2**20, package_id=PACKAGE, directory=tmp_path / "moved")


def test_directories_are_made_for_this_user_alone(tmp_path: Path) -> None:
    before = os.umask(0o002)
    try:
        root = tmp_path / "a" / "b"
        FeatureCache(2**20, package_id=PACKAGE, directory=root)
        FeatureCache(2**20, package_id=PACKAGE, directory=root)
    finally:
        os.umask(before)
    assert [p.stat().st_mode & 0o777 for p in (root, root / FOLDER)] == [0o700, 0o700]


def test_a_closed_cache_finds_nothing_and_holds_no_descriptor(tmp_path: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    before = descriptors()
    cache = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
    cache.put(name(0), features(0))
    cache.close()
    cache.close()
    assert descriptors() == before
    assert cache.get(name(1)) is None
    cache.put(name(1), features(1))
    assert len(entries(tmp_path)) == 1
    FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)  # dropped instead of closed
    assert descriptors() == before
    with pytest.raises(InputError, match=r"cannot be made: .*not a path"):
        FeatureCache(2**20, package_id=PACKAGE, directory="a\0b")
