"""EXP-01 to EXP-05: a destination is absent, the old package or the new one, whatever happens."""

import errno
import hashlib
import os
import resource
import signal
import threading
from pathlib import Path

import pytest

from perception_rt.errors import ExportError, InputError, PackageError
from perception_rt.package.filesystem import FileSystem
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import open_package, verify_package
from perception_rt.package.store import Stage

CALLS = (
    *("mkdir", "create", "lock", "write", "chmod", "fsync", "close", "fsync_directory"),
    *("rename", "exchange", "unlink", "rmdir"),
)


class Traced(FileSystem):
    """Records every call, and runs an action before call number `at`, counted from 1.

    It does not flush to the disk, since the tests publish hundreds of times.
    """

    def __init__(self, at=0, action=None, only=CALLS, exchanges=True):
        self.log: list[tuple[str, str]] = []
        self._paths: dict[int, str] = {}
        for name in CALLS:
            setattr(self, name, self._traced(name, at, action, only, exchanges))

    def _traced(self, name, at, action, only, exchanges):
        real = getattr(FileSystem, name)

        def call(first, *args):
            subject = self._paths.get(first, "?") if isinstance(first, int) else str(first)
            if name in only:
                self.log.append((name, subject))
                if len(self.log) == at:
                    action()
            if name == "exchange" and not exchanges:
                return False
            if name.startswith("fsync"):
                return None
            result = real(self, first, *args)
            if name in ("create", "lock"):
                self._paths[result] = subject
            return result

        return call


def in_child(work):
    """Runs `work` in a forked process; returns its wait status."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitpid(pid, 0)[1]


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def raiser(code):
    def action():
        raise OSError(code, os.strerror(code))

    return action


def siblings(dest):
    return sorted(p.name for p in dest.parent.iterdir())


def calls_of(tools, tmp_path, *, force, exchanges=True, only=CALLS):
    """Number of calls that publishing makes."""
    dest = tmp_path / "counted" / "tiny"
    dest.parent.mkdir()
    if force:
        tools.Tiny(seed=1).publish(dest)
    fs = Traced(only=only, exchanges=exchanges)
    tools.Tiny(seed=2).publish(dest, force=force, fs=fs)
    return len(fs.log)


@pytest.mark.parametrize(("force", "exchanges"), [(False, True), (True, True), (True, False)])
def test_killed_before_every_call(tools, tmp_path, force, exchanges):
    """EXP-01: the old package, the new one, or none if there was no old one; then a clean-up."""
    old, new = tools.Tiny(seed=1).manifest().id, tools.Tiny(seed=2).manifest().id
    count = calls_of(tools, tmp_path, force=force, exchanges=exchanges)
    assert count > 30
    seen = set()
    for n in range(1, count + 1):
        dest = tmp_path / f"at-{n}" / "tiny"
        dest.parent.mkdir()
        if force:
            tools.Tiny(seed=1).publish(dest, fs=tools.Unsynced())
        fs = Traced(at=n, action=die, exchanges=exchanges)
        status = in_child(lambda d=dest, f=fs: tools.Tiny(seed=2).publish(d, force=force, fs=f))
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        found = verify_package(dest).id if dest.exists() else None
        seen.add(found)
        # The next run starts with a repair, so even a refused run leaves the package whole.
        Stage.create(dest, force=True, fs=tools.Unsynced()).discard()
        assert siblings(dest) in ([], ["tiny"])
        found = verify_package(dest).id if dest.exists() else None
        assert found in ((old, new) if force else (None, new))
        tools.Tiny(seed=3).publish(dest, force=True, fs=tools.Unsynced())
        assert verify_package(dest).content.weights["seed"] == 3
        assert siblings(dest) == ["tiny"]
    # Only without an exchange is the destination absent for a moment.
    assert seen == ({old, new} if force else {None, new}) | (set() if exchanges else {None})


@pytest.mark.parametrize("force", [False, True])
@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
def test_failing_writes(tools, tmp_path, force, code):
    """EXP-02: a clear error, no stage, the old version untouched."""
    dest = tmp_path / "out" / "tiny"
    dest.parent.mkdir()
    old = tools.Tiny(seed=1).publish(dest) if force else None
    for n in range(1, calls_of(tools, tmp_path, force=force, only=("write",)) + 1):
        fs = Traced(at=n, action=raiser(code), only=("write",))
        with pytest.raises(ExportError) as info:
            tools.Tiny(seed=2).publish(dest, force=force, fs=fs)
        file = Path(fs.log[-1][1]).name
        assert file in str(info.value) and os.strerror(code) in str(info.value)
        assert " bytes" in str(info.value) and ".stage-" not in str(info.value)
        assert siblings(dest) == (["tiny"] if force else [])
        if old:
            assert verify_package(dest) == old


@pytest.mark.parametrize(("force", "exchanges"), [(False, True), (True, True), (True, False)])
def test_any_single_failing_call(tools, tmp_path, force, exchanges):
    """EXP-02: also for fsync, rename and the rest."""
    new = tools.Tiny(seed=2).manifest().id
    count = calls_of(tools, tmp_path, force=force, exchanges=exchanges)
    outcomes = set()
    for n in range(1, count + 1):
        dest = tmp_path / f"at-{n}" / "tiny"
        dest.parent.mkdir()
        old = tools.Tiny(seed=1).publish(dest, fs=tools.Unsynced()).id if force else None
        fs = Traced(at=n, action=raiser(errno.EIO), exchanges=exchanges)
        try:
            tools.Tiny(seed=2).publish(dest, force=force, fs=fs)
            published = True
        except ExportError as error:
            published = "is published, but" in str(error)
        outcomes.add(published)
        assert (verify_package(dest).id if dest.exists() else None) == (new if published else old)
        # The next run removes what could not be removed.
        Stage.create(dest, force=True).discard()
        assert siblings(dest) == (["tiny"] if dest.exists() else [])
    assert outcomes == {True, False}


def test_file_size_limit(tools, tmp_path):
    """EXP-02 with the system's file size limit."""
    dest = tmp_path / "tiny"

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        with Stage.create(dest) as stage:
            try:
                stage.write("weights.bin", [b"x" * 3000, b"x" * 3000])
            except ExportError as error:
                assert str(error).startswith("cannot write weights.bin: File too large, after 4096")
                return
        raise AssertionError("no error")

    assert in_child(work) == 0
    assert siblings(dest) == []


