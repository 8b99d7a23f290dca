"""`--allow-media-host`: what is fetched, from which addresses, and what is refused and counted.

The address of the test's host is public for the fetcher, whose connections end at a server here.
"""

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import numpy as np
import pytest
from server_process import metric, picture, question
from server_thread import serving

import perception_rt as prt
from perception_rt.errors import InputError
from perception_rt.serve import fetch
from perception_rt.serve.fetch import MediaFetcher, UrlRefusedError

HOST = "media.example"
PUBLIC = "93.184.215.14"
URL = f"http://{HOST}/digit.png?size=1"


class MediaHost:
    """A server of one answer, and a fetcher that reaches it under a public address.

    Attributes:
        answer: bytes that each connection gets after its request.
        requests: what clients sent.
        looked_up: hosts that were looked up.
        connected: addresses and ports that were connected to.
    """

    def __init__(self, *addresses: str) -> None:
        self.answer: Callable[[socket.socket], None] = lambda _: None
        self.requests: list[bytes] = []
        self.looked_up: list[str] = []
        self.connected: list[tuple[str, int]] = []
        self._addresses = addresses or (PUBLIC,)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        self.fetcher = MediaFetcher([HOST], resolve=self._resolve, connect=self._connect)

    def send(self, data: bytes) -> None:
        self.answer = lambda connection: connection.sendall(data)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._thread.join()

    def _resolve(self, host: str, _: int) -> list[str]:
        """Another address each time, which is rebinding."""
        self.looked_up.append(host)
        return [self._addresses[min(len(self.looked_up), len(self._addresses)) - 1]]

    def _connect(self, address: str, port: int) -> socket.socket:
        self.connected.append((address, port))
        return socket.create_connection(self._listener.getsockname(), timeout=10)

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            with connection:
                self.requests.append(connection.recv(65536))
                with suppress(OSError):  # the client ended it
                    self.answer(connection)


@contextmanager
def media_host(*addresses: str) -> Iterator[MediaHost]:
    host = MediaHost(*addresses)
    try:
        yield host
    finally:
        host.close()


@pytest.fixture
def host() -> Iterator[MediaHost]:
    with media_host() as made:
        yield made


def ok(body: bytes, *headers: str) -> bytes:
    lines = ("HTTP/1.1 200 OK", *(headers or (f"Content-Length: {len(body)}",)), "", "")
    return "\r\n".join(lines).encode() + body


def test_a_file_of_an_allowed_host(host: MediaHost) -> None:
    for answer in (
        ok(b"some bytes"),
        ok(b"some bytes", "Connection: close"),
        ok(b"4\r\nsome\r\n6\r\n bytes\r\n0\r\n\r\n", "Transfer-Encoding: chunked"),
    ):
        host.send(answer)
        assert host.fetcher.fetch(URL, 10) == b"some bytes"
    assert host.connected == [(PUBLIC, 80)] * 3
    head = host.requests[0].split(b"\r\n")
    assert head[0] == b"GET /digit.png?size=1 HTTP/1.1"
    assert b"Host: media.example" in head


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (ok(b"some bytes!"), "has more than 10 bytes, which is the limit"),
        (ok(b"some bytes!", "Connection: close"), "has more than 10 bytes"),
        (ok(b"some", "Content-Length: 10"), "cannot be fetched: IncompleteRead"),
        (ok(b"4\r\nsome", "Transfer-Encoding: chunked"), "cannot be fetched: IncompleteRead"),
        (b"", "cannot be fetched: RemoteDisconnected"),
        (b"garbage\r\n", "cannot be fetched: BadStatusLine"),
        (b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n", "answered with status 404"),
    ],
)
def test_answers_that_cannot_be_used(host: MediaHost, answer: bytes, said: str) -> None:
    host.send(answer)
    with pytest.raises(InputError, match=said):
        host.fetcher.fetch(URL, 10)


@pytest.mark.parametrize("status", [301, 302, 307, 308])
def test_redirects_are_not_followed(host: MediaHost, status: int) -> None:
    place = f"http://{HOST}/other"
    host.send(f"HTTP/1.1 {status} Moved\r\nLocation: {place}\r\nContent-Length: 0\r\n\r\n".encode())
    with pytest.raises(InputError, match=f"was answered with status {status}"):
        host.fetcher.fetch(URL, 10)
    assert len(host.requests) == 1


