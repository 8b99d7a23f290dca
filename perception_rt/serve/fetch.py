"""Fetches images and videos from hosts that the server's owner named, and from no others.

A host's address is looked up once, must be public, and is the one that is connected to. Redirects
are not followed.
"""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from urllib.parse import urlsplit

from perception_rt.errors import InputError

_PORTS = {"http": 80, "https": 443}
_WAIT_S = 10.0  # without a byte
TOTAL_S = 30.0
_CHUNK = 64 * 1024

# Ranges of IPv6 whose addresses lead to the IPv4 address in them, and its distance from the end.
_EMBEDDED = (
    (ipaddress.IPv6Network("::/96"), 0),  # IPv4-compatible
    (ipaddress.IPv6Network("::ffff:0:0/96"), 0),  # IPv4-mapped
    (ipaddress.IPv6Network("::ffff:0:0:0/96"), 0),  # IPv4-translated
    (ipaddress.IPv6Network("64:ff9b::/96"), 0),  # NAT64
    (ipaddress.IPv6Network("2002::/16"), 80),  # 6to4
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")

Resolve = Callable[[str, int], list[str]]
Connect = Callable[[str, int], socket.socket]


class UrlRefusedError(InputError):
    """A URL that the server does not fetch."""


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


def connect(address: str, port: int) -> socket.socket:
    """A connection that waits a bounded time for each byte."""
    return socket.create_connection((address, port), timeout=_WAIT_S)


class MediaFetcher:
    """Fetches from named hosts; without one, refuses every URL."""

    def __init__(
        self, hosts: Iterable[str], *, resolve: Resolve = resolve, connect: Connect = connect
    ) -> None:
        """Makes a fetcher.

        Args:
            hosts: host names, compared whole and without case.
            resolve: returns the addresses of a host.
            connect: opens a connection to an address.
        """
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._resolve = resolve
        self._connect = connect

    def fetch(self, url: str, most_bytes: int) -> bytes:
        """Returns the body of a URL.

        Raises:
            UrlRefusedError: its host is not allowed or has a private address, or it is unusual.
            InputError: the answer is too large, too slow, or not status 200.
        """
        shown = f"URL {url[:80]!r}"
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise UrlRefusedError(f"{shown} is not a URL") from None
        scheme = parts.scheme.lower()
        if not self._hosts:
            text = "send the image itself, or the video, as a data URL"
            raise UrlRefusedError(f"{shown} is refused: {text}")
        if host not in self._hosts:
            raise UrlRefusedError(f"{shown}: the server fetches nothing from {host[:80]!r}")
        if scheme not in _PORTS or port not in (None, _PORTS[scheme]) or parts.username is not None:
            raise UrlRefusedError(f"{shown}: only plain http and https URLs are fetched")
        target = parts.path or "/"
        if parts.query:
            target += f"?{parts.query}"
        if not target.isascii() or not target.isprintable() or " " in target:
            raise UrlRefusedError(f"{shown} is not a URL")
        try:
            return self._get(scheme, host, target, most_bytes, shown)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{shown} cannot be fetched: {type(error).__name__}") from None

    def _get(self, scheme: str, host: str, target: str, most: int, shown: str) -> bytes:
        port = _PORTS[scheme]
        connection = http.client.HTTPConnection(host, port)
        connection.sock = plain = self._open(host, port, shown)
        end = time.monotonic() + TOTAL_S
        with plain.dup() as other:
            # Bytes that drip, in a header too, keep every single wait short.
            alarm = threading.Timer(TOTAL_S, _cut, (other,))
            alarm.start()
            try:
                if scheme == "https":
                    context = ssl.create_default_context()
                    connection.sock = context.wrap_socket(plain, server_hostname=host)
                connection.request("GET", target, headers={"Accept-Encoding": "identity"})
                data = _read(connection.getresponse(), most, shown)
                if time.monotonic() >= end:
                    raise TimeoutError  # an answer without a length may have been cut
                return data
            except (OSError, http.client.HTTPException):
                if time.monotonic() >= end:
                    raise InputError(f"{shown} took more than {TOTAL_S:g} s") from None
                raise
            finally:
                alarm.cancel()
                connection.close()

    def _open(self, host: str, port: int, shown: str) -> socket.socket:
        addresses = self._resolve(host, port)
        if not addresses or not all(_is_public(address) for address in addresses):
            raise UrlRefusedError(f"{shown}: {host[:80]!r} has an address that is not public")
        return self._connect(addresses[0], port)  # no second look-up may give another one


def _cut(connection: socket.socket) -> None:
    with suppress(OSError):  # it ended at the same moment
        connection.shutdown(socket.SHUT_RDWR)


def _read(response: http.client.HTTPResponse, most: int, shown: str) -> bytes:
    if response.status != http.client.OK:
        raise InputError(f"{shown} was answered with status {response.status}")
    data = bytearray()
    while chunk := response.read1(_CHUNK):
        data += chunk
        if len(data) > most:
            raise InputError(f"{shown} has more than {most} bytes, which is the limit")
    if response.length:
        raise http.client.IncompleteRead(bytes(data), response.length)
    return bytes(data)


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        inner = [shift for network, shift in _EMBEDDED if found in network]
        if not inner and found not in _GLOBAL_UNICAST:
            return False
        if inner:
            return _is_public(str(ipaddress.IPv4Address(int(found) >> inner[0] & 0xFFFFFFFF)))
    return found.is_global and not found.is_multicast