def outside_trouble(tmp_path):
    """Refused destinations and the error of each."""
    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.txt").write_bytes(b"mine")
    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "manifest.json").write_bytes(b'{"name": "a web app"}')
    (tmp_path / "link").symlink_to("package")
    (tmp_path / "dangling").symlink_to("nowhere")
    return [
        ("missing/tiny", "parent is not a directory"),
        ("file/tiny", "parent is not a directory"),
        ("file", "is not a directory"),
        ("link", "is not a directory"),
        ("dangling", "is not a directory"),
        ("folder", "replaces only an engine package"),
        ("app", "replaces only an engine package"),
        ("guarded", "notes.txt' does not belong"),
        ("x" * 256, "File name too long"),
    ]


def test_empty_directory_is_taken(tools, tmp_path):
    (tmp_path / "tiny").mkdir()
    tools.Tiny().publish(tmp_path / "tiny")
    open_package(tmp_path / "tiny").close()


@pytest.mark.parametrize("force", [False, True])
def test_refused_before_any_work(tools, tmp_path, force):
    """EXP-03: an export replaces only packages, and raises before any work otherwise."""
    tools.Tiny().publish(tmp_path / "package")
    tools.Tiny().publish(tmp_path / "guarded")
    (tmp_path / "guarded" / "notes.txt").write_bytes(b"mine")
    cases = outside_trouble(tmp_path)
    before = sorted(str(p) for p in tmp_path.rglob("*"))
    for name, message in cases:
        fs = Traced(only=("mkdir", "create", "write", "rename", "unlink", "rmdir"))
        with pytest.raises(ExportError, match=message):
            Stage.create(tmp_path / name, force=force, fs=fs)
        assert fs.log == []
    assert sorted(str(p) for p in tmp_path.rglob("*")) == before
    assert (tmp_path / "folder" / "notes.txt").read_bytes() == b"mine"


def test_an_existing_package_needs_force(tools, package):
    fs = Traced(only=("mkdir", "create", "write"))
    old = tools.Tiny().manifest()
    with pytest.raises(ExportError, match=f"already exists, with the id {old.id}"):
        Stage.create(package, fs=fs)
    assert fs.log == []
    new = tools.Tiny(seed=4).publish(package, force=True)
    assert verify_package(package) == new and new.id != old.id


def test_force_repairs_a_damaged_package(tools, package):
    tools.overwrite(package / "weights.bin", b"short")
    (package / "vision.onnx").unlink()
    assert tools.Tiny().publish(package, force=True) == verify_package(package)


@pytest.mark.parametrize("dest", ["", ".", "..", "/", "a/..", "a\0b"])
def test_names_that_are_no_destination(dest):
    with pytest.raises(InputError, match="does not name a package"):
        Stage.create(dest)


def test_parent_that_cannot_be_written():
    """EXP-03."""
    with pytest.raises(ExportError, match="cannot write beside /proc/tiny"):
        Stage.create("/proc/tiny")


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_read_only_parent(tmp_path, mode):
    """EXP-03. Root ignores permissions, so as another user."""
    tmp_path.chmod(0o755)
    (tmp_path / "closed").mkdir(mode=mode)

    def work():
        os.chdir(tmp_path)
        if os.geteuid() == 0:
            os.seteuid(65534)
        with pytest.raises(ExportError, match="cannot write beside closed/tiny: Permission denied"):
            Stage.create("closed/tiny")

    assert in_child(work) == 0


