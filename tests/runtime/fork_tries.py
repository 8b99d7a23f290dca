"""Forks children that inherit an engine, and counts those that hang.

`python tests/runtime/fork_tries.py PACKAGE [TRIES]` prints, as JSON and by what the children do,
how many ended well, ended otherwise, and did not end. During every other fork, a second thread of
the parent runs the engine, which has two threads itself. During the others they rest: then a child
that frees the engine would wait for them.
"""

import gc
import json
import os
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable

import numpy as np

import perception_rt as prt
from perception_rt.errors import BackendError

LIMIT_S = 30
REST_S = 0.2  # until the threads of an engine wait instead of spinning
IMAGE = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
Engine = prt.Embedder | prt.Generator


def run(engine: Engine) -> object:
    """Runs an engine once; returns what must repeat."""
    if isinstance(engine, prt.Embedder):
        return engine.embed_images([IMAGE]).tobytes()
    return engine.generate("a", images=[IMAGE], max_new_tokens=4, ignore_eos=True).tokens


def methods(engine: Engine) -> list[Callable[[], object]]:
    """Calls of all public methods that use the engine."""
    if isinstance(engine, prt.Embedder):
        return [
            lambda: engine.embed_images([IMAGE]),
            lambda: engine.embed_texts(["a"]),
            lambda: engine.embed_videos([IMAGE[None]]),
            lambda: engine.embed_labels(["a"]),
            lambda: engine.classify([IMAGE], ["a"]),
            lambda: engine.features([IMAGE]),
            lambda: engine.encode_pixels(np.zeros((1, 3, 32, 32), np.float32)),
            lambda: engine.encode_tokens(np.zeros((1, 16), np.int64)),
            engine.close,
        ]
    return [
        lambda: engine.generate("a"),
        lambda: engine.stream("a"),
        lambda: engine.submit(prt.Request("a")),
        lambda: engine.generate_batch([prt.Request("a")]),
        lambda: engine.score("a", "b"),
        lambda: engine.generate_tokens([1, 2], max_new_tokens=2),
        lambda: engine.prefill_logits([1, 2]),
        engine.close,
    ]


def close(engines: list[Engine]) -> None:
    """Closes the engine, which a child cannot, and ends without a clean-up."""
    try:
        engines[0].close()
    except BackendError:
        os._exit(0)
    os._exit(3)


def free(engines: list[Engine]) -> None:
    """Frees all references to the engine, and ends without a clean-up."""
    engines.clear()
    gc.collect()
    os._exit(0)


def leave(engines: list[Engine]) -> None:
    """Ends like a program, in a block that would close the engine."""
    with engines[0]:
        sys.exit(0)


def use(engines: list[Engine]) -> None:
    """Tries every method, then ends like a program."""
    for method in methods(engines[0]):
        try:
            method()
        except BackendError as error:
            text = str(error)
            if not all(word in text for word in ("another process", "Load", "'spawn'")):
                os._exit(4)
        else:
            os._exit(5)
    sys.exit(0)


def load(engines: list[Engine]) -> None:
    """Loads an engine of its own, uses it, closes it, and ends like a program."""
    with prt.load(sys.argv[1], threads=2) as own:
        sys.exit(0 if run(own) == expected else 6)


def ending(pid: int) -> str:
    """Waits for a child: "ended", "failed" with another status than 0, or "hung"."""
    limit = time.monotonic() + LIMIT_S
    while time.monotonic() < limit:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return "ended" if status == 0 else "failed"
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return "hung"


def work() -> None:
    """Runs the engine while the main thread forks, every other time."""
    while not done.is_set():
        if busy.wait(0.01):
            run(engine)


if __name__ == "__main__":
    tries = int(sys.argv[2]) if len(sys.argv) > 2 else 100
    engine = prt.load(sys.argv[1], threads=2)
    expected = run(engine)
    busy, done = threading.Event(), threading.Event()
    worker = threading.Thread(target=work)
    worker.start()
    endings: dict[str, Counter[str]] = {}
    for action in (close, free, leave, use, load):
        endings[action.__name__] = Counter()
        for index in range(tries):
            if index % 2:
                busy.set()
                time.sleep(0.01)
            else:
                busy.clear()
                time.sleep(REST_S)
            pid = os.fork()
            if pid == 0:
                engines = [engine]
                del engine
                action(engines)
            endings[action.__name__][ending(pid)] += 1
    done.set()
    worker.join()
    assert run(engine) == expected  # the parent's engine goes on
    print(json.dumps(endings))
