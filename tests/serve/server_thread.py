"""Runs the server in a thread of the test's process, whose bounds a test can change."""

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from server_process import until

from perception_rt.serve.app import make_app
from perception_rt.serve.options import ServeOptions
from perception_rt.serve.server import listen, uvicorn_config
from perception_rt.serve.service import Service


@contextmanager
def serving(*packages: str, **options: Any) -> Iterator[tuple[str, Service]]:
    """The base URL and the state of a server on a free port, which ends with the block."""
    settings = ServeOptions(packages=packages, port=0, drain_s=5, load={"threads": 1}, **options)
    service = Service(settings)
    listener = listen(settings)
    # Connections inherit it: an answer of some KiB then waits for its client.
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 8192)
    port = listener.getsockname()[1]
    server = uvicorn.Server(uvicorn_config(settings, lambda: make_app(service)))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        until(lambda: server.started)
        yield f"http://127.0.0.1:{port}", service
    finally:
        server.should_exit = True
        thread.join()


def connect(base: str, sent: bytes = b"") -> socket.socket:
    """A connection that sent some bytes, and takes few before it is read."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    connection.settimeout(30)
    connection.connect(("127.0.0.1", int(base.rpartition(":")[2])))
    connection.sendall(sent)
    return connection


def read_all(connection: socket.socket) -> bytes:
    """Bytes until the server closes the connection; those so far if it resets it."""
    data = bytearray()
    try:
        while part := connection.recv(65536):
            data += part
    except ConnectionResetError:
        pass
    return bytes(data)


def post_head(path: str, *headers: str) -> bytes:
    """The header of a POST request with JSON."""
    lines = (f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers)
    return "".join(f"{line}\r\n" for line in (*lines, "")).encode()
