"""Key-value blocks, and the caches of image features and prompts: bounds, damage, threads."""

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest

from perception_rt.errors import CapacityError, InputError
from perception_rt.package.plm_graphs import CacheShape
from perception_rt.runtime.cache.feature_cache import FeatureCache, feature_key
from perception_rt.runtime.cache.kv_block import CacheBlock
from perception_rt.runtime.cache.prefix_cache import PrefixCache, sequence_keys

SHAPE = CacheShape(layers=3, kv_heads=2, head_dim=4, dtype="float32")
FOLDER, OTHER_FOLDER = "a" * 64, "b" * 64
PACKAGE, OTHER = f"sha256:{FOLDER}", f"sha256:{OTHER_FOLDER}"


def filled(
    rows: int = 4, slots: int = 64, *, seed: int = 0, shape: CacheShape = SHAPE
) -> CacheBlock:
    block = CacheBlock(shape, rows, slots)
    rng = np.random.default_rng(seed)
    for array in block.keys + block.values:
        array[...] = rng.standard_normal(array.shape)
    return block


def row_of(block: CacheBlock, row: int, length: int) -> np.ndarray:
    return np.stack([array[row, :, :length] for array in block.keys + block.values])


def features(seed: int, tiles: int = 2) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((tiles, 4, 8)).astype(np.float32)


def name(seed: int) -> str:
    return feature_key(PACKAGE, "vision", np.array([seed]))


def text(*ids: int) -> np.ndarray:
    return sequence_keys(np.array(ids, np.int64), [], [])


def entries(directory: Path) -> list[Path]:
    return sorted(path for path in directory.rglob("*") if path.is_file())


# Blocks.


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_rows_are_copied_and_cleared(dtype: str) -> None:
    shape = CacheShape(layers=3, kv_heads=2, head_dim=4, dtype=dtype)
    assert shape.bytes_per_token == 3 * 2 * 2 * 4 * np.dtype(dtype).itemsize
    block = filled(shape=shape)
    assert [a.shape for a in block.keys + block.values] == [(4, 2, 64, 4)] * 6
    assert all(a[1:3].flags.c_contiguous and a[1:3].flags.writeable for a in block.keys)
    assert block.nbytes == sum(array.nbytes for array in block.keys + block.values)
    before = row_of(block, 1, 64)
    larger = CacheBlock(shape, 2, 100)
    block.copy_row(1, larger, 0, 40)
    assert np.array_equal(row_of(larger, 0, 40), before[:, :, :40])
    assert not row_of(larger, 0, 100)[:, :, 40:].any() and not row_of(larger, 1, 100).any()
    block.clear(1, 30)
    assert not row_of(block, 1, 30).any()
    assert np.array_equal(row_of(block, 1, 64)[:, :, 30:], before[:, :, 30:])
    others = [row_of(block, row, 64) for row in (0, 2, 3)]
    block.clear(1, 64)
    assert not row_of(block, 1, 64).any()
    assert all(
        np.array_equal(row_of(block, r, 64), o) for r, o in zip((0, 2, 3), others, strict=True)
    )


def test_snapshots_are_copies_and_may_be_written_in_part() -> None:
    block = filled()
    before = row_of(block, 0, 64)
    snapshot = block.read(0, 20)
    assert snapshot.nbytes == 20 * SHAPE.bytes_per_token and snapshot.flags.c_contiguous
    block.clear(0, 64)
    block.write(2, snapshot, 20)
    block.write(3, snapshot, 7)
    assert np.array_equal(row_of(block, 2, 20), before[:, :, :20])
    assert np.array_equal(row_of(block, 3, 7), before[:, :, :7])
    for wrong in (
        lambda: block.read(4, 1),
        lambda: block.read(-1, 1),
        lambda: block.read(0, 65),
        lambda: block.write(0, snapshot, 21),
        lambda: block.write(0, snapshot.astype(np.float16), 20),
    ):
        with pytest.raises(AssertionError):
            wrong()


