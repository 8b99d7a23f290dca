"""CON-05: SIGINT while requests are served, in processes of their own."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plm import CONFIG, write_plm
from soak import golden_package


@pytest.fixture(params=["reference", "onnxruntime"])
def package(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    if request.param == "onnxruntime":
        return golden_package(tmp_path_factory)
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)


INTERRUPT = """
import signal, sys, time
import perception_rt as prt
from perception_rt.runtime.request import Request
plm = prt.load(sys.argv[1], threads=1, cache=False)
plm._intake.tokenizer.end_ids = frozenset()
expected = plm.generate("a", max_new_tokens=30).tokens
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background has none
forward, calls, slow = plm._decoder.forward, 0, 0

def wait_for_signal(*arguments):
    global calls
    calls += 1
    if calls == slow:
        print("ready", flush=True)
        time.sleep(30)
    return forward(*arguments)

plm._decoder.forward = wait_for_signal
uses = [
    lambda: plm.generate("a", max_new_tokens=500),
    lambda: list(plm.stream("a", max_new_tokens=500)),
    lambda: plm.generate_batch([Request("a", max_new_tokens=500)] * 3),
    lambda: plm.generate_tokens([1, 2, 3], max_new_tokens=500),
]
for use in uses:
    for slow in (1, 4, 7):  # the other's prompt, one's own, a token of both
        calls, other = 0, plm.submit(Request("b", max_new_tokens=5))
        try: use()
        except KeyboardInterrupt: pass
        else: raise SystemExit("not interrupted")
        assert plm.generate("a", max_new_tokens=30).tokens == expected
        assert other.done and len(other.result().tokens) == 5
        plm._scheduler.invariants()
        assert plm._pool.used_rows == 0, plm._pool.used_rows
print("done", flush=True)
"""


INTERRUPT_A_WAIT = """
import signal, sys, threading, time
import perception_rt as prt
plm = prt.load(sys.argv[1], threads=1, cache=False)
plm._intake.tokenizer.end_ids = frozenset()
expected = plm.generate("b", max_new_tokens=30).tokens
signal.signal(signal.SIGINT, signal.default_int_handler)
forward, started, answers = plm._decoder.forward, None, []

def wait_for_another(*arguments):
    if not started.is_set():
        started.set()
        while len(plm._scheduler.jobs) < 2: time.sleep(0.001)
        time.sleep(0.1)
        print("ready", flush=True)
        time.sleep(0.3)
    return forward(*arguments)

plm._decoder.forward = wait_for_another
for _ in range(3):
    started = threading.Event()
    other = threading.Thread(target=lambda: answers.append(plm.generate("b", max_new_tokens=30)))
    other.start()
    started.wait()
    try: plm.generate("a", max_new_tokens=500)
    except KeyboardInterrupt: pass
    else: raise SystemExit("not interrupted")
    other.join()
    assert answers.pop().tokens == expected
    assert plm.generate("b", max_new_tokens=30).tokens == expected
    assert plm._pool.used_rows == 0
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("code", "times"), [(INTERRUPT, 12), (INTERRUPT_A_WAIT, 3)], ids=["at work", "waiting"]
)
def test_an_interrupt_ends_the_call_and_nothing_else(code: str, times: int, package: Path) -> None:
    """As Ctrl-C sends it, to who is at work and to who waits for another."""
    command = [sys.executable, "-c", code, str(package)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True) as child:
        lines = []
        for line in child.stdout:
            lines.append(line)
            if line == "ready\n":
                child.send_signal(signal.SIGINT)
        assert child.stderr.read() == ""
        assert child.wait(30) == 0
    assert lines == ["ready\n"] * times + ["done\n"]
