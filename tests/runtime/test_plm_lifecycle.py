"""Generators that are closed, dropped and forked; packages that are replaced."""

import gc
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from fake_plm import CONFIG, write_plm
from soak import (
    assert_idle,
    descriptors,
    eventually,
    live_requests,
    load,
    onnx_package,
    parts,
    picture,
    resident_bytes,
    run_threads,
    threads,
)

import perception_rt as prt
from perception_rt.errors import BackendError, PackageError
from perception_rt.package.manifest import Manifest
from perception_rt.package.reader import read_manifest
from perception_rt.package.store import Stage
from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request

MIB = 2**20
LONG = 700  # length of an answer that is abandoned
ENGINES = ("reference", "onnxruntime")
pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Returns a package for the reference backend or ONNX Runtime."""
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    reference = write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)
    return lambda engine: reference if engine == "reference" else onnx_package(tmp_path_factory)


@pytest.fixture(params=ENGINES)
def package(request: pytest.FixtureRequest, packages: Callable[[str], Path]) -> Path:
    return packages(request.param)


@pytest.fixture
def reference(packages: Callable[[str], Path]) -> Path:
    return packages("reference")


def run_child(code: str, *arguments: object, timeout_s: float = 60) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def assert_clean(child: subprocess.CompletedProcess, stdout: str) -> None:
    assert (child.returncode, child.stdout, child.stderr) == (0, stdout, "")


# Packages.


def republish(source: Path, dest: Path, record: int) -> None:
    """Publishes the files of `source` as `dest`, as an export with --force would."""
    manifest = read_manifest(source)
    with Stage.create(dest, force=True) as stage:
        for name in manifest.content.files:
            stage.write(name, [(source / name).read_bytes()])
        stage.seal(Manifest.create(manifest.content, record={"take": record}))
        stage.publish()


def test_a_generator_outlives_republishes_of_its_package(
    packages: Callable[[str], Path], tmp_path: Path
) -> None:
    """PKG-15: graphs are opened and run while the package is replaced."""
    source, dest = packages("onnxruntime"), tmp_path / "package"
    shutil.copytree(source, dest)
    with load(dest, cache=False) as plm:
        expected = plm.generate("a", max_new_tokens=8).tokens
        publisher = threading.Thread(
            target=lambda: [republish(source, dest, take) for take in range(10)]
        )
        publisher.start()
        while publisher.is_alive():
            assert plm.generate("a", max_new_tokens=8).tokens == expected
        publisher.join()
        # This opens the vision graph.
        seen = plm.generate("a", images=[picture(0)], max_new_tokens=8).tokens
    with load(dest, cache=False) as plm:
        assert plm.manifest.record["take"] == 9
        assert plm.generate("a", max_new_tokens=8).tokens == expected
        assert plm.generate("a", images=[picture(0)], max_new_tokens=8).tokens == seen


def test_sixteen_loads_at_once(package: Path) -> None:
    def work(_: int) -> tuple[int, ...]:
        with prt.load(package, threads=1) as plm:
            options = {"max_new_tokens": 8, "ignore_eos": True}
            return plm.generate("a", images=[picture(0)], **options).tokens

    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(work, range(16)))
    assert len(set(answers)) == 1 and len(answers[0]) == 8


def test_processes_share_one_package(packages: Callable[[str], Path]) -> None:
    code = (
        "import sys, perception_rt as prt\n"
        "plm = prt.load(sys.argv[1], threads=1)\n"
        "print(plm.generate('a', max_new_tokens=20).tokens)\n"
    )
    package = packages("onnxruntime")
    with prt.load(package, threads=1) as plm:
        expected = f"{plm.generate('a', max_new_tokens=20).tokens}\n"
    with ThreadPoolExecutor(4) as pool:
        for child in pool.map(lambda _: run_child(code, package), range(4)):
            assert_clean(child, expected)


@pytest.mark.parametrize("delay_s", [0.0, 0.5])
def test_a_killed_export_leaves_nothing_visible(delay_s: float, tmp_path: Path) -> None:
    """EXP-01: absent or valid after SIGKILL, and the next run cleans up."""
    dest = tmp_path / "package"
    code = "import sys, pathlib, soak; soak.export_onnx(pathlib.Path(sys.argv[1]))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    code = f"import sys; sys.path[:0] = {paths}; {code}"
    child = subprocess.Popen([sys.executable, "-c", code, str(dest)], stderr=subprocess.DEVNULL)
    assert eventually(lambda: any(tmp_path.iterdir()), timeout_s=60)  # the stage
    time.sleep(delay_s)
    child.send_signal(signal.SIGKILL)
    child.wait()
    if dest.exists():
        prt.load(dest).close()
    else:
        with pytest.raises(PackageError):
            prt.load(dest)
    Stage.create(dest, force=True).discard()
    assert [path.name for path in tmp_path.iterdir() if path != dest] == []


# Closing.


@pytest.mark.parametrize(("engine", "cycles"), [("reference", 500), ("onnxruntime", 30)])
def test_loading_and_closing_leaves_nothing(
    engine: str, cycles: int, packages: Callable[[str], Path]
) -> None:
    """CON-04: closing frees everything, whatever was in use."""
    package = packages(engine)

    def cycle(index: int) -> None:
        held = descriptors()
        plm = load(package)
        handle = plm.submit(Request("a", max_new_tokens=LONG))
        pieces = iter(handle)
        next(pieces)
        if index % 2:
            plm.generate("b", images=[picture(0)], max_new_tokens=2)
        if index % 3 == 0:
            with suppress(ZeroDivisionError):
                plm.generate("a", on_progress=lambda progress: 1 / 0)
        assert descriptors() > held
        plm.close()
        assert descriptors() == held
        assert handle.done
        with suppress(BackendError):  # a quick engine may have finished before
            list(pieces)

    for index in range(10):
        cycle(index)
    gc.collect()
    held, running, before, requests = descriptors(), threads(), resident_bytes(), live_requests()
    for index in range(cycles):
        cycle(index)
    assert live_requests() <= requests
    assert descriptors() <= held
    assert eventually(lambda: threads() <= running)
    assert resident_bytes() - before < 20 * MIB


def test_closing_under_eight_runs(package: Path) -> None:
    """CON-04 and CON-05: each caller gets its answer or an error; none waits for ever."""
    rng = np.random.default_rng(0)
    with load(package, cache=False) as plm:
        whole = plm.generate("a", max_new_tokens=40).tokens
    for _ in range(5):
        plm = load(package, cache=False, max_batch=4)
        ended: list[str] = []

        def ask(plm: Generator = plm, ended: list[str] = ended) -> None:
            try:
                for _ in range(1000):
                    assert plm.generate("a", max_new_tokens=40).tokens == whole
            except BackendError as error:
                ended.append(str(error))

        def close(plm: Generator = plm, delay_s: float = rng.uniform(0, 0.1)) -> None:
            time.sleep(delay_s)
            plm.close()

        run_threads([*[ask] * 8, close, close])
        assert len(ended) == 8
        assert set(ended) <= {"the generator was closed", "this generator is closed"}
        assert_idle(plm)


def test_closing_does_not_pull_memory_from_under_a_run(
    packages: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CON-05: `close` waits for the current engine call."""
    plm = load(packages("onnxruntime"))
    at_work, go_on = threading.Event(), threading.Event()
    engine = parts(plm).engine
    forward = engine.forward

    def slow(*arguments):
        at_work.set()
        assert go_on.wait(10)
        return forward(*arguments)

    monkeypatch.setattr(engine, "forward", slow)
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(plm.generate, "a", max_new_tokens=9)
        assert at_work.wait(10)
        closing = pool.submit(plm.close)
        time.sleep(0.05)
        assert not closing.done() and not engine.closed
        go_on.set()
        closing.result(10)
        with pytest.raises(BackendError, match="was closed"):
            run.result(10)
    assert engine.closed
    assert_idle(plm)