def test_memory_is_spent_as_tokens_are_written() -> None:
    """One token per row of a 256 MiB block; huge pages would spend a quarter of it."""
    shape = CacheShape(layers=8, kv_heads=8, head_dim=64, dtype="float32")
    before = psutil.Process().memory_info().rss
    block = CacheBlock(shape, 1, 8192)
    assert block.nbytes == 2**28
    assert psutil.Process().memory_info().rss - before < 2**20
    for array in block.keys + block.values:
        array[:, :, 0] = 1
    assert psutil.Process().memory_info().rss - before < 2**23
    del array, block
    assert psutil.Process().memory_info().rss - before < 2**20


def test_more_memory_than_there_is_has_its_own_error() -> None:
    with pytest.raises(CapacityError, match="a cache of 60397977600000000 bytes"):
        CacheBlock(CacheShape(layers=32, kv_heads=8, head_dim=128, dtype="float32"), 2**15, 7031250)


# Image features.


def test_feature_keys_tell_everything_apart() -> None:
    tiles = np.arange(24, dtype=np.uint8).reshape(2, 2, 2, 3)
    keys = [
        feature_key(PACKAGE, "vision", tiles),
        feature_key(OTHER, "vision", tiles),
        feature_key(PACKAGE[:-1], PACKAGE[-1] + "vision", tiles),
        feature_key(PACKAGE, "pixels", tiles),
        feature_key(PACKAGE, "vision", tiles.reshape(1, 4, 2, 3)),
        feature_key(PACKAGE, "vision", tiles.view(np.int8)),
        feature_key(PACKAGE, "vision", tiles[::-1]),
        feature_key(PACKAGE, "vision", tiles[:1]),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 and set(key) <= set("0123456789abcdef") for key in keys)
    assert keys[0] == feature_key(PACKAGE, "vision", tiles.copy())
    assert keys[6] == feature_key(PACKAGE, "vision", tiles[::-1].copy())


def test_the_least_recently_used_features_go_first() -> None:
    size = features(0).nbytes
    cache = FeatureCache(3 * size, package_id=PACKAGE)
    for seed in range(3):
        cache.put(name(seed), features(seed))
    assert cache.get(name(0)) is not None
    cache.put(name(3), features(3))
    assert cache.get(name(1)) is None
    for seed in (0, 2, 3):
        assert np.array_equal(cache.get(name(seed)), features(seed))
    assert cache.nbytes == 3 * size
    cache.put(name(4), features(4, tiles=4))  # replaces two entries
    assert cache.nbytes == 3 * size and cache.get(name(4)) is not None
    cache.put(name(5), features(5, tiles=7))
    assert cache.get(name(5)) is None and cache.nbytes == 3 * size
    cache.put(name(4), features(4, tiles=1))
    assert len(cache.get(name(4))) == 1 and cache.nbytes < 3 * size


def test_features_are_copied_and_cannot_be_written() -> None:
    cache = FeatureCache(2**20, package_id=PACKAGE)
    original = features(0)
    cache.put(name(0), original)
    original[...] = 0
    found = cache.get(name(0))
    assert np.array_equal(found, features(0))
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 1


def test_nothing_is_kept_where_caches_are_off(tmp_path: Path) -> None:
    cache = FeatureCache(0, package_id=PACKAGE, directory=tmp_path / "cache")
    cache.put(name(0), features(0))
    assert cache.get(name(0)) is None and cache.nbytes == 0
    prefixes = PrefixCache(0, package_id=PACKAGE, directory=tmp_path / "cache")
    prefixes.put(text(1, 2, 3), filled(), 0, 3)
    assert prefixes.longest(text(1, 2, 3)) == (0, None) and prefixes.nbytes == 0
    assert not (tmp_path / "cache").exists()


def test_features_outlive_the_process(tmp_path: Path) -> None:
    FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path).put(name(0), features(0))
    (path,) = entries(tmp_path)
    assert path.parent.name == FOLDER and path.stat().st_mode & 0o777 == 0o600
    again = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
    for _ in range(2):  # from the file, then from memory
        assert np.array_equal(again.get(name(0)), features(0))
        path.unlink(missing_ok=True)
    assert again.nbytes == features(0).nbytes
    assert FeatureCache(2**20, package_id=OTHER, directory=tmp_path).get(name(0)) is None


