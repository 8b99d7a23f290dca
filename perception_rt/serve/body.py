"""Reads JSON bodies within bounds on bytes and time, and watches for clients that leave."""

import asyncio
import json
import math
import re
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request

from perception_rt.serve.failures import ApiError, ClientGone

IDLE_S = 30.0  # a client must send something within this time
LEAST_RATE = 16 * 1024  # bytes per second, on average, once IDLE_S are over
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # may be half of a pair, which is no text
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
    length = request.headers.get("content-length", "0")  # h11 lets only digits through
    if int(length) > most_bytes:
        raise _too_large(most_bytes)
    parts: list[bytes] = []
    end = time.monotonic() + IDLE_S
    try:
        chunks = request.stream()
        while True:
            left = min(IDLE_S, end + reserved.size / LEAST_RATE - time.monotonic())
            chunk = await asyncio.wait_for(anext(chunks, None), left)
            if chunk is None:
                break
            if reserved.size + len(chunk) > most_bytes:
                raise _too_large(most_bytes)
            reserved.grow(len(chunk))
            parts.append(chunk)
    except ClientDisconnect:
        raise ClientGone from None
    except TimeoutError:
        text = f"the body arrived too slowly: nothing within {IDLE_S:g} s, or less than "
        raise ApiError(408, f"{text}{LEAST_RATE} bytes/s", code="body_timeout") from None
    return _parse(b"".join(parts))


def _too_large(most_bytes: int) -> ApiError:
    return ApiError(413, f"the body has more than {most_bytes} bytes, which is the limit")


def _parse(data: bytes) -> dict[str, Any]:
    try:
        text = data.decode()
        value = json.loads(
            text, object_pairs_hook=_object, parse_float=_finite, parse_constant=_finite
        )
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except json.JSONDecodeError as error:
        raise _invalid(f"the body is not valid JSON at character {error.pos}") from None
    except UnicodeDecodeError as error:
        raise _invalid(f"the body is not UTF-8 at byte {error.start}") from None
    except UnicodeEncodeError:
        raise _invalid("a string of the body has half of a surrogate pair") from None
    except RecursionError:
        raise _invalid("the body is nested too deeply") from None
    except ValueError as error:
        raise _invalid(f"the body is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise _invalid("the body must be a JSON object")
    return value


def _invalid(message: str) -> ApiError:
    return ApiError(400, message, code="invalid_json")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object, each of whose names occurs once: programs differ in which of two values counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("an object has the same name twice")
    return found


def _finite(number: str) -> float:
    value = float(number)
    if not math.isfinite(value):
        raise ValueError("a number is not finite")
    return value


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
