"""Fetches images and videos from hosts that the server's owner named, and from no others.

A host's address is looked up once, must be public, and is the one that is connected to. Redirects
are not followed.
"""

import http.client
import ipaddress
import socket
import ssl
import time
from collections.abc import Callable, Iterable
from urllib.parse import urlsplit

from perception_rt.errors import InputError

_PORTS = {"http": 80, "https": 443}
_WAIT_S = 10.0  # without a byte
_TOTAL_S = 30.0
_CHUNK = 64 * 1024

Resolve = Callable[[str, int], list[str]]


def resolve(host: str, port: int) -> list[str]:
    """Addresses of a host."""
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(address[0]) for *_, address in found]


class MediaFetcher:
    """Fetches from named hosts."""

    def __init__(self, hosts: Iterable[str], resolve: Resolve = resolve) -> None:
        """Makes a fetcher.

        Args:
            hosts: host names, compared whole and without case.
            resolve: returns the addresses of a host.
        """
        self._hosts = frozenset(host.lower().rstrip(".") for host in hosts)
        self._resolve = resolve

    def fetch(self, url: str, most_bytes: int) -> bytes:
        """Returns the body of a URL.

        Raises:
            InputError: its host is not allowed or has a private address, or the answer is too
                large, too slow, or not status 200.
        """
        shown = f"URL {url[:80]!r}"
        try:
            parts = urlsplit(url)
            host, port = (parts.hostname or "").rstrip("."), parts.port
        except ValueError:
            raise InputError(f"{shown} is not a URL") from None
        scheme = parts.scheme.lower()
        if host not in self._hosts:
            raise InputError(f"{shown}: the server fetches nothing from {host[:80]!r}")
        if scheme not in _PORTS or port not in (None, _PORTS[scheme]) or parts.username is not None:
            raise InputError(f"{shown}: only plain http and https URLs are fetched")
        target = parts.path or "/"
        if parts.query:
            target += f"?{parts.query}"
        if not target.isascii() or not target.isprintable() or " " in target:
            raise InputError(f"{shown} is not a URL")
        try:
            return self._get(scheme, host, target, most_bytes, shown)
        except (OSError, http.client.HTTPException) as error:
            raise InputError(f"{shown} cannot be fetched: {type(error).__name__}") from None

    def _get(self, scheme: str, host: str, target: str, most: int, shown: str) -> bytes:
        end = time.monotonic() + _TOTAL_S
        port = _PORTS[scheme]
        with self._connect(host, port, shown) as plain:
            context = ssl.create_default_context()
            secure = scheme == "https"
            connected = context.wrap_socket(plain, server_hostname=host) if secure else plain
            connection = http.client.HTTPConnection(host, port)
            connection.sock = connected
            try:
                connection.request("GET", target, headers={"Accept-Encoding": "identity"})
                response = connection.getresponse()
                if response.status != http.client.OK:
                    raise InputError(f"{shown} was answered with status {response.status}")
                data = bytearray()
                while chunk := response.read1(_CHUNK):
                    data += chunk
                    if len(data) > most:
                        raise InputError(f"{shown} has more than {most} bytes, which is the limit")
                    if time.monotonic() > end:
                        raise InputError(f"{shown} took more than {_TOTAL_S:.0f} s")
                return bytes(data)
            finally:
                connection.close()

    def _connect(self, host: str, port: int, shown: str) -> socket.socket:
        addresses = self._resolve(host, port)
        if not addresses or not all(_is_public(address) for address in addresses):
            raise InputError(f"{shown}: {host[:80]!r} has an address that is not public")
        return socket.create_connection((addresses[0], port), timeout=_WAIT_S)


def _is_public(address: str) -> bool:
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(found, "ipv4_mapped", None) or getattr(found, "sixtofour", None)
    return (mapped or found).is_global and not found.is_multicast
