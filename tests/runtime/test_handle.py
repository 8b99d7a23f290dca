"""Callers wait while one thread works: dropped streams, closing, forks and errors."""

import asyncio
import gc
import os
import subprocess
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plm import CONFIG, write_plm
from soak import assert_idle, eventually, load, parts, threads

from perception_rt.errors import BackendError
from perception_rt.runtime.generation import worker
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request

PLM = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=4096))
pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=PLM)


@pytest.fixture
def plm(package: Path):
    # The reference's tokens are random: without `load` an end token would soon end an answer.
    with load(package, threads=None, cache=False) as plm:
        yield plm
        assert eventually(lambda: parts(plm).scheduler.requests == [])
        assert_idle(plm)


class Gate:
    """An `on_progress` that blocks the worker thread at its n-th call until `open`."""

    def __init__(self, call: int = 1) -> None:
        self._left = call
        self._reached = threading.Event()
        self._opened = threading.Event()

    def __call__(self, _: object) -> None:
        self._left -= 1
        if self._left == 0:
            self._reached.set()
            assert self._opened.wait(10)

    def reach(self) -> None:
        assert self._reached.wait(10)

    def open(self) -> None:
        self._opened.set()


def test_many_threads_get_what_one_gets(plm: Generator) -> None:
    """CON-02 in small: blocking, streaming and batches at once."""

    def ask(index: int) -> tuple[str, ...]:
        prompt, options = f"Question {index % 9}", {"max_new_tokens": 10 + index % 4}
        if index % 3 == 0:
            return ("".join(plm.stream(prompt, **options)),)
        if index % 3 == 1:
            return (plm.generate(prompt, **options).text,)
        results = plm.generate_batch([Request(prompt, **options), Request("x", **options)])
        return tuple(result.text for result in results)

    expected = [ask(index) for index in range(36)]
    with ThreadPoolExecutor(12) as pool:
        assert list(pool.map(ask, [*range(36)] * 3)) == expected * 3


def test_requests_advance_without_a_waiting_caller(plm: Generator) -> None:
    handles = [plm.submit(Request(f"{i}", max_new_tokens=12)) for i in range(4)]
    assert eventually(lambda: all(handle.done for handle in handles))
    last = handles[-1].result()
    assert "".join(handles[-1]) == last.text == "".join(handles[-1])
    assert handles[0].result() is not handles[0].result()


def test_a_handle_streams_and_has_a_result(plm: Generator) -> None:
    handle = plm.submit(Request("Tell me.", max_new_tokens=2000))
    pieces = [piece for piece, _ in zip(handle, range(5), strict=False)]
    assert not handle.done
    result = handle.result()
    assert result.text.startswith("".join(pieces)) and "".join(handle) == result.text


@pytest.mark.parametrize("call", [0, 1, 3, 7, 99])
def test_cancelling_twice_is_cancelling_once(plm: Generator, call: int) -> None:
    """GEN-04: in the queue, during the prompt, during the answer, and after the end."""
    gate = Gate(call)
    first = Gate()
    if call == 0:
        other = plm.submit(Request("b", max_new_tokens=1, on_progress=first))
        first.reach()
    handle = plm.submit(Request("a" * 300, max_new_tokens=8, on_progress=gate))
    if call == 99:
        handle.result()
    elif call > 0:
        gate.reach()
    assert handle.done == (call == 99)
    handle.cancel()
    handle.cancel()
    gate.open()
    first.open()
    assert handle.result().finish_reason == ("length" if call == 99 else "cancelled")
    if call == 0:
        assert other.result().finish_reason == "length" and handle.result().tokens == ()
    assert plm.stats.running == 0


def test_cancelled_during_the_last_step_it_is_freed_after_it(plm: Generator) -> None:
    other = plm.submit(Request("b", max_new_tokens=3000))

    def on_progress(progress) -> None:
        if progress.phase == "decode":
            other.cancel()

    last = plm.submit(Request("a", max_new_tokens=1, on_progress=on_progress))
    assert last.result().finish_reason == "length"
    assert other.result().finish_reason == "cancelled" and plm.stats.running == 0


