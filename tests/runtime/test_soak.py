"""CON-01: thousands of requests, many of them cancelled, late or unusable, leave nothing behind.

Eight clients share a generator over the reference backend, with little memory and small caches. An
undisturbed request gets the same answer as when it runs alone.
"""

import itertools
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field, fields, replace
from pathlib import Path

import numpy as np
import pytest
from fake_plm import CONFIG, write_plm
from soak import (
    Case,
    Watch,
    assert_idle,
    descriptors,
    eventually,
    live_requests,
    make_cases,
    resident_bytes,
    run_threads,
    slope,
    threads,
)

import perception_rt as prt
from perception_rt.errors import InputError
from perception_rt.runtime.generation.handle import Handle
from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import GenerationProgress, Request

CLIENTS = 8
SAMPLES = 25
MIB = 2**20
pytestmark = pytest.mark.usefixtures("frozen_heap")
MOST_S = 0.2  # limit per request, on a busy machine

_TOKEN_BYTES = 2 * 2 * 2 * 4 * 4  # layers, keys and values, heads, channels, float32
_FEATURE_BYTES = 16 * 4  # of a tile: one token
LITTLE = {
    "kv_bytes": 2500 * _TOKEN_BYTES,
    "max_batch": 4,
    "feature_cache_bytes": 4 * _FEATURE_BYTES,
    "prefix_cache_bytes": 4000 * _TOKEN_BYTES,
}

# Fates of requests, in percent; 30 % are cancelled in some way.
SHARES = {
    "left alone": 56,
    "cancelled in queue": 4,
    "cancelled in vision": 2,
    "cancelled in prefill": 4,
    "cancelled in decode": 6,
    "cancelled at last token": 4,
    "cancelled after": 3,
    "stream closed": 4,
    "handle dropped": 3,
    "deadline": 5,
    "malformed": 5,
    "callback fails": 4,
}
WHOLE = ("left alone", "cancelled after")

MALFORMED: list[Callable[[Request], Request]] = [
    lambda request: replace(request, images=[b"no image"]),
    lambda request: replace(request, images=[np.zeros((1, 1, 3), np.float32)]),
    lambda request: replace(request, prompt="x" * 2000),
    lambda request: replace(request, prompt="<image>" * 9, images=request.images or ["none.png"]),
    lambda request: replace(request, top_k=0),
    lambda request: replace(request, temperature=float("nan")),
    lambda request: replace(request, stop=[""]),
    lambda request: replace(request, max_new_tokens=2**40),
    lambda request: replace(request, prompt=b"What?"),
]


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)


@pytest.fixture(scope="module")
def cases(package: Path) -> list[Case]:
    return make_cases(package, 60, seed=2, text=100, new=36)


class ClientError(Exception):
    """The error of a caller's own function."""


class CancelAt:
    """An `on_progress` that cancels its own request at a given phase and count."""

    def __init__(self, phase: str, done: int) -> None:
        self._wanted = (phase, done)
        self._due = False
        self._handle: Handle | None = None

    def __call__(self, progress: GenerationProgress) -> None:
        if (progress.phase, progress.done) == self._wanted:
            self._due = True
            self._cancel()

    def follow(self, handle: Handle) -> Handle:
        """Sets the handle; the point may have been reached before."""
        self._handle = handle
        self._cancel()
        return handle

    def _cancel(self) -> None:
        if self._due and self._handle is not None:
            self._handle.cancel()


@dataclass(frozen=True, kw_only=True)
class Entry:
    """Outcome of a request.

    Attributes:
        fate: one of `SHARES`.
        broken: whether it ended early.
        start: start time, in seconds.
        duration: duration, in seconds.
    """

    fate: str
    broken: bool
    start: float
    duration: float


@dataclass(frozen=True, kw_only=True)
class Sample:
    """Resources used after a number of requests: resident bytes, and CPU seconds."""

    requests: int
    memory: int
    work_s: float