# Leaving without closing.

LEAVES = {
    "with a stream that is half read": (
        "s = plm.stream('a', max_new_tokens=700, ignore_eos=True); next(s)"
    ),
    "with a request that waits": "h = plm.submit(Request('a', ignore_eos=True))",
    "in a cycle": (
        "class C: pass\nc = C(); c.c = c; c.s = plm.stream('a', ignore_eos=True); next(c.s)"
    ),
    "with a thread at work": (
        "options = {'max_new_tokens': 200, 'ignore_eos': True}\n"
        "t = threading.Thread(target=plm.generate, args=['a'], kwargs=options)\n"
        "t.start()"
    ),
    "with a daemon at work": (
        "def work():\n"
        "    while True: plm.generate('a', max_new_tokens=50, ignore_eos=True)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(0.1)"
    ),
    "with a daemon that waits": (
        "h = plm.submit(Request('a', max_new_tokens=700, ignore_eos=True))\n"
        "for _ in range(3): threading.Thread(target=h.result, daemon=True).start()\n"
        "time.sleep(0.05)"
    ),
    "closing at the last moment": "import atexit; atexit.register(plm.close)",
    "from a callback": "plm.generate('a', on_progress=lambda p: sys.exit(0))",
}


def test_the_interpreter_may_exit_at_any_time(package: Path) -> None:
    """CON-05: exit code 0 and no output."""
    start = """
import sys, threading, time
import perception_rt as prt
from perception_rt.runtime.request import Request
plm = prt.load(sys.argv[1], threads=1)
plm.generate("a", max_new_tokens=2, ignore_eos=True)
print("done", flush=True)
"""
    with ThreadPoolExecutor(4) as pool:
        children = list(pool.map(lambda leave: run_child(start + leave, package), LEAVES.values()))
    ends = [(child.returncode, child.stdout, child.stderr) for child in children]
    assert dict(zip(LEAVES, ends, strict=True)) == dict.fromkeys(LEAVES, (0, "done\n", ""))


