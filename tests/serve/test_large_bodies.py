"""Bodies of 100 MB: the client sends all of it and sees why it is refused; others are served."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPResponse
from pathlib import Path

import httpx
import psutil
import pytest
from server_process import metric, running
from server_thread import connect, post_head

SIZE = 100_000_000
PART = b" " * 1_000_000
MIB = 1024 * 1024
HEADERS = {"Authorization": "Bearer first-secret"}
TEXT = {"model": "PE-Demo", "input": "a red three"}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, psutil.Process]]:
    keys: Path = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("first-secret\n")
    arguments = ("--max-body-mb", "1", "--threads", "1", "--api-key-file", str(keys))
    with running("demo:pe", *arguments) as (base, process):
        httpx.post(f"{base}/v1/embeddings", json=TEXT, headers=HEADERS, timeout=60)
        yield base, psutil.Process(process.pid)


def send(connection: socket.socket, *, chunked: bool) -> HTTPResponse:
    """Sends the whole body, and only then reads."""
    for _ in range(SIZE // len(PART)):
        connection.sendall(b"%x\r\n%b\r\n" % (len(PART), PART) if chunked else PART)
    if chunked:
        connection.sendall(b"0\r\n\r\n")
    response = HTTPResponse(connection, method="POST")
    response.begin()
    return response


@contextmanager
def watched(base: str, server: psutil.Process) -> Iterator[dict[str, int]]:
    """Counts the answers of another client, and notes the largest growth of the server."""
    seen = {"answers": 0, "grown": 0}
    before, ended = server.memory_info().rss, threading.Event()

    def ask() -> None:
        with httpx.Client(headers=HEADERS, timeout=60) as http:
            while not ended.is_set():
                assert http.post(f"{base}/v1/embeddings", json=TEXT).status_code == 200
                seen["answers"] += 1

    def measure() -> None:
        while not ended.is_set():
            seen["grown"] = max(seen["grown"], server.memory_info().rss - before)
            time.sleep(0.005)

    threads = [threading.Thread(target=target) for target in (ask, measure)]
    for thread in threads:
        thread.start()
    try:
        yield seen
    finally:
        ended.set()
        for thread in threads:
            thread.join()


@pytest.mark.parametrize("chunked", [False, True], ids=["length", "chunked"])
@pytest.mark.parametrize("last", [False, True], ids=["keep-alive", "close"])
@pytest.mark.parametrize(
    ("key", "status", "code"),
    [("first-secret", 413, "request_too_large"), ("wrong-secret", 401, "invalid_api_key")],
    ids=["413", "401"],
)
def test_refused_bodies_of_100_mb(
    server: tuple[str, psutil.Process],
    chunked: bool, last: bool, key: str, status: int, code: str,
) -> None:  # fmt: skip
    base, process = server
    before = metric(base, "perception_rt_errors_total", HEADERS, code=code)
    length = "Transfer-Encoding: chunked" if chunked else f"Content-Length: {SIZE}"
    closing = ("Connection: close",) if last else ()
    head = post_head("/v1/embeddings", length, f"Authorization: Bearer {key}", *closing)
    with watched(base, process) as seen, connect(base, head) as connection:
        response = send(connection, chunked=chunked)
        assert response.status == status
        assert code.encode() in response.read()
        if not last:  # the connection is good for another request
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            again = HTTPResponse(connection)
            again.begin()
            assert (again.status, again.read()) == (200, b'{"status":"ok"}')
    assert metric(base, "perception_rt_errors_total", HEADERS, code=code) == before + 1
    print(f"{seen['answers']} other answers, {seen['grown'] / MIB:.2f} MiB")
    assert seen["answers"] > 0
    assert seen["grown"] < 8 * MIB


def test_a_client_that_asks_first_need_not_send(server: tuple[str, psutil.Process]) -> None:
    """`Expect: 100-continue`, as curl sends it."""
    expect = (f"Content-Length: {SIZE}", "Expect: 100-continue")
    head = post_head("/v1/embeddings", *expect, "Authorization: Bearer first-secret")
    with connect(server[0], head) as connection:
        response = HTTPResponse(connection, method="POST")
        response.begin()
        assert response.status == 413
