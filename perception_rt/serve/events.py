"""A response of server-sent events that ends when its client leaves."""

from collections.abc import AsyncGenerator
from contextlib import aclosing, suppress

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from perception_rt.serve.body import unless_gone
from perception_rt.serve.failures import ClientGone


class EventStream(Response):
    """Sends the data of events as they come."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[str]) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(headers=headers)
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the response."""
        with suppress(ClientGone):  # nothing more can be said to the client
            await unless_gone(Request(scope, receive), self._send(send))

    async def _send(self, send: Send) -> None:
        async with aclosing(self._events) as events:
            start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
            await send(start)
            async for event in events:
                await send(_body(f"data: {event}\n\n", more=True))
            await send(_body("", more=False))


def _body(text: str, *, more: bool) -> dict[str, object]:
    return {"type": "http.response.body", "body": text.encode(), "more_body": more}
