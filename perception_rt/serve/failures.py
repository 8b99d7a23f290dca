"""Errors of requests, in the form of OpenAI's API."""

from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from perception_rt.errors import (
    BackendError,
    CapacityError,
    InputError,
    PerceptionError,
    QueueFullError,
)
from perception_rt.serve.fetch import UrlRefusedError
from perception_rt.serve.json_response import AsciiJson

GONE = 499  # the client disconnected; only metrics see this status
_CODES = {
    400: "invalid_value",
    401: "invalid_api_key",
    403: "forbidden",
    404: "not_found",
    405: "method_not_allowed",
    413: "request_too_large",
    415: "unsupported_media_type",
    429: "overloaded",
    503: "unavailable",
}


class ApiError(Exception):
    """A request that is answered with an error.

    Attributes:
        status: HTTP status.
        message: text for the client.
        param: name of the field that is wrong.
        code: short name of the error; None for the status's own.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code or _CODES.get(status, "server_error")

    def body(self) -> dict[str, Any]:
        """The error as OpenAI's clients expect it."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        if self.status == 429:
            kind = "rate_limit_error"
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.code}
        return {"error": error}

    def response(self) -> AsciiJson:
        """The response, with headers that the status asks for."""
        headers = {}
        if self.status == 401:
            headers["WWW-Authenticate"] = "Bearer"
        return AsciiJson(self.body(), self.status, headers=headers)


class ClientGone(Exception):  # noqa: N818 - no error: the client left
    """The client disconnected before its response was complete."""


def as_api_error(error: Exception) -> ApiError:
    """The answer to an error of the library, or to a mistake of ours."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, UrlRefusedError):
        return ApiError(400, str(error), code="url_refused")
    if isinstance(error, QueueFullError):
        return ApiError(429, str(error))
    if isinstance(error, InputError | CapacityError):
        return ApiError(400, str(error))
    if isinstance(error, BackendError):
        return ApiError(503, str(error))
    if isinstance(error, PerceptionError):
        return ApiError(500, str(error))
    return ApiError(500, "internal error; the server's log has its traceback")


async def answer_error(request: Request, error: Exception) -> Response:
    """Exception handler of the application."""
    if isinstance(error, ClientGone):
        return Response(status_code=GONE)
    if isinstance(error, HTTPException):
        shown = f"{request.method} {request.url.path[:80]}"
        error = ApiError(error.status_code, f"{error.detail}: {shown}")
    return as_api_error(error).response()
