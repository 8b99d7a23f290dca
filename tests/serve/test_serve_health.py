"""`/ready` and `Retry-After`: what they say of engines and of load."""

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from server_process import metric, question
from server_thread import serving

from perception_rt.errors import BackendError
from perception_rt.package.reader import read_manifest
from perception_rt.serve import guard, health
from perception_rt.serve.guard import Guard
from perception_rt.serve.health import FAILURES, Health
from perception_rt.serve.json_response import AsciiJson
from perception_rt.serve.service import Service

ANSWERS: dict[str, dict[str, Any]] = {
    "/v1/embeddings": {"model": "PE-Demo", "input": "a red three"},
    "/v1/chat/completions": {"model": "PLM-Demo", "messages": question("a", "read")},
}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with serving("demo:pe", "demo:plm", max_requests=1) as made:
        yield made


def fail(*_: object, **__: object) -> Any:
    raise BackendError("the device is gone")


def test_an_engine_that_fails_again_and_again(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr(health, "time", SimpleNamespace(monotonic=lambda: now))
    state = Health()

    def call(error: type[Exception] | None) -> None:
        try:
            with state.watch("a"):
                if error is not None:
                    raise error("no")
        except Exception:
            pass

    for _ in range(FAILURES - 1):
        call(BackendError)
    call(ValueError)  # says nothing of the engine
    assert state.failed == []
    call(BackendError)
    assert state.failed == ["a"]
    now = health.REST_S
    assert state.failed == []  # the next request may try
    call(BackendError)
    assert state.failed == ["a"]
    call(None)
    call(BackendError)
    assert state.failed == []


@pytest.mark.parametrize("path", ANSWERS)
def test_ready_is_503_while_an_engine_fails(
    server: tuple[str, Service], path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, service = server
    body = ANSWERS[path]

    def ask() -> int:
        return httpx.post(base + path, json=body, timeout=60).status_code

    def ready() -> tuple[int, Any]:
        answer = httpx.get(f"{base}/ready")
        return answer.status_code, answer.json()

    assert (ask(), ready()) == (200, (200, {"status": "ok"}))
    with monkeypatch.context() as broken:
        if path == "/v1/embeddings":
            broken.setattr(service.models.embedding("PE-Demo").texts, "embed", fail)
        else:
            broken.setattr("perception_rt.runtime.generation.handle.Handle.result", fail)
        before = metric(base, "perception_rt_errors_total", code="unavailable")
        for _ in range(FAILURES):
            assert ready() == (200, {"status": "ok"})
            assert ask() == 503
        assert ready() == (503, {"status": "failed", "models": [body["model"]]})
        assert httpx.get(f"{base}/health").status_code == 200
        assert metric(base, "perception_rt_errors_total", code="unavailable") == before + FAILURES
    assert (ask(), ready()) == (200, (200, {"status": "ok"}))


@pytest.mark.parametrize(
    ("seconds", "places", "expected"), [(0.1, 1, 1), (20, 1, 20), (20, 2, 10), (500, 1, 60)]
)
def test_retry_after_is_the_time_until_a_place_is_free(
    server: tuple[str, Service], seconds: float, places: int, expected: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """With `places` requests in progress, one ends every `seconds / places`."""
    now = 0.0
    monkeypatch.setattr(guard, "time", SimpleNamespace(monotonic=lambda: now))
    options = replace(server[1].options, max_requests=places)
    service: Any = SimpleNamespace(options=options, keys=(), metrics=server[1].metrics)

    async def run() -> httpx.Headers:
        entered, leave = asyncio.Semaphore(0), asyncio.Event()

        async def work(scope: Any, receive: Any, send: Any) -> None:
            entered.release()
            await leave.wait()
            await AsciiJson({})(scope, receive, send)

        transport = httpx.ASGITransport(Guard(work, service))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as http:

            async def fill() -> list[asyncio.Task[httpx.Response]]:
                tasks = [asyncio.create_task(http.post("/v1/classify")) for _ in range(places)]
                for _ in tasks:
                    await entered.acquire()
                return tasks

            nonlocal now
            first = await fill()
            now += seconds
            leave.set()
            await asyncio.gather(*first)
            leave.clear()
            second = await fill()
            refused = await http.post("/v1/classify")
            assert refused.status_code == 429
            leave.set()
            await asyncio.gather(*second)
            return refused.headers

    assert asyncio.run(run())["retry-after"] == str(expected)


def test_serve_takes_the_ids_of_its_packages() -> None:
    expect = {name: read_manifest(name).id for name in ("demo:pe", "demo:plm")}
    with serving(*expect, expect=expect) as (base, _):
        entries = httpx.get(f"{base}/v1/models").json()["data"]
    assert [entry["package"] for entry in entries] == list(expect.values())