def damages(data: bytes) -> list[bytes]:
    """Truncated files, single flipped bits, and extra bytes at the end."""
    places = [*range(0, len(data), len(data) // 40), len(data) - 1]
    flipped = [data[:i] + bytes([data[i] ^ 1 << i % 8]) + data[i + 1 :] for i in places]
    lengths = (0, 1, 60, len(data) // 2, len(data) - 32, len(data) - 1)
    more = [b"{}\n", b'{"arrays": []}\n', b"[" * 4000, data + b"x", b"\n" + data]
    more.append(b'{"arrays": [["float32", [0, 1e400]]]}\n' + bytes(32))
    more.append(b'{"arrays": [["object", [1]]]}\n' + bytes(40))
    return flipped + [data[:length] for length in lengths] + more


def test_damaged_features_are_removed(tmp_path: Path) -> None:
    FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path).put(name(0), features(0))
    (path,) = entries(tmp_path)
    good = path.read_bytes()
    for data in damages(good):
        path.write_bytes(data)
        cache = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
        assert cache.get(name(0)) is None and not path.exists()
        cache.put(name(0), features(0))
        assert path.read_bytes() == good


def test_files_of_others_are_not_read(tmp_path: Path) -> None:
    for package in (PACKAGE, OTHER):
        cache = FeatureCache(2**20, package_id=package, directory=tmp_path)
        cache.put(name(0), features(1))
        cache.put(name(1), features(2))
    own, foreign = (tmp_path / folder / f"{name(0)}.features" for folder in (FOLDER, OTHER_FOLDER))
    notes = own.parent / "notes.txt"
    notes.write_text("not ours")
    moved = tmp_path / "moved"
    moved.write_bytes(own.read_bytes())
    for replace in (
        lambda: own.write_bytes(foreign.read_bytes()),
        lambda: own.write_bytes(own.with_name(f"{name(1)}.features").read_bytes()),
        lambda: own.symlink_to(moved),
        lambda: own.mkdir(),
        lambda: os.mkfifo(own),
    ):
        own.unlink(missing_ok=True)
        replace()
        cache = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path)
        assert cache.get(name(0)) is None
        if own.is_dir():
            own.rmdir()
    assert foreign.exists() and notes.exists()


def test_files_are_bounded_and_the_oldest_go_first(tmp_path: Path) -> None:
    def used() -> int:
        return sum(path.stat().st_size for path in entries(tmp_path))

    size = 400 + features(0).nbytes
    cache = FeatureCache(4 * size, package_id=PACKAGE, directory=tmp_path)
    for seed in range(9):
        cache.put(name(seed), features(seed))
        for path in entries(tmp_path):  # much older than the next entry
            os.utime(path, ns=(path.stat().st_atime_ns, path.stat().st_mtime_ns - 10**9))
        assert used() <= 4 * size
    FeatureCache(4 * size, package_id=PACKAGE, directory=tmp_path).get(name(4))  # used, so recent
    other = FeatureCache(4 * size, package_id=OTHER, directory=tmp_path)
    other.put(name(0), features(0))
    (tmp_path / FOLDER / f"{name(1)}.{'0' * 32}.features.tmp").write_bytes(bytes(9))
    left = {path.stem for path in entries(tmp_path / FOLDER)}
    assert left >= {name(4), name(8)} and not left & {name(0), name(5)}
    assert used() <= 4 * size
    other.put(name(1), features(1, tiles=7))
    assert used() <= 4 * size


def test_a_disk_that_refuses_is_no_error(tmp_path: Path) -> None:
    cache = FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path / "cache")
    (tmp_path / "cache" / FOLDER).rmdir()
    cache.put(name(0), features(0))
    assert np.array_equal(cache.get(name(0)), features(0)) and entries(tmp_path) == []
    (tmp_path / "cache" / FOLDER / f"{name(1)}.features").mkdir(parents=True)
    cache.put(name(1), features(1))
    assert np.array_equal(cache.get(name(1)), features(1)) and entries(tmp_path) == []
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(InputError, match="the cache directory cannot be made"):
        FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path / "file")
    (tmp_path / "open" / FOLDER).mkdir(parents=True)
    (tmp_path / "open" / FOLDER).chmod(0o777)
    with pytest.raises(InputError, match="can be written to by others"):
        FeatureCache(2**20, package_id=PACKAGE, directory=tmp_path / "open")


