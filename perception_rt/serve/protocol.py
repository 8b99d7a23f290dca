"""HTTP/1.1 connections whose clients must send headers and take answers within a time.

uvicorn bounds idle connections only. These bounds count what they refuse in the metrics.
"""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEADER_S = 30.0  # from the connection, or the first byte, to the end of a header
UNREAD_S = 60.0  # a client must take some of an answer within this time
_TOO_SLOW = (
    b"HTTP/1.1 408 Request Timeout\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"  # no body
)


class BoundedProtocol(H11Protocol):
    """A connection. The application's lifespan state must have `metrics`."""

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        self._metrics = self.app_state["metrics"]
        self._header_timer: asyncio.TimerHandle | None = None
        self._unread_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Called once, at the beginning."""
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=0)  # any unsent byte pauses writing
        self._watch_header()

    def connection_lost(self, exc: Exception | None) -> None:
        """Called once, at the end."""
        for timer in (self._header_timer, self._unread_timer):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Called with bytes of the client."""
        super().data_received(data)
        self._watch_header()

    def pause_writing(self) -> None:
        """Called when bytes of an answer wait for the client."""
        super().pause_writing()
        self._watch_unread()

    def resume_writing(self) -> None:
        """Called when the client has read the waiting bytes."""
        super().resume_writing()
        if self._unread_timer is not None:
            self._unread_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Answers bytes that are not HTTP."""
        self._metrics.failed("invalid_http")
        super().send_400_response(msg)

    def _watch_header(self) -> None:
        """Starts the timer of a header, or of the rest of a body that was answered already."""
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering or self.timeout_keep_alive_task is not None:
            if self._header_timer is not None:
                self._header_timer.cancel()
                self._header_timer = None
        elif self._header_timer is None:
            self._header_timer = self.loop.call_later(HEADER_S, self._end_slow_header)

    def _end_slow_header(self) -> None:
        if self.transport.is_closing():
            return
        began = self.conn.their_state is h11.IDLE and self.conn.trailing_data[0]
        if began:  # a browser may open a connection and not use it
            self._metrics.failed("header_timeout")
            self.transport.write(_TOO_SLOW)
        self.transport.close()

    def _watch_unread(self) -> None:
        waiting = self.transport.get_write_buffer_size()
        self._unread_timer = self.loop.call_later(UNREAD_S, self._end_unread, waiting)

    def _end_unread(self, waiting: int) -> None:
        if self.transport.get_write_buffer_size() < waiting:
            self._watch_unread()
        else:
            self._metrics.failed("answer_timeout")
            self.transport.abort()
