"""The shipped demos: equal to a fresh export, right, and copied to a private cache."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

import perception_rt as prt
from perception_rt.cli import main
from perception_rt.demo import DEMO_PE, DEMO_PLM, package_paths, pictures_path
from perception_rt.package import demo_cache
from perception_rt.package.demo_cache import cache_folder, locate
from perception_rt.package.manifest import MANIFEST_FILE, Content
from perception_rt.package.reader import open_package, verify_package

ROOT = Path(__file__).parents[1]
REMAKE = "the shipped demo differs from an export by this code: run make demo-packages"
SHIPPED = [(DEMO_PE, "PE-Demo", "fp16"), (DEMO_PLM, "PLM-Demo", "int8")]
MAX_BYTES = 13_000_000  # of both packages and the pictures


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Moves the cache away from the user's own; returns the folder of the copies."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "perception_rt" / "demo"


@pytest.fixture
def linked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The packages as an installer leaves them that links the files of a wheel."""
    folder = tmp_path / "site"
    for name, source in package_paths().items():
        for file in source.iterdir():
            target = folder / source.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            store = tmp_path / "store" / source.name / file.name
            store.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, store)
            if name == DEMO_PE:
                target.symlink_to(store)
            else:
                target.hardlink_to(store)
    paths = {name: folder / source.name for name, source in package_paths().items()}
    monkeypatch.setattr(demo_cache, "package_paths", lambda: paths)
    return folder


@pytest.mark.parametrize(("name", "model", "precision"), SHIPPED)
def test_their_manifests_fit_the_code(
    name: str, model: str, precision: str, tmp_path: Path
) -> None:
    from perception_rt.checkpoint.source import open_checkpoint
    from perception_rt.export import ExportOptions
    from perception_rt.export.architecture import find_architecture, locate_weights
    from perception_rt.export.build import model_export
    from perception_rt.export.plan import build_settings
    from perception_rt.families import family_of

    options = ExportOptions(model=model, precision=precision, out=tmp_path)
    config, place = find_architecture(options), locate_weights(options, print)
    maker = model_export(family_of(config))
    plan = maker.make_plan(options, config, build_settings(options), lambda: place.path)
    source = open_checkpoint(place.path, plan.config, license_note=place.license_note)
    made, found = maker(plan, source), verify_package(package_paths()[name]).content
    assert found.architecture == plan.config.to_dict(), REMAKE
    assert (found.image, found.text) == (made.image(), made.text()), REMAKE
    assert found.weights == source.provenance, REMAKE
    assert (found.name, found.target.precision) == (model, precision), REMAKE


@pytest.mark.slow
@pytest.mark.parametrize(("name", "model", "precision"), SHIPPED)
def test_they_equal_a_fresh_export(name: str, model: str, precision: str, tmp_path: Path) -> None:
    from perception_rt.export import ExportOptions, export

    def facts(content: Content) -> dict[str, Any]:
        found = content.to_dict()
        versions = found.pop("versions")
        if versions != fresh.versions:  # another torch may write another graph
            graphs = [name for name in found["files"] if name.endswith(".onnx")]
            found["files"] = {n: e for n, e in found["files"].items() if n not in graphs}
        return found

    fresh = export(ExportOptions(model=model, precision=precision, out=tmp_path / "p")).content
    shipped = verify_package(package_paths()[name]).content
    assert facts(shipped) == facts(fresh), REMAKE


def test_the_pictures_are_the_held_out_ones(tmp_path: Path) -> None:
    from training.demo.pictures import write

    write(tmp_path)
    names = {path.name for path in pictures_path().iterdir()}
    assert {path.name for path in tmp_path.iterdir()} == names
    assert (tmp_path / "pictures.json").read_bytes() == (
        pictures_path() / "pictures.json"
    ).read_bytes()
    for name in names - {"pictures.json"}:
        from PIL import Image

        with Image.open(tmp_path / name) as fresh, Image.open(pictures_path() / name) as shipped:
            assert fresh.tobytes() == shipped.tobytes(), REMAKE


def test_they_are_small() -> None:
    folders = [*package_paths().values(), pictures_path()]
    sizes = [file.stat().st_size for folder in folders for file in folder.iterdir()]
    assert sum(sizes) <= MAX_BYTES


