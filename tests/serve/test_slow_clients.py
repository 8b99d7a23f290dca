"""Clients that send or read too slowly: each is refused within a time, counted, and frees all."""

import json
import socket
import time
from collections.abc import Callable, Iterator

import httpx
import pytest
from server_process import question, total, until
from server_thread import connect, post_head, read_all, serving

from perception_rt.serve import body, guard, protocol
from perception_rt.serve.service import Service

Errors = Callable[[str], float]

HEAD = b"GET /health HTTP/1.1\r\nHost: localhost\r\n"
TEXT = {"model": "PE-Demo", "input": "a red three"}


@pytest.fixture(scope="module")
def server() -> Iterator[tuple[str, Service]]:
    with serving("demo:pe", "demo:plm", max_requests=1) as made:
        yield made


@pytest.fixture
def url(server: tuple[str, Service]) -> str:
    return server[0]


@pytest.fixture
def errors(server: tuple[str, Service]) -> Errors:
    """Counts errors by reason, without a request that the short times could end as well."""
    metrics = server[1].metrics
    return lambda code: total(metrics.text().decode(), "perception_rt_errors_total", code=code)


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(protocol, "HEADER_S", 0.8)
    monkeypatch.setattr(protocol, "UNREAD_S", 0.8)
    monkeypatch.setattr(body, "IDLE_S", 0.8)
    monkeypatch.setattr(guard, "LINGER_S", 0.8)


def drip(connection: socket.socket, data: bytes) -> None:
    """Sends a byte every 50 ms until the server ends the connection; fails if it takes them all."""
    try:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.05)
    except OSError:
        return
    pytest.fail("every byte was taken")


def test_a_header_that_never_completes(url: str, errors: Errors) -> None:
    before = errors("header_timeout")
    with connect(url, HEAD) as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    assert errors("header_timeout") == before + 1


def test_a_header_that_drips(url: str, errors: Errors) -> None:
    before = errors("header_timeout")
    with connect(url) as connection:
        drip(connection, HEAD * 10)
    assert errors("header_timeout") == before + 1


def test_a_header_that_never_completes_after_an_answer(url: str, errors: Errors) -> None:
    before = errors("header_timeout")
    with connect(url, HEAD + b"\r\n") as connection:
        answer = bytearray()
        while not answer.endswith(b'"ok"}'):
            answer += connection.recv(4096)
        time.sleep(1.2)  # an idle connection is kept for longer
        connection.sendall(HEAD)
        assert b" 408 " in read_all(connection)
    assert errors("header_timeout") == before + 1


def test_unused_connections_end_and_are_no_error(url: str, errors: Errors) -> None:
    before = errors("header_timeout")
    with connect(url) as connection:
        assert read_all(connection) == b""
    assert errors("header_timeout") == before


@pytest.mark.parametrize("kind", ["Content-Length: 1000", "Transfer-Encoding: chunked"])
def test_a_body_that_never_completes_frees_its_place(
    url: str, errors: Errors, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(protocol, "HEADER_S", 30)
    monkeypatch.setattr(body, "IDLE_S", 2)
    before = errors("body_timeout")
    with connect(url, post_head("/v1/embeddings", kind)) as connection:
        until(lambda: httpx.post(f"{url}/v1/embeddings", json=TEXT).status_code == 429)
        until(lambda: httpx.post(f"{url}/v1/embeddings", json=TEXT).status_code == 200)
        assert connection.recv(4096).startswith(b"HTTP/1.1 408 ")
    assert errors("body_timeout") == before + 1


def test_a_body_that_drips(url: str, errors: Errors) -> None:
    """Each byte comes in time, but the whole body would take 50 seconds."""
    before = errors("body_timeout")
    with connect(url, post_head("/v1/embeddings", "Content-Length: 1000")) as connection:
        drip(connection, b" " * 1000)
        assert read_all(connection).startswith(b"HTTP/1.1 408 ")
    assert errors("body_timeout") == before + 1


def test_a_slow_body_of_the_least_rate_is_taken(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(body, "LEAST_RATE", 10)
    data = json.dumps(TEXT).encode()
    head = post_head("/v1/embeddings", f"Content-Length: {len(data)}")
    with connect(url, head) as connection:
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(0.02)
        assert connection.recv(4096).startswith(b"HTTP/1.1 200 ")


def test_an_answer_that_is_not_read(url: str, errors: Errors) -> None:
    before = errors("answer_timeout")
    data = json.dumps(TEXT | {"input": ["a"] * 2048}).encode()
    head = post_head("/v1/embeddings", f"Content-Length: {len(data)}")
    with connect(url, head + data) as connection:
        until(lambda: errors("answer_timeout") == before + 1)
        assert 0 < len(read_all(connection)) < 1_000_000


def test_an_answer_that_is_read_slowly(url: str, errors: Errors) -> None:
    before = errors("answer_timeout")
    data = json.dumps(TEXT | {"input": ["a"] * 64}).encode()
    head = post_head("/v1/embeddings", f"Content-Length: {len(data)}", "Connection: close")
    answer = bytearray()
    with connect(url, head + data) as connection:
        while part := connection.recv(2048):
            answer += part
            time.sleep(0.02)
    found = json.loads(answer.partition(b"\r\n\r\n")[2])
    assert len(found["data"]) == 64
    assert errors("answer_timeout") == before


def test_events_that_are_not_read_free_the_engine(
    server: tuple[str, Service], errors: Errors
) -> None:
    url, metrics = server[0], server[1].metrics
    before = errors("answer_timeout")
    long = {"ignore_eos": True, "max_tokens": 900, "stream": True}
    messages = question("Where is the 5?", "locate")
    data = json.dumps({"model": "PLM-Demo", "messages": messages, **long}).encode()
    head = post_head("/v1/chat/completions", f"Content-Length: {len(data)}")
    with connect(url, head + data):
        until(lambda: errors("answer_timeout") == before + 1)
        until(lambda: total(metrics.text().decode(), "perception_rt_running_requests") == 0)
    assert httpx.post(f"{url}/v1/embeddings", json=TEXT).status_code == 200


def test_garbage_is_counted(url: str, errors: Errors) -> None:
    before = errors("invalid_http")
    with connect(url, b"\x00\x01garbage\r\n\r\n") as connection:
        assert read_all(connection).startswith(b"HTTP/1.1 400 ")
    assert errors("invalid_http") == before + 1