FORK = """
import os, sys, threading, time
import perception_rt as prt
from perception_rt.errors import BackendError
plm = prt.load(sys.argv[1], threads=1)
stop = False
def work():
    while not stop: plm.generate("b", max_new_tokens=30, ignore_eos=True)
thread = threading.Thread(target=work)
thread.start()
expected = plm.generate("a", max_new_tokens=30, ignore_eos=True).tokens
for _ in range(20):
    stream = plm.stream("a", max_new_tokens=500, ignore_eos=True)
    next(stream)
    pid = os.fork()
    if pid == 0:
        for use in (lambda: plm.generate("a"), lambda: next(stream), plm.close):
            try: use()
            except BackendError as error: assert "another process" in str(error)
            else: raise SystemExit(3)
        del stream
        sys.stdout.flush()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    del stream
    assert plm.generate("a", max_new_tokens=30, ignore_eos=True).tokens == expected
stop = True
thread.join()
assert plm.stats.running == 0
print("done")
"""


def test_a_fork_is_told_so_even_while_a_thread_is_at_work(package: Path) -> None:
    """CON-05: locks that the worker thread holds stay locked in the child."""
    assert_clean(run_child(FORK, package), "done\n")


SPAWN = """
import multiprocessing, sys
import perception_rt as prt

def answer(path):
    with prt.load(path, threads=1) as plm:
        return plm.generate("a", max_new_tokens=20).tokens

if __name__ == "__main__":
    expected = answer(sys.argv[1])
    with prt.load(sys.argv[1], threads=1) as plm:
        stream = plm.stream("a", max_new_tokens=20)
        next(stream)
        with multiprocessing.get_context("spawn").Pool(2) as pool:
            assert pool.map(answer, [sys.argv[1]] * 2) == [expected] * 2
        assert plm.generate("a", max_new_tokens=20).tokens == expected
    print("done")
"""


def test_spawned_processes_load_their_own(package: Path, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SPAWN)
    command = [sys.executable, str(script), str(package)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert_clean(child, "done\n")


# Abandoned requests.


def abandon_closed(plm: Generator) -> None:
    stream = plm.stream("a", max_new_tokens=LONG)
    next(stream)
    stream.close()


def abandon_dropped(plm: Generator) -> None:
    next(plm.stream("a", max_new_tokens=LONG))


def abandon_unread(plm: Generator) -> None:
    plm.stream("a", max_new_tokens=LONG)


def abandon_cycle(plm: Generator) -> None:
    holder: list = [plm.stream("a", max_new_tokens=LONG)]
    holder.append(holder)
    next(holder[0])


def abandon_callback(plm: Generator) -> None:
    """The request's `on_progress` refers to its handle."""
    handles: list[Handle] = []
    handles.append(plm.submit(Request("a", max_new_tokens=5, on_progress=lambda _: len(handles))))
    handles[0].result()


def abandon_cancelled(plm: Generator) -> None:
    """The same for a cancelled request whose result is never read."""
    handles: list[Handle] = []
    request = Request("a", max_new_tokens=LONG, on_progress=lambda _: len(handles))
    handles.append(plm.submit(request))
    handles[0].cancel()


def abandon_failed(plm: Generator) -> None:
    """The consumer's error refers to the frame that holds the stream."""
    with suppress(ZeroDivisionError):
        for piece in plm.stream("a", max_new_tokens=LONG):
            len(piece) / 0


def abandon_error(plm: Generator) -> None:
    """The request's error refers to the frame that holds the handle."""
    handle = plm.submit(Request("a", on_progress=lambda _: 1 / 0))
    with suppress(ZeroDivisionError):
        handle.result()


ABANDONS = [
    abandon_closed,
    abandon_dropped,
    abandon_unread,
    abandon_cycle,
    abandon_callback,
    abandon_cancelled,
    abandon_failed,
    abandon_error,
]


@pytest.mark.parametrize("busy", [False, True], ids=["idle", "busy"])
def test_abandoned_requests_are_freed_within_a_second(busy: bool, reference: Path) -> None:
    """CON-05: both the row and the request, also while another thread works."""
    going_on = threading.Event()
    with load(reference) as plm, ThreadPoolExecutor(1) as pool:
        before = live_requests()
        going_on.set()
        other = pool.submit(keep_busy, plm, going_on) if busy else None
        try:
            for abandon in ABANDONS:
                for _ in range(5):
                    abandon(plm)
                gc.collect()
                freed = eventually(lambda: plm.stats.running <= busy, timeout_s=1)
                assert freed, abandon.__name__
        finally:
            going_on.clear()
        if other is not None:
            other.result(10)
        assert eventually(lambda: not parts(plm).scheduler.requests, timeout_s=1)
        assert_idle(plm)
        assert live_requests() == before


def keep_busy(plm: Generator, going_on: threading.Event) -> None:
    while going_on.is_set():
        plm.generate("b", max_new_tokens=20)