def test_demo_classifies_answers_and_draws(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["demo", "--out", str(out), "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert len(result["digits"]) == 10 and len(result["questions"]) == 6
    assert sum(item["right"] for item in result["digits"]) >= 9
    assert all(item["right"] for item in result["questions"])
    for picture in result["pictures"]:
        assert Path(picture).stat().st_size > 1000
    assert main(["demo", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert " of 16 right. Drawn: " in printed and "perception-rt chat demo:plm" in printed


def test_demo_needs_a_folder_that_can_be_written(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "file").write_text("")
    assert main(["demo", "--out", str(tmp_path / "file" / "x")]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.count("\n") == 1
    assert "--out names another folder" in captured.err


def test_load_takes_their_names() -> None:
    with prt.load(DEMO_PE) as pe, prt.load(DEMO_PLM) as plm:
        assert isinstance(pe, prt.Embedder) and isinstance(plm, prt.Generator)
        assert pe.manifest.content.name == "PE-Demo"
    with pytest.raises(prt.InputError, match=r"use Embedder\.load"):
        prt.Generator.load(DEMO_PE)
    with pytest.raises(prt.PackageError, match="expected 'sha256:0'"):
        prt.load(DEMO_PE, expect="sha256:0")
    with pytest.raises(prt.InputError, match="unknown demo 'demo:pee'; known are demo:pe and demo"):
        prt.load("demo:pee")


def test_a_folder_may_have_such_a_name(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("demo:mine", DEMO_PE):
        shutil.copytree(package_paths()[DEMO_PLM], tmp_path / name)
    assert prt.load("demo:mine").manifest.content.name == "PLM-Demo"
    assert prt.load(f"./{DEMO_PE}").manifest.content.name == "PLM-Demo"
    assert prt.load(Path(DEMO_PE)).manifest.content.name == "PLM-Demo"
    assert prt.load(DEMO_PE).manifest.content.name == "PE-Demo"


def test_commands_take_their_names(capsys: Any) -> None:
    assert main(["inspect", DEMO_PE]) == 0
    assert capsys.readouterr().out.startswith("PE-Demo  sha256:")
    assert main(["verify", DEMO_PLM]) == 0
    assert main(["doctor", DEMO_PLM]) == 0
    assert "demo:plm: intact" in capsys.readouterr().out
    assert main(["doctor", "demo:x"]) == 2
    assert "unknown demo 'demo:x'" in capsys.readouterr().err


def test_links_are_copied_and_not_opened(linked: Path, cache: Path) -> None:
    for name in (DEMO_PE, DEMO_PLM):
        with pytest.raises(prt.PackageError, match="not a regular file with one name"):
            open_package(linked / name.partition(":")[2])
        prt.load(name).close()
    pe, plm = sorted(cache.iterdir())
    for copy in (pe, plm):
        assert stat.S_IMODE(copy.stat().st_mode) == 0o700
        assert all(not f.is_symlink() and f.stat().st_nlink == 1 for f in copy.iterdir())
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700


def test_a_copy_is_used_again_and_a_damaged_one_is_replaced(cache: Path) -> None:
    copy = Path(locate(DEMO_PE)[0])
    before = copy.stat().st_ino
    assert Path(locate(DEMO_PE)[0]) == copy and copy.stat().st_ino == before
    for damage in (
        lambda: (copy / "vision.data").write_bytes(b"x"),
        lambda: (copy / MANIFEST_FILE).unlink(),
        lambda: (copy / "extra").write_text("x"),
        lambda: (copy / "text.data").rename(cache / "aside"),
    ):
        damage()
        prt.load(DEMO_PE).close()
        assert verify_package(copy).content.name == "PE-Demo"
    assert [p.name for p in cache.iterdir() if p.name.startswith(".")] == []


def test_what_a_killed_copy_left_is_removed(cache: Path) -> None:
    cache.mkdir(parents=True, mode=0o700)
    old, new = cache / ".copy-old", cache / ".copy-new"
    for work in (old, new):
        (work / "new").mkdir(parents=True)
    long_ago = time.time() - 7200
    os.utime(old, (long_ago, long_ago))
    locate(DEMO_PLM)
    assert not old.exists() and new.exists()  # another process may still be copying


def test_first_uses_at_the_same_time(cache: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        ids = list(pool.map(lambda _: verify_package(DEMO_PLM).id, range(16)))
    assert len(set(ids)) == 1
    assert len(list(cache.iterdir())) == 1
    shutil.rmtree(cache)
    code = "from perception_rt.package.reader import verify_package as v; print(v('demo:plm').id)"
    children = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
        for _ in range(3)
    ]
    assert [child.communicate()[0].decode().strip() for child in children] == [ids[0]] * 3
    assert len(list(cache.iterdir())) == 1


def test_without_a_cache_the_installed_files_are_used(cache: Path, monkeypatch: Any) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("in the way")
    assert Path(locate(DEMO_PE)[0]) == package_paths()[DEMO_PE]
    prt.load(DEMO_PE).close()


@pytest.mark.parametrize("problem", ["in the way", "others"])
def test_a_cache_that_cannot_be_used_is_named(linked: Path, cache: Path, problem: str) -> None:
    cache.parent.mkdir(parents=True)
    if problem == "others":
        cache.mkdir()
        cache.chmod(0o777)
    else:
        cache.write_text("in the way")
    with pytest.raises(prt.PackageError, match=r"cannot copy demo:pe to .*demo.*XDG_CACHE_HOME"):
        prt.load(DEMO_PE)


def test_a_damaged_installation_is_named(linked: Path, tmp_path: Path) -> None:
    file = tmp_path / "store" / "pe" / "text.data"
    file.chmod(0o644)
    data = bytearray(file.read_bytes())
    data[1000] ^= 1
    file.write_bytes(data)
    with pytest.raises(prt.PackageError, match=r"text\.data is damaged: its SHA-256 .*reinstall"):
        prt.load(DEMO_PE)
    file.unlink()
    with pytest.raises(prt.PackageError, match=r"text\.data is damaged: No such file"):
        prt.load(DEMO_PE)
    (tmp_path / "store" / "pe" / MANIFEST_FILE).unlink()
    with pytest.raises(prt.PackageError, match="demo:pe is not in this installation"):
        prt.load(DEMO_PE)


def test_the_cache_is_where_the_system_keeps_caches(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", given)
        monkeypatch.setattr(sys, "platform", "linux")
        assert cache_folder() == tmp_path / ".cache" / "perception_rt" / "demo"
        monkeypatch.setattr(sys, "platform", "darwin")
        assert cache_folder() == tmp_path / "Library" / "Caches" / "perception_rt" / "demo"
        monkeypatch.setattr(sys, "platform", "win32")
        monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
        assert cache_folder() == tmp_path / "local" / "perception_rt" / "demo"


def test_a_full_disk_leaves_nothing(linked: Path, cache: Path, monkeypatch: Any) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device", str(self))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(prt.PackageError, match="No space left on device; set XDG_CACHE_HOME"):
            prt.load(DEMO_PLM)
    assert list(cache.iterdir()) == []
    prt.load(DEMO_PLM).close()