def test_abandoned_requests_are_freed(plm: Generator) -> None:
    """CON-05: streams that are closed, dropped or never read; dropped handles."""

    def begun():
        stream = plm.stream("a", max_new_tokens=3000)
        next(stream)
        assert plm.stats.running == 1
        return stream

    begun().close()
    assert eventually(lambda: plm.stats.running == 0, timeout_s=0.3)
    stream = begun()
    del stream
    gc.collect()
    assert eventually(lambda: plm.stats.running == 0, timeout_s=0.3)
    plm.stream("a", max_new_tokens=3000).close()
    plm.stream("a", max_new_tokens=3000)
    plm.submit(Request("a", max_new_tokens=3000))
    gc.collect()
    assert eventually(lambda: parts(plm).scheduler.requests == [], timeout_s=0.3)
    for _ in begun():
        break
    gc.collect()
    assert eventually(lambda: plm.stats.running == 0, timeout_s=0.3)


def test_a_request_dropped_while_another_runs_is_freed(plm: Generator) -> None:
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(plm.generate, "b", max_new_tokens=2000)
        assert eventually(lambda: plm.stats.running == 1)
        for _ in range(5):
            stream = plm.stream("a", max_new_tokens=3000)
            next(stream)
            del stream
            assert eventually(lambda: len(parts(plm).scheduler.requests) <= 1)
        assert len(other.result().tokens) == 2000


def test_an_error_in_the_consumer_frees_the_row(plm: Generator) -> None:
    with pytest.raises(ZeroDivisionError):
        for piece in plm.stream("a", max_new_tokens=3000):
            len(piece) / 0
    gc.collect()
    assert eventually(lambda: plm.stats.running == 0, timeout_s=0.3)


def test_clients_that_go_away(plm: Generator) -> None:
    """CON-06: a hundred clients, every tenth of which disconnects."""
    expected = plm.generate("Hello", max_new_tokens=20).text

    async def client(index: int) -> str:
        handle = plm.submit(Request("Hello", max_new_tokens=20))
        if index % 10 == 0:
            await asyncio.sleep(0)
            handle.cancel()
        return (await asyncio.to_thread(handle.result)).text

    async def clients() -> list[str]:
        return await asyncio.gather(*(client(index) for index in range(100)))

    texts = asyncio.run(clients())
    assert all(expected.startswith(text) for text in texts)
    assert [texts[i] for i in range(100) if i % 10] == [expected] * 90


def test_closing_fails_what_is_under_way(package: Path) -> None:
    """CON-05: close during a run, close twice, and use after close."""
    plm = load(package, threads=None)
    done = plm.submit(Request("a", max_new_tokens=2))
    done.result()
    waiting = plm.submit(Request("a", max_new_tokens=3500))
    stream = plm.stream("a", max_new_tokens=3500)
    with ThreadPoolExecutor(4) as pool:
        runs = [pool.submit(plm.generate, "a", max_new_tokens=3500) for _ in range(3)]
        assert eventually(lambda: plm.stats.running == 5)
        plm.close()
        for run in runs:
            with pytest.raises(BackendError, match="was closed"):
                run.result()
    plm.close()
    with pytest.raises(BackendError, match="was closed"):
        waiting.result()
    with pytest.raises(BackendError, match="was closed"):
        list(stream)
    waiting.cancel()
    assert done.result().finish_reason == "length"
    for use in (
        lambda: plm.generate("a"),
        lambda: plm.stream("a"),
        lambda: plm.submit(Request("a")),
        lambda: plm.generate_batch([Request("a")]),
        lambda: plm.generate_tokens([1], max_new_tokens=1),
        lambda: plm.prefill_logits([1]),
    ):
        with pytest.raises(BackendError, match="this generator is closed"):
            use()
    assert plm.stats.running == 0


def test_a_callback_cannot_wait_for_its_own_generator(plm: Generator) -> None:
    uses = [lambda: plm.generate("b"), lambda: list(plm.stream("b")), plm.close]
    for use in uses:
        with pytest.raises(BackendError, match="on_progress cannot wait"):
            plm.generate("a", on_progress=lambda _, use=use: use())
    gate = Gate()
    handle = plm.submit(Request("a", on_progress=lambda _: (gate(_), handle.cancel())))
    gate.open()  # there is a handle now
    assert handle.result().finish_reason == "cancelled"
    assert plm.generate("a", max_new_tokens=2).finish_reason == "length"


