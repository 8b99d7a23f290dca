"""CON-05: SIGINT while requests run, in child processes."""

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plm import CONFIG, write_plm
from soak import onnx_package


@pytest.fixture
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)


@pytest.fixture(params=["reference", "onnxruntime"])
def package(
    request: pytest.FixtureRequest, reference: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return reference if request.param == "reference" else onnx_package(tmp_path_factory)


INTERRUPT = """
import signal, sys, threading, time
import perception_rt as prt
from perception_rt.runtime.generation.plm_engine import PlmEngine
from perception_rt.runtime.generation.scheduler import Scheduler
plm = prt.load(sys.argv[1], threads=1, cache=False)
options = {"max_new_tokens": 500, "ignore_eos": True}
short = {"max_new_tokens": 30, "ignore_eos": True}
expected = plm.generate("a", **short).tokens
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells disable it in the background
forward, step, schedulers = PlmEngine.forward, Scheduler.step, set()
calls, slow, go_on, engine = 0, 0, threading.Event(), None

def wait_for_signal(*arguments):
    global calls, engine
    calls += 1
    engine = arguments[0]
    if calls == slow:
        print("ready", flush=True)
        assert go_on.wait(60)
    return forward(*arguments)

def note_scheduler(scheduler):
    schedulers.add(scheduler)
    step(scheduler)

PlmEngine.forward, Scheduler.step = wait_for_signal, note_scheduler
uses = [
    lambda: plm.generate("a", **options),
    lambda: list(plm.stream("a", **options)),
    lambda: plm.generate_batch([prt.Request("a", **options)] * 3),
    lambda: plm.generate_tokens([1, 2, 3], max_new_tokens=500),
]

def close():
    while not calls: time.sleep(0.001)
    plm.close()

for use in [*uses, close]:
    for slow in (1, 4, 7):  # the other's prompt, one's own, a token of both
        calls = 0
        go_on.clear()
        other = plm.submit(prt.Request("b", max_new_tokens=5, ignore_eos=True))
        try: use()
        except KeyboardInterrupt: pass
        else: raise SystemExit("not interrupted")
        go_on.set()
        if use is close: break
        assert plm.generate("a", **short).tokens == expected
        assert len(other.result().tokens) == 5
        (scheduler,) = schedulers
        scheduler.invariants()
        assert plm.stats.running == 0, plm.stats
plm.close()  # again: it was interrupted
assert engine.closed and plm.stats.running == 0 and other.done
print("done", flush=True)
"""


INTERRUPT_A_THREAD_S_COMPANY = """
import signal, sys, threading, time
import perception_rt as prt
from perception_rt.runtime.generation.plm_engine import PlmEngine
plm = prt.load(sys.argv[1], threads=1, cache=False)
options = {"max_new_tokens": 30, "ignore_eos": True}
expected = plm.generate("b", **options).tokens
signal.signal(signal.SIGINT, signal.default_int_handler)
forward, started, answers = PlmEngine.forward, None, []

def wait_for_another(*arguments):
    if not started.is_set():
        started.set()
        while plm.stats.queued + plm.stats.running < 2: time.sleep(0.001)
        time.sleep(0.1)
        print("ready", flush=True)
        time.sleep(0.3)
    return forward(*arguments)

PlmEngine.forward = wait_for_another
for _ in range(3):
    started = threading.Event()
    other = threading.Thread(target=lambda: answers.append(plm.generate("b", **options)))
    other.start()
    started.wait()
    try: plm.generate("a", max_new_tokens=500, ignore_eos=True)
    except KeyboardInterrupt: pass
    else: raise SystemExit("not interrupted")
    other.join()
    assert answers.pop().tokens == expected
    assert plm.generate("b", **options).tokens == expected
    assert plm.stats.running == 0
print("done", flush=True)
"""


@pytest.mark.parametrize(
    ("code", "times"),
    [(INTERRUPT, 13), (INTERRUPT_A_THREAD_S_COMPANY, 3)],
    ids=["alone", "in company"],
)
def test_an_interrupt_ends_the_call_and_nothing_else(code: str, times: int, package: Path) -> None:
    """An interrupt as by Ctrl-C during an engine call; the caller does not wait for the call."""
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


INTERRUPT_ANYWHERE = """
import faulthandler, random, signal, sys, threading, time
import perception_rt as prt
from perception_rt.runtime.generation.scheduler import Scheduler
plm = prt.load(sys.argv[1], cache=False)
options = {"max_new_tokens": 6, "ignore_eos": True}
step, schedulers = Scheduler.step, set()

def note_scheduler(scheduler):
    schedulers.add(scheduler)
    step(scheduler)

Scheduler.step = note_scheduler
expected = plm.generate("a", **options).tokens
(scheduler,) = schedulers
armed, going_on, hits, errors = False, True, 0, []

def interrupt(*_):
    if armed: raise KeyboardInterrupt

def ask():
    while going_on:
        try: assert plm.generate("a", **options).tokens == expected
        except BaseException as error: return errors.append(repr(error))

signal.signal(signal.SIGALRM, interrupt)
random.seed(0)
other = threading.Thread(target=ask, daemon=True)
other.start()
end = time.monotonic() + 4
while time.monotonic() < end and not errors:
    faulthandler.dump_traceback_later(5, exit=True)  # it hangs
    try:
        armed = True
        signal.setitimer(signal.ITIMER_REAL, random.uniform(1e-4, 7e-3))
        if random.random() < 0.5: plm.generate("a", **options)
        else: list(plm.stream("a", **options))
        armed = False
    except KeyboardInterrupt: hits += 1
    finally:
        armed = False
        signal.setitimer(signal.ITIMER_REAL, 0)
    assert plm.generate("a", **options).tokens == expected
going_on = False
other.join(5)
assert not other.is_alive() and not errors, errors
deadline = time.monotonic() + 1
while scheduler.requests and time.monotonic() < deadline: time.sleep(0.01)
scheduler.invariants()
assert scheduler.requests == [] and plm.stats.running == 0
assert hits > 50, hits
print("done")
"""


def test_interrupts_at_any_instruction(reference: Path) -> None:
    """CON-05: no interrupt leaves a lock held, a row in use, or an error in another thread."""
    command = [sys.executable, "-c", INTERRUPT_ANYWHERE, str(reference)]
    child = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (child.returncode, child.stdout, child.stderr) == (0, "done\n", "")