def test_a_directory_that_appears_meanwhile_is_not_replaced(tools, package):
    with Stage.create(package, force=True) as stage:
        tools.Tiny(seed=1).fill(stage)
        package.rename(package.with_name("moved"))
        package.mkdir()
        (package / "notes.txt").write_bytes(b"mine")
        with pytest.raises(ExportError, match="replaces only an engine package"):
            stage.publish()
    assert (package / "notes.txt").read_bytes() == b"mine"
    assert siblings(package) == ["moved", "tiny"]


def test_without_an_exchange_a_failure_restores_at_once(tools, package):
    # The three renames: onto the package (refused), package aside, stage to the destination.
    fs = Traced(at=3, action=raiser(errno.EIO), only=("rename",), exchanges=False)
    with Stage.create(package, force=True, fs=fs) as stage:
        tools.Tiny(seed=1).fill(stage)
        with pytest.raises(ExportError, match="cannot publish"):
            stage.publish()
        assert verify_package(package) == tools.Tiny().manifest()
    assert siblings(package) == ["tiny"]


def test_eight_processes_one_name(tools, tmp_path):
    """EXP-04: one publishes; the errors of the others say whether it was the same package."""
    dest = tmp_path / "tiny"
    reports, report = os.pipe()
    gate, opener = os.pipe()
    pids = []
    for index in range(8):
        pid = os.fork()
        if pid == 0:
            os.close(opener)
            try:
                with Stage.create(dest) as stage:
                    tools.Tiny(seed=index % 2).fill(stage)
                    os.write(report, b"ready\n")
                    os.read(gate, 1)  # until all are ready
                    stage.publish()
                os.write(report, f"won {index % 2}\n".encode())
            except ExportError as error:
                same = "same id" in str(error)
                other = "another id" in str(error)
                os.write(report, f"lost {index % 2} {same:d}{other:d}\n".encode())
            os._exit(0)
        pids.append(pid)
    os.close(report)
    with os.fdopen(reports) as lines:
        assert [next(lines) for _ in pids] == ["ready\n"] * 8
        os.close(opener)
        results = sorted(lines)
    for pid in pids:
        assert os.waitpid(pid, 0)[1] == 0
    os.close(gate)
    winners = [line.split()[1] for line in results if line.startswith("won")]
    assert len(winners) == 1
    seed = int(winners[0])
    assert results.count(f"lost {seed} 10\n") == 3
    assert results.count(f"lost {1 - seed} 01\n") == 4
    assert verify_package(dest).content.weights["seed"] == seed
    assert siblings(dest) == ["tiny"]


def test_concurrent_replacement_never_mixes(tools, package):
    failures = []

    def work(seed):
        try:
            for _ in range(5):
                tools.Tiny(seed=seed).publish(package, force=True, fs=tools.Unsynced())
        except BaseException as error:  # reported by the test
            failures.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        verify_package(package)
    assert not failures
    verify_package(package)
    assert siblings(package) == ["tiny"]


@pytest.mark.parametrize("force", [False, True])
def test_order_of_flushes(tools, tmp_path, force):
    """EXP-05: files, then the manifest, then folders, then the name, then its parent."""
    dest = tmp_path / "tiny"
    if force:
        tools.Tiny(seed=1).publish(dest)
    fs = Traced(only=("fsync", "write", "fsync_directory", "rename", "exchange"))
    with Stage.create(dest, force=force, fs=fs) as stage:
        tools.Tiny(seed=2).fill(stage)
        staged = str(stage.directory)
        stage.publish()
    steps = [(call, os.path.relpath(path, staged)) for call, path in fs.log]
    flushed = [path for call, path in steps if call == "fsync"]
    assert flushed == [*tools.Tiny().files(), "manifest.json"]
    for path in flushed:  # nothing is written after it was flushed
        last_write = max((i for i, s in enumerate(steps) if s == ("write", path)), default=-1)
        assert steps.index(("fsync", path)) > last_write
    tail = steps[steps.index(("fsync", "manifest.json")) + 1 :]
    swap = [("rename", "."), ("exchange", ".")] if force else [("rename", ".")]
    assert tail == [
        ("fsync_directory", "text"),
        ("fsync_directory", "."),
        *swap,
        ("fsync_directory", ".."),
    ]