# Prompts.


def test_image_tokens_are_known_by_their_tile_and_place() -> None:
    ids = np.array([7, 319, 319, 319, 8, 319], np.int64)
    keys = sequence_keys(ids, [(1, 4), (5, 6)], [name(0), name(1)])
    assert keys.shape == (6, 2) and keys.dtype == np.uint64
    assert keys[[0, 4]].tolist() == [[7, 0], [8, 0]]
    assert len({tuple(key) for key in keys.tolist()}) == 6
    assert np.array_equal(keys, sequence_keys(ids, [(1, 4), (5, 6)], [name(0), name(1)]))
    shorter = sequence_keys(ids, [(1, 3), (5, 6)], [name(0), name(2)])
    assert np.array_equal(keys[:3], shorter[:3])
    assert shorter[3].tolist() == [319, 0] and shorter[5].tolist() != keys[5].tolist()
    with pytest.raises(AssertionError):
        sequence_keys(ids, [(5, 7)], [name(0)])


def test_the_longest_common_beginning_is_restored_to_the_bit() -> None:
    cache = PrefixCache(2**20, package_id=PACKAGE)
    block = filled()
    cache.put(text(1, 2, 3, 4, 5), block, 0, 5)
    cache.put(text(1, 2, 9, 9), block, 1, 4)
    cache.put(text(6, 6, 6, 6, 6), block, 2, 3)
    for ids, length, row in (
        ((1, 2, 3, 4, 8, 8), 4, 0),
        ((1, 2, 9), 3, 1),
        ((1, 2, 9, 9, 9, 9), 4, 1),
        ((6, 6, 6, 6), 3, 2),
        ((5, 2, 3), 0, None),
    ):
        found, entry = cache.longest(text(*ids))
        assert found == length and (entry is None) == (row is None)
        if entry is not None:
            target = filled(seed=1)
            cache.restore(entry, found, target, 3)
            assert np.array_equal(row_of(target, 3, found), row_of(block, row, found))
            untouched = row_of(filled(seed=1), 3, 64)
            assert np.array_equal(row_of(target, 3, 64)[:, :, found:], untouched[:, :, found:])


def test_a_longer_prompt_replaces_its_beginnings() -> None:
    cache = PrefixCache(2**20, package_id=PACKAGE)
    block = filled()
    cost = SHAPE.bytes_per_token + 16
    cache.put(text(1, 2, 3), block, 0, 2)
    cache.put(text(1, 2, 3, 4), block, 0, 4)
    assert cache.nbytes == 4 * cost
    cache.put(text(1, 2, 3), block, 1, 3)  # already there
    assert cache.nbytes == 4 * cost
    cache.put(text(1, 2, 5), block, 1, 3)
    assert cache.nbytes == 7 * cost
    cache.put(text(), block, 1, 0)
    assert cache.nbytes == 7 * cost


def test_the_least_recently_used_prompts_go_first() -> None:
    cost = SHAPE.bytes_per_token + 16
    cache = PrefixCache(30 * cost, package_id=PACKAGE)
    block = filled()
    for start in (100, 200, 300):
        cache.put(text(*range(start, start + 10)), block, 0, 10)
        assert cache.nbytes <= 30 * cost
    assert cache.longest(text(100))[0] == 1
    cache.put(text(*range(400, 410)), block, 0, 10)
    found = {start: cache.longest(text(start))[0] for start in (100, 200, 300, 400)}
    assert found == {100: 1, 200: 0, 300: 1, 400: 1}
    cache.put(text(*range(500, 531)), block, 0, 31)
    assert cache.longest(text(500))[0] == 0 and cache.nbytes == 30 * cost


