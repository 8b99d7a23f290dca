"""Decides which requests reach a route: the host's name, the API key, the number in progress."""

import hashlib
import hmac
import time

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
_LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]", "::1")


class Guard:
    """Middleware that refuses requests before their bodies are read, and counts all of them."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app = app
        self._service = service
        self._active = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        metrics = self._service.metrics
        started, status = time.monotonic(), GONE

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        metrics.began()
        try:
            refusal = self._refusal(scope)
            if refusal is None:
                await self._pass(scope, receive, watched)
            else:
                metrics.failed(refusal.code)
                await refusal.response()(scope, receive, watched)
        except Exception:
            status = 500  # which the application around this one will send
            raise
        finally:
            metrics.ended(_route(scope["path"]), status, time.monotonic() - started)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        bounded = scope["path"] not in _UNBOUNDED
        self._active += bounded
        try:
            await self._app(scope, receive, send)
        finally:
            self._active -= bounded

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


def _names_this_machine(host: str) -> bool:
    name = host.lower()
    if not name.endswith("]"):
        head, colon, port = name.rpartition(":")
        if colon and port.isdigit():
            name = head
    return name in _LOCAL_NAMES


def _has_key(headers: Headers, keys: frozenset[bytes]) -> bool:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    digest = hashlib.sha256(key.strip().encode("latin-1", "replace")).digest()
    matches = [hmac.compare_digest(digest, known) for known in keys]
    return scheme.lower() == "bearer" and any(matches)


def _route(path: str) -> str:
    """The label of a path: there are few, whatever clients ask for."""
    if path.startswith("/v1/models/"):
        return "/v1/models/{id}"
    return path if path in ROUTES else "other"