def test_an_interrupt_from_a_callback_ends_its_request_and_the_others_go_on(plm: Generator) -> None:
    def interrupt(progress) -> None:
        if progress.phase == "decode" and progress.done == 3:
            raise KeyboardInterrupt

    other = plm.submit(Request("b", max_new_tokens=30))
    with pytest.raises(KeyboardInterrupt):
        plm.generate("a", on_progress=interrupt)
    assert other.result().text == plm.generate("b", max_new_tokens=30).text


def test_a_forked_child_gets_an_error(plm: Generator) -> None:
    handle = plm.submit(Request("a", max_new_tokens=5))
    child = os.fork()
    if child == 0:
        status = 1
        try:
            errors = 0
            for use in (
                lambda: plm.generate("a"),
                handle.result,
                plm.close,
                lambda: next(iter(handle)),
            ):
                try:
                    use()
                except BackendError as error:
                    errors += "another process" in str(error)
            handle.cancel()
            status = 0 if errors == 4 else 2
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert len(handle.result().tokens) == 5


def test_nothing_is_left_at_exit(package: Path) -> None:
    """CON-05: exit with a half-read answer leaves no thread and does not wait."""
    code = """
import sys
import perception_rt as prt
plm = prt.load(sys.argv[1])
stream = plm.stream("Tell me.", max_new_tokens=2000)
pieces = next(stream)
handle = plm.submit(prt.runtime.request.Request("a"))
print("done")
"""
    command = [sys.executable, "-c", code, str(package)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert (result.returncode, result.stdout, result.stderr) == (0, "done\n", "")


def test_a_generator_at_rest_has_no_thread_and_can_be_dropped(package: Path) -> None:
    running, gate = threads(), Gate()
    plm = load(package)
    handle = plm.submit(Request("a", max_new_tokens=5, on_progress=gate))
    gate.reach()
    assert threads() == running + 1
    gate.open()
    handle.result()
    assert eventually(lambda: threads() == running)
    thread = weakref.ref(parts(plm).thread)
    del plm, handle
    gc.collect()
    assert thread() is None


def test_an_internal_error_leaves_no_caller_waiting(
    plm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of a step that no request caused fails all requests, but not later ones."""
    step, count = parts(plm).scheduler.step, 0

    def fail() -> None:
        nonlocal count
        step()
        count += 1
        if count == 9:
            raise ZeroDivisionError

    monkeypatch.setattr(parts(plm).scheduler, "step", fail)
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(plm.generate, "a", max_new_tokens=3000) for _ in range(2)]
        assert eventually(lambda: len(parts(plm).scheduler.requests) == 2 or count > 8)
        for run in runs:
            try:
                run.result(10)
            except ZeroDivisionError:
                continue
            assert count > 8  # it was submitted after the other had failed
    assert_idle(plm)
    assert len(plm.generate("a", max_new_tokens=20).tokens) == 20


def test_a_failing_release_leaves_no_caller_waiting(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plm = load(package, threads=None)

    def fail(_: object) -> None:
        raise ZeroDivisionError

    stream = plm.stream("a", max_new_tokens=3000)
    next(stream)
    monkeypatch.setattr(parts(plm).pool, "release", fail)
    with pytest.raises(ZeroDivisionError):
        plm.generate("a", max_new_tokens=3)
    plm.close()
    with pytest.raises(ZeroDivisionError):
        list(stream)
    assert parts(plm).scheduler.requests == []


def test_without_another_thread_there_is_an_error(
    plm: Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When no thread can start, closing still works, also with requests that never began."""

    def fail(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(worker, "start_new_thread", fail)
    for use in (lambda: plm.generate("a"), lambda: plm.submit(Request("a"))):
        with pytest.raises(BackendError, match="no thread can be started"):
            use()
    assert len(parts(plm).scheduler.requests) == 2
    monkeypatch.undo()
    assert len(plm.generate("a", max_new_tokens=3).tokens) == 3
    assert_idle(plm)
    monkeypatch.setattr(worker, "start_new_thread", fail)
    with pytest.raises(BackendError, match="no thread can be started"):
        plm.stream("a")
    plm.close()


def test_an_exit_in_a_callback_reaches_no_neighbour(plm: Generator) -> None:
    """Also for a BaseException, such as the cancellation of a task."""

    def stop(_: object) -> None:
        raise asyncio.CancelledError

    first = plm.submit(Request("One?", max_new_tokens=8, on_progress=stop))
    second = plm.submit(Request("Two?", max_new_tokens=8))
    assert len(second.result().tokens) == 8
    with pytest.raises(asyncio.CancelledError):
        first.result()