@pytest.mark.parametrize(
    "start", [b"HTTP/1.1 200 OK\r\nX: ", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"]
)
def test_slow_answers_are_cut_off(
    host: MediaHost, start: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bytes that drip, in the header or in the body, are bounded together."""

    def drip(connection: socket.socket) -> None:
        connection.sendall(start)
        for _ in range(200):
            connection.sendall(b"a")
            time.sleep(0.05)

    monkeypatch.setattr(fetch, "TOTAL_S", 0.3)
    host.answer = drip
    with pytest.raises(InputError, match=r"took more than 0\.3 s"):
        host.fetcher.fetch(URL, 1000)


PRIVATE = [
    "0.0.0.0", "10.0.0.1", "100.64.0.1", "127.0.0.1", "169.254.169.254", "172.16.0.1", "192.0.0.1",
    "192.168.1.1", "198.18.0.1", "224.0.0.1", "240.0.0.1", "255.255.255.255",
    "::", "::1", "fe80::1%eth0", "fec0::1", "fc00::1", "ff02::1", "100::1", "4000::1",
    "::127.0.0.1", "::ffff:127.0.0.1", "::ffff:0:127.0.0.1",
    "64:ff9b::127.0.0.1", "64:ff9b::169.254.169.254", "64:ff9b::a00:1", "64:ff9b:1::5db8:d70e",
    "2002:7f00:1::", "2002:a9fe:a9fe::1", "2001:0:5db8:d70e::1", "2001:db8::1",
    "no address", "", "127.1", "0x7f000001",
]  # fmt: skip


@pytest.mark.parametrize("address", PRIVATE)
def test_private_addresses_are_never_connected_to(address: str) -> None:
    with media_host(address) as host, pytest.raises(UrlRefusedError, match="that is not public"):
        host.fetcher.fetch(URL, 10)
    assert host.connected == []
    mixed = MediaFetcher([HOST], resolve=lambda *_: [PUBLIC, address], connect=pytest.fail)
    with pytest.raises(UrlRefusedError, match="that is not public"):
        mixed.fetch(URL, 10)


@pytest.mark.parametrize(
    "address", [PUBLIC, "2606:2800:21f::1", "64:ff9b::93.184.215.14", "2002:5db8:d70e::1"]
)
def test_public_addresses_are_connected_to(address: str) -> None:
    with media_host(address) as host:
        host.send(ok(b"a"))
        assert host.fetcher.fetch(URL, 10) == b"a"
    assert host.connected == [(address, 80)]


def test_the_address_that_was_checked_is_the_one_connected_to() -> None:
    """A name that changes its address after the check gains nothing."""
    with media_host(PUBLIC, "127.0.0.1") as host:
        host.send(ok(b"a"))
        assert host.fetcher.fetch(URL, 10) == b"a"
        assert (host.looked_up, host.connected) == ([HOST], [(PUBLIC, 80)])
        with pytest.raises(UrlRefusedError):
            host.fetcher.fetch(URL, 10)
        assert len(host.connected) == 1


def test_the_routes_fetch_and_count_refusals(pe: prt.Embedder, host: MediaHost) -> None:
    data = picture("digit_3").read_bytes()
    host.send(ok(data))
    with serving("demo:pe", media_hosts=(HOST,)) as (base, service):
        service.media = type(service.media)(fetch=host.fetcher.fetch, limits=service.media.limits)

        def embed(url: str, **more: Any) -> httpx.Response:
            body = {"model": "PE-Demo", "input": url, "modality": "image", **more}
            return httpx.post(f"{base}/v1/embeddings", json=body, timeout=60)

        answer = embed(URL)
        assert answer.status_code == 200
        row = answer.json()["data"][0]["embedding"]
        np.testing.assert_allclose(row, pe.embed_images([data])[0], atol=1e-5)
        messages = question("", "read")[:1]
        messages[0]["content"] = [{"type": "image_url", "image_url": {"url": URL}}]
        assert (
            embed("", input=None, modality=None, messages=messages).json()["data"][0]
            == (answer.json()["data"][0])
        )

        def refused() -> float:
            return metric(base, "perception_rt_errors_total", code="url_refused")

        messages[0]["content"][0]["image_url"]["url"] = "http://other.example/"
        for number, made in enumerate(
            (
                lambda: embed("http://127.0.0.1/"),
                lambda: embed("http://169.254.169.254/latest/"),
                lambda: embed(f"http://user@{HOST}/"),
                lambda: embed("", input=None, modality=None, messages=messages),
            ),
            1,
        ):
            answer = made()
            assert (answer.status_code, answer.json()["error"]["code"]) == (400, "url_refused")
            assert refused() == number
    assert len(host.connected) == 2


def test_without_the_option_every_url_is_refused_and_counted(base: str) -> None:
    before = metric(base, "perception_rt_errors_total", code="url_refused")
    body = {"model": "PE-Demo", "images": ["http://127.0.0.1:1/"], "labels": ["a"]}
    answer = httpx.post(f"{base}/v1/classify", json=body)
    assert answer.status_code == 400
    assert "is refused: send the image itself" in answer.json()["error"]["message"]
    assert metric(base, "perception_rt_errors_total", code="url_refused") == before + 1