@dataclass
class Soak:
    """Clients of one generator, and their records."""

    plm: Generator
    cases: list[Case]
    entries: list[Entry] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)

    def run(self, count: int, *, seed: int) -> None:
        """Serves `count` requests and checks each answer."""
        numbers = iter(range(count))
        lock = threading.Lock()

        def client(index: int) -> None:
            rng = np.random.default_rng([seed, index])
            while True:
                with lock:
                    number = next(numbers, None)
                if number is None:
                    return
                self._request(rng)
                if number % (count // SAMPLES) == 0:
                    sample = Sample(
                        requests=number, memory=resident_bytes(), work_s=time.process_time()
                    )
                    self.samples.append(sample)

        clients = [lambda index=index: client(index) for index in range(CLIENTS)]
        run_threads(clients, timeout_s=MOST_S * count)
        # A dropped request lasts until the next step.
        assert eventually(lambda: self.plm.stats.queued + self.plm.stats.running == 0)

    def _request(self, rng: np.random.Generator) -> None:
        case = self.cases[rng.integers(len(self.cases))]
        fate = str(rng.choice([*SHARES], p=np.array([*SHARES.values()]) / 100))
        start = time.monotonic()
        broken = self._serve(fate, case, rng)
        duration = time.monotonic() - start
        self.entries.append(Entry(fate=fate, broken=broken, start=start, duration=duration))

    def _serve(self, fate: str, case: Case, rng: np.random.Generator) -> bool:
        """Serves one request; returns whether it ended early."""
        if fate == "left alone":
            return self._left_alone(case, rng)
        if fate.startswith("cancelled"):
            return self._cancelled(case, fate.split()[-1], rng)
        if fate == "stream closed":
            return self._stream_closed(case, rng)
        if fate == "handle dropped":
            return self._dropped(case, rng)
        if fate == "deadline":
            request = replace(case.request, deadline_s=float(rng.uniform(0, 0.03)))
            return case.check_part(self.plm.submit(request).result())
        if fate == "malformed":
            change = MALFORMED[rng.integers(len(MALFORMED))]
            with pytest.raises(InputError):
                self.plm.submit(change(case.request))
            return True
        return self._callback_fails(case, rng)

    def _left_alone(self, case: Case, rng: np.random.Generator) -> bool:
        way = rng.integers(3)
        if way == 0:
            case.check(self.plm.submit(case.request).result())
        elif way == 1:
            assert "".join(self.plm.submit(case.request)) == case.answer.text
        else:
            (result,) = self.plm.generate_batch([case.request])
            case.check(result)
        return False

    def _cancelled(self, case: Case, when: str, rng: np.random.Generator) -> bool:
        answer = case.answer
        if when in ("queue", "after"):
            handle = self.plm.submit(case.request)
            if when == "after":
                case.check(handle.result())
        else:
            place = {
                "vision": ("vision", answer.timings.image_tiles),
                "prefill": ("prefill", answer.timings.prompt_tokens),
                "decode": ("decode", int(rng.integers(len(answer.tokens) + 1))),
                "token": ("decode", len(answer.tokens)),
            }[when]
            cancel = CancelAt(*place)
            handle = cancel.follow(self.plm.submit(replace(case.request, on_progress=cancel)))
            handle.result()
        handle.cancel()
        return case.check_part(handle.result())

    def _stream_closed(self, case: Case, rng: np.random.Generator) -> bool:
        arguments = {f.name: getattr(case.request, f.name) for f in fields(Request)}
        with closing(self.plm.stream(**arguments)) as stream:
            pieces = list(itertools.islice(stream, int(rng.integers(5))))
        assert case.answer.text.startswith("".join(pieces))
        return "".join(pieces) != case.answer.text

    def _dropped(self, case: Case, rng: np.random.Generator) -> bool:
        pieces = iter(self.plm.submit(case.request))
        for _ in range(int(rng.integers(4))):
            next(pieces, None)
        return True

    def _callback_fails(self, case: Case, rng: np.random.Generator) -> bool:
        last = int(rng.integers(10))
        calls = itertools.count()

        def fail(_: GenerationProgress) -> None:
            if next(calls) == last:
                raise ClientError

        handle = self.plm.submit(replace(case.request, on_progress=fail))
        try:
            case.check(handle.result())
        except ClientError:
            return True
        return False


def serve(package: Path, cases: list[Case], *, warm_up: int, count: int) -> Soak:
    """Serves requests and checks that nothing is left."""
    running, requests = threads(), live_requests()
    with Watch() as watch, prt.load(package, **LITTLE) as plm:
        held = descriptors()
        Soak(plm, cases).run(warm_up, seed=0)
        soak = Soak(plm, cases)
        soak.run(count, seed=1)
        assert_idle(plm)
        assert watch.left == 0 and live_requests() == requests
        # The kernel ends a thread a moment after Python does.
        assert eventually(lambda: threads() <= running)
        assert descriptors() == held
    # Otherwise there was too much memory, or clients were too reliable, to show anything.
    assert watch.most_queued >= 3 and watch.decoded[LITTLE["max_batch"]] > count / 4
    assert watch.moves > count / 50
    fates, broken = Counter(), Counter()
    for entry in soak.entries:
        fates[entry.fate] += 1
        broken[entry.fate] += entry.broken
    assert all(fates[fate] >= share * count / 200 for fate, share in SHARES.items())
    assert all(broken[fate] > 0 for fate in SHARES if fate not in WHOLE)
    assert not any(broken[fate] for fate in WHOLE)
    return soak


def check_pace(soak: Soak) -> None:
    """Checks that late requests take no longer and no more CPU time than early ones."""
    entries = sorted(soak.entries, key=lambda entry: entry.start)
    waits = [entry.duration for entry in entries if entry.fate == "left alone"]
    first, *_, last = (np.percentile(part, 99) for part in np.array_split(waits, 4))
    assert last <= 1.2 * first + 0.25  # other processes may come and go
    work = [sample.work_s for sample in sorted(soak.samples, key=lambda s: s.requests)]
    first, *_, last = (part.sum() for part in np.array_split(np.diff(work), 4))
    assert last <= 1.5 * first


def check_memory(soak: Soak, *, growth_mib: float, slope_mib: float) -> None:
    """Checks total growth of memory, and growth per thousand requests."""
    samples = sorted(soak.samples, key=lambda s: s.requests)
    memory = [sample.memory / MIB for sample in samples]
    assert max(memory) - memory[0] < growth_mib
    assert slope([sample.requests / 1000 for sample in samples], memory) < slope_mib


def test_a_thousand_requests(package: Path, cases: list[Case]) -> None:
    soak = serve(package, cases, warm_up=300, count=1000)
    check_pace(soak)
    check_memory(soak, growth_mib=16, slope_mib=8)


@pytest.mark.slow
def test_ten_thousand_requests(package: Path, cases: list[Case]) -> None:
    soak = serve(package, cases, warm_up=1000, count=10_000)
    check_pace(soak)
    check_memory(soak, growth_mib=50, slope_mib=1)
