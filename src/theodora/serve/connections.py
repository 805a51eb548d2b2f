"""HTTP connections with limits of time: a client that does not finish its request, or read its answer, is cut off."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from theodora.serve.errors import error_reply

_TICK = 1.0  # seconds between two looks
_SLACK = 2.0  # seconds in which a body that is late is told so, before its connection is cut
_AT_ONCE = 16_384  # bytes read at a time, so that no connection keeps the event loop for long


@dataclass(frozen=True)
class Limits:
    """What all connections may take together, and each of them."""

    connections: int
    """At a time."""
    patience: float
    """Seconds for the head of a request, for its body, and for the next bytes of an answer to be taken."""
    answer: float
    """Seconds in which what has been sent has to be taken."""
    stop: float
    """Seconds that a connection is left when the server stops."""


class Connection(H11Protocol):
    """uvicorn's, which has a time limit between two requests only.

    Every second it checks how long the client has been waited for, and for what.
    """

    limits: ClassVar[Limits]

    def connection_made(self, transport: asyncio.Transport) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take the connection; of too many, the one that has been sending its request for longest gives way."""
        super().connection_made(transport)
        with suppress(AttributeError):
            transport.max_size = _AT_ONCE  # pyright: ignore[reportAttributeAccessIssue]
        self._since = self._moved = self._empty = self.loop.time()
        self._unsent = 0
        self._timer = self.loop.call_later(_TICK, self._look)
        if len(self.connections) > self.limits.connections:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        """Look no more."""
        self._timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Go on with the request."""
        before = self.conn.their_state
        super().data_received(data)
        if self.conn.their_state is not before:
            self._since = self.loop.time()

    def on_response_complete(self) -> None:
        """Wait for the next request."""
        self._since = self.loop.time()
        super().on_response_complete()

    def shutdown(self) -> None:
        """Finish the answer; a request that is still arriving is none."""
        super().shutdown()
        self.loop.call_later(_TICK if self.sending else self.limits.stop, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP, unless an answer is under way, which ends here."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_complete:  # pyright: ignore[reportUnnecessaryComparison]
            cycle.disconnected = True  # before it answers
            cycle.message_event.set()
            if cycle.response_started:
                self.transport.abort()
                return
        self._answer(400, msg, "invalid_request_error")

    @property
    def sending(self) -> bool:
        """Whether a request of the client's is not whole yet, or has not begun."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY) and not self.transport.is_closing()

    def _look(self) -> None:
        now = self.loop.time()
        if self._late(now) or self._stuck(now):
            self.transport.abort()
            return
        self._timer = self.loop.call_later(_TICK, self._look)

    def _late(self, now: float) -> bool:
        slack = _SLACK if self.conn.their_state is h11.SEND_BODY else 0.0
        return self.sending and now - self._since > self.limits.patience + slack

    def _stuck(self, now: float) -> bool:
        """Whether the client does not take what was sent."""
        unsent = self.transport.get_write_buffer_size()
        if unsent == 0:
            self._empty = now
        if unsent < self._unsent or unsent == 0:
            self._moved = now
        self._unsent = unsent
        return now - self._moved > self.limits.patience or now - self._empty > self.limits.answer

    def _make_room(self) -> None:
        others = [
            connection
            for connection in self.connections
            if isinstance(connection, Connection) and connection is not self and connection.sending
        ]
        if not others:
            self._answer(503, "Too many connections; try again soon.", "unavailable_error")
            return
        first = min(others, key=lambda connection: (connection.conn.their_state is h11.SEND_BODY, connection._since))
        self.connections.discard(first)
        first.transport.abort()

    def _answer(self, status: int, message: str, kind: str) -> None:
        reply = error_reply(status, message, kind, connection="close")
        lines = [f"HTTP/1.1 {reply.status} ", *(f"{name}: {value}" for name, value in reply.headers.items())]
        head = "\r\n".join([*lines, f"content-length: {len(reply.body)}", "", ""])
        self.transport.write(head.encode() + reply.body)
        self.transport.close()


def connection_of(limits: Limits) -> type[Connection]:
    """uvicorn's `http`: connections with these limits."""
    return type("Connection", (Connection,), {"limits": limits})


def most_connections(most: int) -> int:
    """So many, or as many as the file descriptors of this process allow beside its others."""
    limit: Callable[[Any], tuple[int, int]]
    try:
        from resource import RLIM_INFINITY, RLIMIT_NOFILE
        from resource import getrlimit as limit
    except ImportError:  # Windows
        return most
    files, _ = limit(RLIMIT_NOFILE)
    return most if files == RLIM_INFINITY else max(1, min(most, files * 3 // 4))
