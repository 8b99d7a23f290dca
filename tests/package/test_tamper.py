"""PKG-01 to PKG-06: no bytes of a damaged package reach a backend."""

import json
import os
import random
import stat
import sys

import pytest

from perception_rt.errors import PackageError
from perception_rt.package.manifest import check_path, parse
from perception_rt.package.reader import open_package, verify_package


class Spy:
    """Stands in for a backend and counts the bytes that it gets."""

    calls = 0

    def load(self, path):
        with open_package(path) as package:
            package.verify()
            graphs = [package.read_graph(name) for name in package.manifest.content.graphs]
            weights = package.map("weights.bin")
        self.calls += 1
        return graphs, bytes(weights)


def names_in(package):
    return sorted(str(p.relative_to(package)) for p in package.rglob("*") if p.is_file())


def assert_refused(package):
    spy = Spy()
    with pytest.raises(PackageError) as info:
        spy.load(package)
    assert spy.calls == 0
    with pytest.raises(PackageError):
        verify_package(package)
    return str(info.value)


def test_the_untouched_package_reaches_the_backend(package):
    spy = Spy()
    spy.load(package)
    assert spy.calls == 1


def test_truncated_files(tools, package):
    """PKG-01."""
    rng = random.Random(0)
    for name in names_in(package):
        data = (package / name).read_bytes()
        size = len(data)
        points = {0, 1, 7, size // 2, size - 1, *(rng.randrange(size or 1) for _ in range(64))}
        for point in sorted(p for p in points if 0 <= p < size):
            tools.overwrite(package / name, data[:point])
            assert_refused(package)
        tools.overwrite(package / name, data + b"\0")
        assert_refused(package)
        tools.overwrite(package / name, data)
    Spy().load(package)


def test_flipped_bits(tools, package):
    """PKG-02: 2,000 flips, equally many in each file."""
    rng = random.Random(1)
    names = [name for name in names_in(package) if (package / name).stat().st_size]
    for name in names:
        tools.overwrite(package / name, (package / name).read_bytes())
        with (package / name).open("r+b", buffering=0) as file:
            data = file.read()
            for _ in range(2000 // len(names)):
                position, bit = rng.randrange(len(data)), 1 << rng.randrange(8)
                os.pwrite(file.fileno(), bytes([data[position] ^ bit]), position)
                with pytest.raises(PackageError):
                    Spy().load(package)
                os.pwrite(file.fileno(), data[position : position + 1], position)
    Spy().load(package)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sha256": "0" * 64}, "damaged"),
        ({"bytes": 639}, "640 bytes instead of 639"),
        ({"bytes": 2**62}, "640 bytes instead of"),
        ({"sha256": "A" * 64}, "lower-case"),
        ({"sha256": "0" * 40}, "64 lower-case"),
        ({"sha256": "0" * 128}, "64 lower-case"),
    ],
)
def test_wrong_digest_or_size_in_the_manifest(tools, package, change, message):
    """PKG-03."""
    tools.change_manifest(package, lambda m: m["content"]["files"]["weights.bin"].update(change))
    assert message in assert_refused(package)


@pytest.mark.parametrize("name", ["vision.onnx", "weights.bin", "text/empty.txt", "manifest.json"])
def test_missing_file(package, name):
    """PKG-04."""
    (package / name).unlink()
    assert f"cannot open {name}" in assert_refused(package)


@pytest.mark.parametrize(
    "name", ["extra", "text/extra", ".hidden", "WEIGHTS.BIN", "text/manifest.json", "a/b", "deep/"]
)
def test_unlisted_file_or_folder(package, name):
    """PKG-04."""
    path = package / name
    path.parent.mkdir(exist_ok=True)
    if name.endswith("/"):
        path.mkdir()
    else:
        path.write_bytes(b"")
    assert "does not belong to this package" in assert_refused(package)


def test_file_listed_twice(tools, package):
    """PKG-04."""
    text = (package / "manifest.json").read_text()
    entry = json.dumps(json.loads(text)["content"]["files"]["weights.bin"])
    changed = text.replace('"weights.bin": {', f'"weights.bin": {entry},\n"weights.bin": {{')
    assert changed != text
    tools.overwrite(package / "manifest.json", changed.encode())
    assert "key 'weights.bin' occurs twice" in assert_refused(package)