def test_a_live_stage_stays_and_a_stale_one_goes(tools, tmp_path):
    dest = tmp_path / "tiny"
    with Stage.create(dest) as live:
        live.write("a", [b"1"])
        (tmp_path / f".tiny.stage-{'0' * 32}").mkdir()
        (tmp_path / f".tiny.stage-{'0' * 32}" / "a").write_bytes(b"1")
        (tmp_path / f".tiny.stage-{'1' * 32}.lock").write_bytes(b"")
        foreign = [".tiny.stage-mine", f".other.stage-{'0' * 32}", f"tiny.stage-{'0' * 32}"]
        for name in foreign:
            (tmp_path / name).mkdir()
        with Stage.create(dest) as second:
            assert live.path("a").read_bytes() == b"1"
            own = [live.directory.name, second.directory.name]
            locks = [f"{name}.lock" for name in own]
            assert siblings(dest) == sorted([*foreign, *own, *locks])
    assert siblings(dest) == sorted(foreign)


def test_a_lock_that_was_cleaned_up_while_it_was_taken_is_given_up(tmp_path):
    class Unlucky(FileSystem):
        taken = 0

        def lock(self, path):
            fd = super().lock(path)
            self.taken += 1
            if self.taken <= 2:  # another process removes it, and for the second time replaces it
                path.unlink()
                if self.taken == 2:
                    path.touch()
            return fd

    fs = Unlucky()
    with Stage.create(tmp_path / "tiny", fs=fs) as stage:
        assert fs.taken == 3
        with pytest.raises(BlockingIOError):
            FileSystem().lock(stage.directory.with_name(f"{stage.directory.name}.lock"))


def test_a_sealed_stage_opens_and_its_record_can_change(tools, tmp_path):
    """The fidelity gate opens a sealed stage and seals it again with a record."""
    tiny = tools.Tiny()
    with Stage.create(tmp_path / "tiny") as stage:
        first = tiny.fill(stage)
        with open_package(stage.directory, expect=first.id) as staged:
            staged.verify()
            fidelity = {"cosine": len(staged.map("weights.bin")) / 640}
        stage.seal(Manifest.create(first.content, record=fidelity))
        assert stage.publish() == tmp_path / "tiny"
    found = verify_package(tmp_path / "tiny", expect=first.id)
    assert found.record == {"cosine": 1.0} and found.digest != first.digest


def test_entries_and_reading_back(tmp_path):
    with Stage.create(tmp_path / "tiny") as stage:
        data = bytes(range(256)) * 8200  # more than two blocks
        entry = stage.write("a/b/c.bin", [data])
        with stage.open_write("d") as writer:
            writer.write(memoryview(data)[::1])
            writer.write(memoryview(b"").cast("B"))
            writer.write(memoryview(bytearray(12)).cast("I", (3, 1)))
        assert stage.entries["a/b/c.bin"] == entry and entry.size_bytes == len(data)
        assert entry.sha256 == hashlib.sha256(data).hexdigest()
        assert stage.path("d").read_bytes() == data + bytes(12)
        with pytest.raises(ExportError, match="'e' was not staged"):
            stage.path("e")
        with pytest.raises(ExportError, match="d is closed"):
            writer.write(b"late")


def test_misuse_is_refused(tools, tmp_path):
    with Stage.create(tmp_path / "tiny") as stage:
        with pytest.raises(ExportError, match="only a sealed stage"):
            stage.publish()
        with pytest.raises(PackageError, match="not a file path"):
            stage.write("../x", [b""])
        with pytest.raises(InputError, match="contiguous"):
            stage.write("x", [memoryview(b"abcd")[::2]])
        assert dict(stage.entries) == {} and list(stage.directory.iterdir()) == []
        manifest = tools.Tiny().fill(stage)
        with pytest.raises(ExportError, match="staged before"):
            stage.write("weights.bin", [b""])
        with pytest.raises(ExportError, match="does not list the files"):
            stage.seal(tools.Tiny(seed=1).manifest())
        stage.seal(manifest)
        stage.publish()
        with pytest.raises(ExportError, match="only once"):
            stage.publish()
        with pytest.raises(ExportError, match="published or discarded"):
            stage.write("more", [b""])
    assert verify_package(tmp_path / "tiny") == manifest


def test_any_exception_removes_the_stage(tools, tmp_path):
    with (
        pytest.raises(KeyboardInterrupt),
        Stage.create(tmp_path / "tiny") as stage,
        stage.open_write("a") as writer,
    ):
        writer.write(b"1")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with Stage.create(tmp_path / "tiny") as stage:
        tools.Tiny().fill(stage)  # sealed but not published
    assert list(tmp_path.iterdir()) == []


def test_a_failed_source_leaves_no_file(tmp_path):
    def chunks():
        yield b"1"
        raise ValueError("the source broke")

    with Stage.create(tmp_path / "tiny") as stage:
        with pytest.raises(ValueError, match="the source broke"):
            stage.write("a", chunks())
        assert list(stage.directory.iterdir()) == []
        stage.write("a", [b"2"])
