"""CON-06: clients of a server, some of which disconnect."""

import asyncio
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from fake_plm import CONFIG, write_plm
from soak import assert_idle, live_requests, load

from perception_rt.runtime.generator import Generator
from perception_rt.runtime.request import Request

LONG = 400  # length of an answer that is abandoned
pytestmark = pytest.mark.usefixtures("frozen_heap")


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = replace(CONFIG, decoder=replace(CONFIG.decoder, max_seqlen=1024))
    return write_plm(tmp_path_factory.mktemp("plm") / "plm", config=config)


async def handle_request(plm: Generator, index: int, max_new_tokens: int) -> str:
    """Serves one client; cancelled when the client disconnects."""
    handle = plm.submit(Request(f"Question {index % 7}", max_new_tokens=max_new_tokens))
    try:
        return (await asyncio.to_thread(handle.result)).text
    finally:
        handle.cancel()


async def serve(plm: Generator) -> list[str | BaseException]:
    """A hundred clients; every tenth asks for a long answer and disconnects."""
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(100))
    tasks = [
        asyncio.create_task(handle_request(plm, index, 20 if index % 10 else LONG))
        for index in range(100)
    ]
    await asyncio.sleep(0)  # they submit
    for task in tasks[::10]:
        await asyncio.sleep(0.003)
        task.cancel()
    return await asyncio.gather(*tasks, return_exceptions=True)


def test_a_hundred_clients_of_whom_ten_disconnect(reference: Path) -> None:
    """CON-06: all memory is free at the end, and the work can be repeated."""
    requests = live_requests()
    with load(reference, max_batch=4) as plm:
        expected = [plm.generate(f"Question {i}", max_new_tokens=20).text for i in range(7)]
        for _ in range(2):
            answers = asyncio.run(serve(plm))
            assert_idle(plm)
            assert any(isinstance(answer, asyncio.CancelledError) for answer in answers[::10])
            stayed = [index for index in range(100) if index % 10]
            assert [answers[i] for i in stayed] == [expected[i % 7] for i in stayed]
        del answers
        assert live_requests() == requests


def test_a_hundred_threads_of_a_server(reference: Path) -> None:
    """CON-06 with blocking calls: a cancelled one runs to its end in its thread."""

    async def calls(plm: Generator) -> list:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(100))
        tasks = [
            asyncio.create_task(asyncio.to_thread(plm.generate, f"{i % 7}", max_new_tokens=20))
            for i in range(100)
        ]
        await asyncio.sleep(0.01)
        for task in tasks[::10]:
            task.cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    with load(reference, max_batch=4) as plm:
        expected = [plm.generate(f"{i}", max_new_tokens=20).tokens for i in range(7)]
        for _ in range(2):
            results = asyncio.run(calls(plm))  # ends with its threads
            assert_idle(plm)
            answers = [r.tokens for i, r in enumerate(results) if i % 10]
            assert answers == [expected[i % 7] for i in range(100) if i % 10]