HOSTILE = [
    *("CON", "nul", "Aux.txt", "a/com1.tar.gz", "LPT9/x", "prn."),
    *(
        "../x",
        "a/../../x",
        "/etc/passwd",
        "//etc/passwd",
        "a/..",
        "..",
        ".",
        "",
        "a/",
        "/a",
        "a//b",
    ),
    *("./a", "a/./b", ".hidden", "a/.hidden", "a.", "a./b", "a ", " a", "a b", "C:\\x", "C:/x"),
    *("\\\\?\\C:\\x", "\\\\server\\share", "a\\b", "file:x", "file:///etc/passwd", "a\0b", "a\nb"),
    *("a\n", "x" * 129, "x" * 300, "a/b/c/d", "a\u2215b", "a\uff0fb", "\u202eb", "caf\xe9", "~/x"),
    *("$HOME/x", "%2e%2e/x", "a|b", "*/_ORT_MEM_ADDR_/*", "manifest.json", "MANIFEST.JSON", "-\t"),
]


class Audit:
    """Records opened paths while it is on; an audit hook cannot be removed."""

    def __init__(self):
        self.on = False
        self.seen = []
        sys.addaudithook(self._record)

    def _record(self, event, args):
        if self.on and event in ("open", "os.listdir", "os.scandir", "os.link", "os.rename"):
            self.seen.append((event, str(args[0])))

    def refused(self, path, message):
        """Paths that were opened while the package was refused."""
        self.seen.clear()
        self.on = True
        try:
            with pytest.raises(PackageError, match=message):
                open_package(path)
        finally:
            self.on = False
        return self.seen


@pytest.fixture(scope="module")
def audit():
    return Audit()


def test_hostile_paths(tools, package, audit):
    """PKG-05: refused while parsing; only the manifest was opened."""
    assert len(HOSTILE) >= 40
    clean = (package / "manifest.json").read_bytes()
    for path in HOSTILE:
        with pytest.raises(PackageError, match="is not a file path of a package"):
            check_path(path)

        def change(manifest, path=path):
            manifest["content"]["files"][path] = manifest["content"]["files"]["weights.bin"]

        tools.change_manifest(package, change)
        data = (package / "manifest.json").read_bytes()
        with pytest.raises(PackageError, match="is not a file path of a package"):
            parse(data)
        opened = audit.refused(package, "is not a file path")
        assert opened == [("open", str(package)), ("open", "manifest.json")]
        tools.overwrite(package / "manifest.json", clean)
    Spy().load(package)


def replaced_by(package, name, tmp_path, kind):
    """Replaces a file by another kind of entry; a link leads to the right bytes."""
    path = package / name
    kept = tmp_path / "outside"
    path.rename(kept)
    if kind == "symlink":
        path.symlink_to(kept)
    elif kind == "hard link":
        os.link(kept, path)
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind == "directory":
        path.mkdir()
    elif kind == "sparse":
        path.touch()
        os.truncate(path, 2**40)
    elif kind == "device":
        try:
            os.mknod(path, 0o666 | stat.S_IFCHR, os.makedev(1, 5))  # /dev/zero
        except PermissionError:
            pytest.skip("making devices needs privileges")


@pytest.mark.parametrize("name", ["weights.bin", "vision.onnx", "manifest.json", "text/vocab.txt"])
@pytest.mark.parametrize("kind", ["symlink", "hard link", "fifo", "directory", "sparse", "device"])
def test_entries_that_are_not_plain_files(package, tmp_path, audit, name, kind):
    """PKG-06. Opening a pipe could block forever."""
    replaced_by(package, name, tmp_path, kind)
    message = assert_refused(package)
    assert name in message or "manifest: " in message
    assert str(tmp_path / "outside") not in message
    if kind in ("fifo", "device", "symlink"):
        assert ("open", name.rpartition("/")[2]) not in audit.refused(package, name)


def test_symlinked_folder(package, tmp_path):
    """PKG-06."""
    (package / "text").rename(tmp_path / "outside")
    (package / "text").symlink_to(tmp_path / "outside")
    assert "cannot open text" in assert_refused(package)


def test_messages_hold_no_address_and_no_resolved_path(tools, package, monkeypatch):
    monkeypatch.chdir(package.parent)
    tools.overwrite(package / "weights.bin", b"x" * 640)
    with pytest.raises(PackageError) as info:
        verify_package("tiny")
    assert str(info.value).startswith("tiny: weights.bin is damaged")
    assert str(package) not in str(info.value) and "0x" not in str(info.value)
