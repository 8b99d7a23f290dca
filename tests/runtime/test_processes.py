"""Engines in forked children and at interpreter exit, and engines that are pickled or copied."""

import copy
import json
import pickle
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from soak import onnx_package

import perception_rt as prt
from perception_rt.errors import BackendError

TRIES = Path(__file__).with_name("fork_tries.py")
ACTIONS = ("close", "free", "leave", "use", "load")


@pytest.fixture(params=["pe", "plm"])
def package(
    request: pytest.FixtureRequest, tiny_package: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return tiny_package if request.param == "pe" else onnx_package(tmp_path_factory)


def run_child(*arguments: object, timeout_s: float = 120) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout_s)


def fork(package: Path, tries: int, timeout_s: float) -> dict[str, dict[str, int]]:
    child = run_child(TRIES, package, tries, timeout_s=timeout_s)
    assert (child.returncode, child.stderr) == (0, "")
    return json.loads(child.stdout)


def test_forked_children_neither_hang_nor_use_their_parents_engine(package: Path) -> None:
    assert fork(package, 2, timeout_s=300) == {action: {"ended": 2} for action in ACTIONS}


@pytest.mark.slow
def test_none_of_a_hundred_forked_children_hangs(package: Path) -> None:
    assert fork(package, 100, timeout_s=3600) == {action: {"ended": 100} for action in ACTIONS}


FORK_AT_WORK = """
import os, sys, threading
import numpy as np
import perception_rt as prt
pe = prt.load(sys.argv[1], threads=2)
image = np.zeros((900, 900, 3), np.uint8)
pe.embed_images([image])
at_work = threading.Event()
def fork(*_):
    if os.fork() == 0:
        sys.exit(0)  # in the middle of a call, while threads decode
    assert os.wait()[1] == 0
print(pe.embed_images([image] * 6, batch_size=2, workers=2, on_progress=fork).shape)
"""


def test_a_fork_in_the_middle_of_a_call(tiny_package: Path) -> None:
    child = run_child("-c", FORK_AT_WORK, tiny_package)
    assert (child.returncode, child.stdout, child.stderr) == (0, "(6, 32)\n", "")


EXIT = """
import sys, threading, time
import numpy as np
import perception_rt as prt
pe = prt.load(sys.argv[1], threads=2)
images = [np.zeros((300, 300, 3), np.uint8)] * 8
pe.embed_images(images)
def work(use):
    while True: use()
"""
WORKS = {
    "images": "use = lambda: pe.embed_images(images, workers=2)",
    "batches": "use = lambda: pe.embed_images(images * 9, batch_size=1, workers=4)",
    "in this thread": "use = lambda: pe.embed_images(images, workers=1)",
    "texts": "use = lambda: pe.embed_texts(['a'] * 9)",
    "loading": "use = lambda: prt.load(sys.argv[1], threads=1).embed_texts(['a'])",
}
LEAVE = """
for _ in range(3): threading.Thread(target=work, args=[use], daemon=True).start()
time.sleep(float(sys.argv[2]))
"""


def test_daemons_at_work_let_the_interpreter_exit(tiny_package: Path) -> None:
    """Exit code 0 and no output, whatever the daemons are doing."""

    def leave(index: int) -> tuple[int, str, str]:
        code = EXIT + list(WORKS.values())[index] + LEAVE
        child = run_child("-c", code, tiny_package, 0.05 + 0.1 * (index % 3))
        return child.returncode, child.stdout, child.stderr

    with ThreadPoolExecutor(2) as pool:
        ends = list(pool.map(leave, range(len(WORKS))))
    assert dict(zip(WORKS, ends, strict=True)) == dict.fromkeys(WORKS, (0, "", ""))


def test_engines_are_neither_pickled_nor_copied(package: Path) -> None:
    with prt.load(package, threads=1) as engine:
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(BackendError, match="pass the package's path and call") as caught:
                attempt(engine)
            assert type(engine).__name__ in str(caught.value)
            assert isinstance(caught.value, TypeError)  # as other objects that cannot be pickled


def test_a_running_request_is_neither_pickled_nor_copied() -> None:
    with prt.load("demo:plm", threads=1) as plm:
        handle = plm.submit(prt.Request("Hello", max_new_tokens=2))
        for attempt in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(BackendError, match="a Handle cannot be pickled or copied"):
                attempt(handle)
        result = handle.result()
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
