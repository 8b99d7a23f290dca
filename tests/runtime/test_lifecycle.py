"""Replacing a package in use, killing an export, many engines at once."""

import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import perception_rt as prt
from perception_rt.errors import PackageError
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import read_manifest
from perception_rt.package.store import Stage

_IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)


def _republish(source: Path, dest: Path, record: int) -> None:
    """Publishes the files of `source` as `dest`, like an export with --force."""
    manifest = read_manifest(source)
    with Stage.create(dest, force=True) as stage:
        for name in manifest.content.files:
            stage.write(name, [(source / name).read_bytes()])
        stage.seal(Manifest.create(manifest.content, record={"take": record}))
        stage.publish()


def test_reader_outlives_fifty_republishes(tiny_package: Path, tmp_path: Path) -> None:
    """PKG-15 with the real engine: graphs open and run while the package is replaced."""
    dest = tmp_path / "package"
    shutil.copytree(tiny_package, dest)
    with prt.load(dest) as engine:
        expected = engine.embed_images([_IMAGE])
        publisher = threading.Thread(
            target=lambda: [_republish(tiny_package, dest, i) for i in range(50)]
        )
        publisher.start()
        runs = 0
        while publisher.is_alive() or runs < 100:
            assert np.array_equal(engine.embed_images([_IMAGE]), expected)
            runs += 1
        assert engine.features([_IMAGE]).shape == (1, 4, 4, 64)  # a graph not opened before
        publisher.join()
    with prt.load(dest) as engine:
        assert engine.manifest.record["take"] == 49
        assert np.array_equal(engine.embed_images([_IMAGE]), expected)


def test_sixteen_loads_at_once(tiny_package: Path) -> None:
    def work(_: int) -> np.ndarray:
        with prt.load(tiny_package, threads=1) as engine:
            return engine.embed_images([_IMAGE])

    with ThreadPoolExecutor(16) as pool:
        rows = list(pool.map(work, range(48)))
    assert all(np.array_equal(row, rows[0]) for row in rows)


def test_no_descriptor_is_left(tiny_package: Path) -> None:
    def descriptors() -> int:
        return len(list(Path("/proc/self/fd").iterdir()))

    with prt.load(tiny_package, threads=1) as engine:
        engine.embed_images([_IMAGE])
    before = descriptors()
    for _ in range(8):
        with prt.load(tiny_package, threads=1) as engine:
            engine.embed_images([_IMAGE])
    assert descriptors() <= before


@pytest.mark.parametrize("files", [0, 1, 3])
def test_killed_export_leaves_nothing_visible(files: int, tmp_path: Path) -> None:
    """EXP-01 with the whole command: absent or valid after SIGKILL, and the next run cleans up.

    It is killed once its stage has this many files.
    """
    dest = tmp_path / "package"
    arguments = ["--model", "PE-Demo", "--out", str(dest)]
    code = "import sys; from perception_rt.cli import export_main; sys.exit(export_main())"
    child = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stderr=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
    while child.poll() is None:
        stages = [path for path in tmp_path.iterdir() if path.is_dir()]
        if stages and len(list(stages[0].glob("*"))) >= files:
            break
        time.sleep(0.001)
    child.kill()
    assert child.wait() == -signal.SIGKILL
    if dest.exists():
        prt.load(dest).close()
    else:
        with pytest.raises(PackageError):
            prt.load(dest)
    Stage.create(dest, force=True).discard()
    assert [p.name for p in tmp_path.iterdir() if p != dest] == []


def test_processes_share_one_package(tiny_package: Path) -> None:
    code = (
        "import sys, numpy as np, perception_rt as prt\n"
        "image = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)\n"
        "print(prt.load(sys.argv[1], threads=1).embed_images([image]).tobytes().hex())\n"
    )
    command = [sys.executable, "-c", code, str(tiny_package)]
    children = [subprocess.Popen(command, stdout=subprocess.PIPE) for _ in range(3)]
    outputs = [child.communicate()[0] for child in children]
    assert all(child.returncode == 0 for child in children)
    assert len(set(outputs)) == 1
