"""Connects to a Ray cluster, or starts one on this machine."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from perception_rt.errors import BackendError

LOCAL = "local"
_CONNECT_S = 10.0


def ray_library() -> Any:
    """The module `ray`; BackendError if it is not installed."""
    try:
        import ray
    except ImportError as error:
        raise BackendError(
            f'clusters need {error.name}: pip install "perception_rt[ray]"'
        ) from None
    return ray


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Yields the module `ray`, connected; a connection that exists is used and kept.

    Args:
        address: address of a cluster; "auto" takes the one in `RAY_ADDRESS` or on this machine;
            "local" starts one here, which listens on the loopback interface only.

    Raises:
        BackendError: Ray is not installed, or there is no such cluster.
    """
    ray = ray_library()
    if ray.is_initialized():
        yield ray
        return
    more: dict[str, Any] = {}
    _check_answers(address)
    if address == LOCAL:
        # Ray would find its own address by asking for the route to a public one.
        more = {"_node_ip_address": "127.0.0.1", "include_dashboard": False}
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        ray.init(address, log_to_driver=False, logging_level="ERROR", **more)
    except Exception as error:  # Ray raises plain ones too, such as for a slow start
        line = str(error).strip().partition("\n")[0]
        raise BackendError(f"no Ray cluster at {address!r:.80}: {line:.200}") from None
    try:
        yield ray
    finally:
        ray.shutdown()


def _check_answers(address: str) -> None:
    """BackendError if nothing listens at HOST:PORT; Ray would try for minutes."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdecimal() or "/" in host:
        return  # another kind of address, which Ray checks
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_CONNECT_S).close()
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BackendError(f"no Ray cluster at {address!r:.80}: {reason}") from None
