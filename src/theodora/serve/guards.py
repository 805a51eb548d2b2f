"""What stands before the routes: keys, sizes and times of bodies, hosts, and the folder that adapters come from."""

from __future__ import annotations

import asyncio
import hmac
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError
from theodora.files.folder import LeadsOut, Place
from theodora.files.names import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME
from theodora.serve.errors import ErrorReply, error_reply

LOOPBACK = ("127.0.0.1", "::1", "localhost")

_OPEN = ("/health", "/ping")
"""Paths that anybody may ask, who brings nothing."""
_BODIES = 64  # bodies of the largest size that are in memory at a time
_LINGER_SECONDS, _LINGER_BYTES = 1.0, 32_000_000  # in which a refused client may still send, to read the refusal
_SMALL = 65_536  # bytes that a connection holds anyway


class Guards:
    """ASGI middleware. Refuses strangers, and bodies that a browser sends without asking; receives the others' bodies.

    The application is asked once the whole body is there: it has a size, a time to arrive in, and a share of the memory
    that all bodies may take, and a client that goes before its end is nobody's request.
    """

    def __init__(
        self, app: Any, keys: frozenset[str], max_body: int, hosts: frozenset[str] | None, patience: float = 30.0
    ) -> None:
        self.app, self.keys, self.max_body, self.hosts, self.patience = app, keys, max_body, hosts, patience
        self._room = _Room(_BODIES * max_body)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _answer(send, refusal, receive if _has_body(headers) else None)
            return
        reads = _reads(scope)
        share, started = _Share(self._room), False

        async def noted(message: Any) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if not reads and _has_body(headers):
                    # Nobody reads it, so the connection cannot be used again.
                    message = {**message, "headers": [*message.get("headers", ()), (b"connection", b"close")]}
            await send(message)

        try:
            if not reads:
                await self.app(scope, receive, noted)
                return
            body = await self._body(receive, share)
            await self.app(scope, _given(body, receive, share), noted)
        except _Refused as refused:
            await _answer(send, refused.reply, receive)
        except _Gone:
            pass
        except asyncio.CancelledError:  # by uvicorn, which would log it, when the grace is over
            if not started:
                await _answer(send, error_reply(503, "The server is stopping.", "unavailable_error"))
        finally:
            share.give_back()

    async def _body(self, receive: Any, share: _Share) -> bytes:
        parts, more = bytearray(), True
        try:
            async with asyncio.timeout(self.patience):
                while more:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts += message.get("body", b"")
                    more = message.get("more_body", False)
                    if len(parts) > self.max_body:
                        raise _Refused(self._large())
                    if not share.take(len(parts)):
                        raise _Refused(self._full())
        except TimeoutError:
            late = f"The body took more than {self.patience:g} s to arrive."
            raise _Refused(error_reply(408, late, "timeout_error", **{"x-should-retry": "false"})) from None
        return bytes(parts)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> ErrorReply | None:
        if self.hosts is not None and host_of(headers.get("host", "")) not in self.hosts:
            # A page in a browser can let its own name point to the loopback.
            return error_reply(403, f"Host {headers.get('host', '')!r} is not this server.", "permission_error")
        if self.keys and scope["path"] not in _OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Headers are bytes; clients write what is not ASCII as Latin-1 or as UTF-8.
            given = key.strip().encode(), key.strip().encode("latin-1")
            known = [hmac.compare_digest(bytes_, known.encode()) for bytes_ in given for known in self.keys]
            if scheme.lower() != "bearer" or not any(known):
                return error_reply(401, "A valid API key is needed: Authorization: Bearer KEY.", "authentication_error")
        if _reads(scope):
            length = headers.get("content-length", "")
            if length.isdigit() and (len(length) > 18 or int(length) > self.max_body):
                return self._large()
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return error_reply(415, "Expected a body of type application/json.", "invalid_request_error")
        return None

    def _full(self) -> ErrorReply:
        message = "Too many large requests are arriving; try again soon."
        return error_reply(429, message, "rate_limit_error", **{"retry-after": "1"})

    def _large(self) -> ErrorReply:
        return error_reply(413, f"A request may have at most {self.max_body} bytes.", "invalid_request_error")


@dataclass
class _Room:
    """The memory that bodies may take together."""

    most: int
    held: int = 0


class _Share:
    """One request's part of the memory that bodies may take: nothing for a small one, which is always let in."""

    def __init__(self, room: _Room) -> None:
        self._room, self._taken = room, 0

    def take(self, size: int) -> bool:
        """Take so many bytes in all; False if there is no room for them."""
        more = (size if size > _SMALL else 0) - self._taken
        if more and self._room.held + more > self._room.most:
            return False
        self._room.held += more
        self._taken += more
        return True

    def give_back(self) -> None:
        """Have nothing any more."""
        self._room.held -= self._taken
        self._taken = 0


class _Refused(Exception):
    """The body is not taken."""

    def __init__(self, reply: ErrorReply) -> None:
        super().__init__()
        self.reply = reply


class _Gone(Exception):
    """The client went before the end of its body."""


def _reads(scope: Any) -> bool:
    """Whether a request's body is wanted."""
    return scope["method"] == "POST" and scope["path"] not in _OPEN


def _has_body(headers: dict[str, str]) -> bool:
    return "transfer-encoding" in headers or headers.get("content-length", "0").strip("0") != ""


def _given(body: bytes, receive: Any, share: _Share) -> Any:
    """What the application receives: the body, and then what comes, for which it asks when it has read the body."""
    bodies = [body]

    async def received() -> Any:
        if bodies:
            return {"type": "http.request", "body": bodies.pop(), "more_body": False}
        share.give_back()
        return await receive()

    return received


async def _answer(send: Any, reply: ErrorReply, receive: Any = None) -> None:
    """Answer, and close the connection; `receive`, where the client is sending a body that is not read."""
    pairs = [(key.encode(), value.encode()) for key, value in reply.headers.items()]
    pairs.append((b"content-length", str(len(reply.body)).encode()))
    # What the client still sends is not read, so the connection cannot be used again.
    pairs.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": reply.status, "headers": pairs})
    await send({"type": "http.response.body", "body": reply.body, "more_body": receive is not None})
    if receive is None:
        return
    # A connection that is closed while something comes is reset, and the client never sees the answer.
    left = _LINGER_BYTES
    with suppress(TimeoutError):
        async with asyncio.timeout(_LINGER_SECONDS):
            while left > 0 and (message := await receive()).get("more_body", False):
                left -= len(message["body"])
    await send({"type": "http.response.body", "body": b""})


def host_of(header: str) -> str:
    """The host that a Host header names, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def inside(folder: str | Path, asked: str) -> Place:
    """The adapter folder that `asked` names within `folder`; neither it nor a file in it is read from outside.

    Raises:
        CheckpointError: it is not there, leads out, or a file of it is none.
    """
    root = Path(folder).absolute()
    place = Place(root / asked, within=root)
    try:
        with place.open() as opened:
            for name in (CONFIG_NAME, WEIGHTS_NAME, MLX_WEIGHTS_NAME):
                opened.seen(name)
            return place
    except (OSError, ValueError, LeadsOut) as error:
        # One answer for what is outside and what is not there, so that nobody can ask what else the disk holds.
        raise CheckpointError(f"There is no adapter {asked!r} in the adapter folder.") from error
