"""Reads JSON bodies within bounds on bytes and time, and watches for clients that leave."""

import asyncio
import json
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from perception_rt.serve.failures import ApiError, ClientGone

_IDLE_S = 30.0  # a client must send something within this time
_DISCARDED = 8  # an oversized body is read and dropped up to this multiple of the limit
_T = TypeVar("_T")


class BodyBudget:
    """Counts the bytes of all bodies in memory; one per process."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._held = 0

    @contextmanager
    def reserve(self) -> Iterator["_Reserved"]:
        """A reservation for one body, given back at the end of the block."""
        reserved = _Reserved(self)
        try:
            yield reserved
        finally:
            self._held -= reserved.size

    def take(self, size: int) -> None:
        """Counts bytes; ApiError (429) if all bodies together have too many."""
        if self._held + size > self._most:
            raise ApiError(429, "the bodies of all requests together take too much memory")
        self._held += size


class _Reserved:
    def __init__(self, budget: BodyBudget) -> None:
        self._budget = budget
        self.size = 0

    def grow(self, size: int) -> None:
        self._budget.take(size)
        self.size += size


async def read_json(request: Request, most_bytes: int, reserved: _Reserved) -> dict[str, Any]:
    """Reads the body of a request, which must be a JSON object.

    Args:
        request: its body was not read yet.
        most_bytes: bound on the body, counted while it is read.
        reserved: counts the bytes against the process's budget.

    Raises:
        ApiError: it is too large, too slow, or not a JSON object.
        ClientGone: the client disconnected.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        # A page of another origin can send other types without asking first.
        raise ApiError(415, "the body must be JSON, with Content-Type: application/json")
    parts: list[bytes] = []
    size = 0
    try:
        chunks = request.stream()
        while True:
            chunk = await asyncio.wait_for(anext(chunks, None), _IDLE_S)
            if chunk is None:
                break
            size += len(chunk)
            if size <= most_bytes:
                reserved.grow(len(chunk))
                parts.append(chunk)
            elif size > _DISCARDED * most_bytes:
                break
            else:
                parts.clear()
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        raise ApiError(408, f"no more of the body arrived within {_IDLE_S:.0f} s") from None
    if size > most_bytes:
        raise ApiError(413, f"the body has more than {most_bytes} bytes, which is the limit")
    return _parse(b"".join(parts))


def _parse(data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data, parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        where = f" at byte {error.pos}" if isinstance(error, json.JSONDecodeError) else ""
        raise ApiError(400, f"the body is not valid JSON{where}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise ApiError(400, "the body must be a JSON object", code="invalid_json")
    return value


def _refuse(name: str) -> None:
    raise ValueError(name)


async def unless_gone(request: Request, work: Coroutine[Any, Any, _T]) -> _T:
    """Runs `work`; cancels it, and raises ClientGone, if the client disconnects before its end."""
    task = asyncio.ensure_future(work)
    gone = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientGone
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
