"""Decides which requests reach a route: the host's name, the API key, the number in progress."""

import asyncio
import hashlib
import hmac
import math
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from perception_rt.serve.failures import GONE, ApiError
from perception_rt.serve.page import PAGE_PATHS
from perception_rt.serve.service import Service

# Anyone may see these.
OPEN_PATHS = (*PAGE_PATHS, "/health", "/ready")
ROUTES = (
    *OPEN_PATHS,
    "/metrics",
    "/v1/models",
    "/v1/embeddings",
    "/v1/chat/completions",
    "/v1/classify",
    "/v1/features",
)
_UNBOUNDED = (*OPEN_PATHS, "/metrics", "/v1/models")  # answered at once, even under load
LINGER_S = 30.0  # for the rest of a body that is refused
_MAX_RETRY_S = 60
_NEW = 0.1  # weight of the latest request in the mean time
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """Middleware that refuses requests before their bodies are read, and counts all of them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._active = 0
        self._mean_s = 0.0  # time of a request that succeeded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics = self._service.metrics
        started, status = time.monotonic(), GONE
        unread, lingering = True, False

        async def heard() -> Message:
            nonlocal unread
            message = await receive()
            unread = message.get("more_body", False)
            return message

        async def watched(message: Message) -> None:
            nonlocal status, lingering
            if message["type"] == "http.response.start":
                status = message["status"]
                if status == 429:
                    later = (b"retry-after", b"%d" % self._retry_after_s())
                    message = {**message, "headers": [*message["headers"], later]}
            elif status >= 400 and unread and not message.get("more_body", False):
                lingering = True
                message = {**message, "more_body": True}
            await send(message)

        metrics.began()
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._pass(scope, heard, watched)
            else:
                metrics.failed(refusal.code)
                await refusal.response()(scope, heard, watched)
        except Exception:
            status = 500  # which the application around this one will send
            raise
        finally:
            seconds = time.monotonic() - started
            metrics.ended(_route(scope["path"]), status, seconds)
            if status < 400 and scope["path"] not in _UNBOUNDED:
                self._mean_s += _NEW * (seconds - self._mean_s) if self._mean_s else seconds
        if lingering:
            await _discard(heard)
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        bounded = scope["path"] not in _UNBOUNDED
        self._active += bounded
        try:
            await self._app(scope, receive, send)
        finally:
            self._active -= bounded

    def _retry_after_s(self) -> int:
        """Seconds until one of the requests in progress should end."""
        return min(_MAX_RETRY_S, math.ceil(self._mean_s / max(1, self._active)) or 1)

    def _refusal(self, scope: Scope) -> ApiError | None:
        options, path = self._service.options, scope["path"]
        headers = Headers(scope=scope)
        if options.is_loopback and not _names_this_machine(headers.get("host", "")):
            # A page of another site may have let its name point here.
            return ApiError(403, "the Host header must name this machine, such as localhost")
        if path in OPEN_PATHS:
            return None
        if self._service.keys and not _has_key(headers, self._service.keys):
            return ApiError(401, "a valid API key is needed: Authorization: Bearer KEY")
        if path not in _UNBOUNDED and self._active >= options.max_requests:
            return ApiError(
                429, f"{options.max_requests} requests are in progress, which is the limit"
            )
        return None


async def _discard(receive: Receive) -> None:
    """Drops the rest of a body: a client that is cut off while it sends may not see its answer."""
    with suppress(TimeoutError):
        async with asyncio.timeout(LINGER_S):
            while (await receive()).get("more_body", False):
                pass


def _names_this_machine(host: str) -> bool:
    name = host.lower()
    if not name.endswith("]"):
        head, colon, port = name.rpartition(":")
        if colon and port.isdigit():
            name = head
    return name in _LOCAL_NAMES


def _has_key(headers: Headers, keys: frozenset[bytes]) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip(" ").encode("latin-1")).digest()
    matches = [hmac.compare_digest(digest, known) for known in keys]
    return scheme.lower() == "bearer" and any(matches)


def _route(path: str) -> str:
    """The label of a path: there are few, whatever clients ask for."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    return path if path in ROUTES else "other"