def test_prompts_outlive_the_process(tmp_path: Path) -> None:
    block = filled()
    keys = sequence_keys(np.arange(20), [(3, 9)], [name(0)])
    first = PrefixCache(2**20, package_id=PACKAGE, directory=tmp_path)
    first.put(keys[:5], block, 0, 5)
    first.put(keys, block, 0, 20)
    assert len(entries(tmp_path)) == 1  # only the longer one
    second = PrefixCache(2**20, package_id=PACKAGE, directory=tmp_path)
    assert second.nbytes == 0
    length, entry = second.longest(np.concatenate([keys[:15], text(1)]))
    assert length == 15 and entry is not None and second.nbytes == entry.nbytes
    target = CacheBlock(SHAPE, 1, 64)
    second.restore(entry, 15, target, 0)
    assert np.array_equal(row_of(target, 0, 15), row_of(block, 0, 15))
    other = PrefixCache(2**20, package_id=OTHER, directory=tmp_path)
    assert other.longest(keys) == (0, None)
    second.put(np.concatenate([keys, keys]), block, 0, 40)
    assert [path.parent.name for path in entries(tmp_path)] == [FOLDER]


def test_damaged_prompts_are_removed_and_the_next_best_is_found(tmp_path: Path) -> None:
    block = filled()
    long, short = text(1, 2, 3, 4), text(1, 2, 9)
    first = PrefixCache(2**20, package_id=PACKAGE, directory=tmp_path)
    first.put(short, block, 1, 3)
    (kept,) = entries(tmp_path)
    first.put(long, block, 0, 4)
    (path,) = set(entries(tmp_path)) - {kept}
    good = path.read_bytes()
    for data in damages(good):
        path.write_bytes(data)
        cache = PrefixCache(2**20, package_id=PACKAGE, directory=tmp_path)
        length, entry = cache.longest(long)
        assert length == 2 and entry is not None and entry.keys.tolist() == short.tolist()
        assert kept.exists() and (path.stem in cache.stored) == path.exists()
        cache.put(long, block, 0, 4)
        assert path.read_bytes() == good and cache.longest(long)[0] == 4


def test_files_of_prompts_are_bounded(tmp_path: Path) -> None:
    size = 400 + 10 * (SHAPE.bytes_per_token + 16)
    cache = PrefixCache(3 * size, package_id=PACKAGE, directory=tmp_path)
    block = filled()
    for start in range(1000, 1500, 10):
        cache.put(text(*range(start, start + 10)), block, 0, 10)
        assert sum(path.stat().st_size for path in entries(tmp_path)) <= 3 * size
    assert len(cache.stored) == len(entries(tmp_path)) <= 3  # the index does not grow


# Threads.


def in_threads(work: Callable[[int], Any], count: int = 8) -> None:
    barrier = threading.Barrier(count)

    def start(index: int) -> None:
        barrier.wait()
        work(index)

    with ThreadPoolExecutor(count) as pool:
        list(pool.map(start, range(count)))


def test_features_in_eight_threads(tmp_path: Path) -> None:
    size = features(0).nbytes
    cache = FeatureCache(5 * size, package_id=PACKAGE, directory=tmp_path)

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        for seed in rng.integers(0, 12, 150):
            found = cache.get(name(int(seed)))
            if found is None:
                cache.put(name(int(seed)), features(int(seed)))
            else:
                assert np.array_equal(found, features(int(seed)))
            assert cache.nbytes <= 5 * size

    in_threads(work)
    assert cache.nbytes == sum(array.nbytes for _, array in cache.memory.items())
    assert all(path.suffix == ".features" for path in entries(tmp_path))


def test_prompts_in_eight_threads(tmp_path: Path) -> None:
    cost = SHAPE.bytes_per_token + 16
    cache = PrefixCache(60 * cost, package_id=PACKAGE, directory=tmp_path)
    source = filled(rows=6)

    def work(index: int) -> None:
        rng = np.random.default_rng(index)
        block = CacheBlock(SHAPE, 1, 64)
        for _ in range(60):
            row, length = int(rng.integers(0, 6)), int(rng.integers(1, 30))
            keys = text(*range(100 * row, 100 * row + length))
            found, entry = cache.longest(keys)
            if entry is not None:
                cache.restore(entry, found, block, 0)
                assert np.array_equal(row_of(block, 0, found), row_of(source, row, found))
            cache.put(keys, source, row, length)
            assert cache.nbytes <= 60 * cost

    in_threads(work)
    assert cache.nbytes == sum(entry.nbytes for _, entry in cache.memory.items())
