"""PKG-14, PKG-15 and reading healthy packages."""

import gc
import hashlib
import threading
import time
from pathlib import Path

import pytest

from perception_rt.errors import PackageError
from perception_rt.package.filesystem import FileSystem
from perception_rt.package.manifest import MANIFEST_FILE
from perception_rt.package.reader import open_package, verify_package


def open_fds():
    return len(list(Path("/proc/self/fd").iterdir()))


def test_read_and_map_return_the_bytes(tools, package):
    before = open_fds()
    with open_package(package) as opened:
        assert opened.name == "PE-Tiny"
        for path, data in tools.Tiny().files().items():
            assert opened.read(path) == data
            view = opened.map(path)
            assert bytes(view) == data and len(view) == len(data) and view.readonly
            assert opened.map(path) is view
        assert opened.read_graph("vision") == tools.Tiny().model()
        opened.verify()
        del view
    assert open_fds() == before


def test_the_published_package_is_read_only_and_holds_nothing_else(tools, package):
    listed = {str(p.relative_to(package)) for p in package.rglob("*") if p.is_file()}
    assert listed == {*tools.Tiny().files(), MANIFEST_FILE}
    assert {p.stat().st_mode & 0o777 for p in package.rglob("*") if p.is_file()} == {0o444}
    assert [p.name for p in package.parent.iterdir()] == ["tiny"]


def test_names_outside_the_manifest(package):
    with open_package(package) as opened:
        for name in (MANIFEST_FILE, "../tiny/weights.bin", "/etc/passwd", "", "text"):
            for access in (opened.read, opened.map):
                with pytest.raises(PackageError, match="no file"):
                    access(name)
        with pytest.raises(PackageError, match="no graph 'nope'"):
            opened.read_graph("nope")


def test_a_closed_package(package):
    opened = open_package(package)
    view = opened.map("weights.bin")
    expected = bytes(view)
    opened.close()
    opened.close()
    for access in (opened.read, opened.map):
        with pytest.raises(PackageError, match="closed"):
            access("weights.bin")
    with pytest.raises(PackageError, match="closed"):
        opened.verify()
    assert bytes(view) == expected  # mappings stay valid


def test_a_forgotten_package_closes_its_files(package):
    before = open_fds()
    for _ in range(3):
        open_package(package)
    gc.collect()
    assert open_fds() == before


def test_a_failed_open_closes_its_files(package):
    (package / "extra").write_bytes(b"")
    before = open_fds()
    with pytest.raises(PackageError):
        open_package(package)
    (package / "extra").unlink()
    (package / "text" / "vocab.txt").unlink()
    with pytest.raises(PackageError):
        open_package(package)
    assert open_fds() == before


@pytest.mark.parametrize("kind", ["missing", "file", "empty", "nul"])
def test_paths_without_a_package(tmp_path, kind, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "empty").mkdir()
    path = "nul\0" if kind == "nul" else kind
    with pytest.raises(PackageError) as info:
        open_package(path)
    assert kind in str(info.value)
    assert str(tmp_path) not in str(info.value)  # only the given path


def test_expected_id(tools, package):
    manifest = tools.Tiny().manifest()
    assert verify_package(package, expect=manifest.id).id == manifest.id
    for wrong in (manifest.digest, manifest.id.upper(), "", "sha256:"):
        with pytest.raises(PackageError, match="the package id is"):
            open_package(package, expect=wrong)


def test_a_package_behind_a_link_opens(package):
    link = package.with_name("current")
    link.symlink_to(package.name)
    assert verify_package(link).content.name == "PE-Tiny"


@pytest.mark.parametrize("file", ["weights.bin", "vision.onnx", "text/vocab.txt"])
def test_each_way_to_the_bytes_checks_them(tools, package, file):
    data = tools.Tiny().files()[file]
    tools.overwrite(package / file, data[:-1] + bytes([data[-1] ^ 1]))
    with open_package(package) as opened:
        for access in (opened.read, opened.map, opened.map, lambda _: opened.verify()):
            with pytest.raises(PackageError, match=f"{file} is damaged"):
                access(file)


def test_threads_share_one_mapping(package):
    with open_package(package) as opened:
        views = []
        threads = [
            threading.Thread(target=lambda: views.append(opened.map("weights.bin")))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(views) == 8 and len({id(view) for view in views}) == 1


def test_a_file_swapped_at_any_time_is_never_handed_out(tools, package):
    """PKG-14: a read returns the bytes of the digest or raises an error."""
    good = tools.Tiny().weights()
    bad = bytes(reversed(good))
    assert hashlib.sha256(bad).digest() != hashlib.sha256(good).digest()
    stop, swaps = threading.Event(), 0

    package.with_name("other").write_bytes(bad)

    def swap():
        nonlocal swaps
        while not stop.is_set():
            assert FileSystem().exchange(package.with_name("other"), package / "weights.bin")
            swaps += 1

    thread = threading.Thread(target=swap)
    thread.start()
    seen = {"good": 0, "error": 0}
    try:
        while swaps < 1000 or min(seen.values()) == 0:
            try:
                with open_package(package) as opened:
                    assert bytes(opened.map("weights.bin")) == good
                    assert opened.read("weights.bin") == good
                seen["good"] += 1
            except PackageError:
                seen["error"] += 1
    finally:
        stop.set()
        thread.join()
    assert min(seen.values()) > 0


def test_readers_are_not_disturbed_by_republishing(tools, package):
    """PKG-15: 50 replacements under one name, during which opening always succeeds."""
    old = tools.Tiny()
    opened = open_package(package)
    view, weights = opened.map("weights.bin"), old.weights()
    failures: list[BaseException] = []

    def republish():
        try:
            for seed in range(1, 51):
                tools.Tiny(seed=seed % 5).publish(package, force=True, fs=tools.Unsynced())
        except BaseException as error:  # reported by the test
            failures.append(error)

    thread = threading.Thread(target=republish)
    thread.start()
    ids = set()
    rounds = 0
    while thread.is_alive() or rounds < 50:
        assert bytes(view) == weights
        assert opened.read("vision.onnx") == old.model()
        ids.add(verify_package(package).id)
        rounds += 1
        time.sleep(0)
    thread.join()
    assert not failures
    assert len(ids) > 1
    assert opened.read("weights.bin") == weights
    assert [p.name for p in package.parent.iterdir()] == ["tiny"]
    opened.close()
