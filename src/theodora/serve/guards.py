"""What stands before the routes: keys, sizes, and who may be asked for."""

from __future__ import annotations

import hmac
import json
from contextlib import suppress
from pathlib import Path
from typing import Any

from theodora.adapters.adapter_folder import CONFIG_NAME, MLX_WEIGHTS_NAME, WEIGHTS_NAME
from theodora.errors import CheckpointError, ConfigError
from theodora.files.folder import LeadsOut, Place

LOOPBACK = ("127.0.0.1", "::1", "localhost")

_OPEN = ("/health", "/ping")
"""Paths that anybody may ask, who brings nothing."""


def failure(status: int, message: str, kind: str, **headers: str) -> tuple[int, bytes, dict[str, str]]:
    """Status, body and headers of an error, as OpenAI's clients read it."""
    body = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return status, json.dumps(body).encode(), {"content-type": "application/json", **headers}


class Guards:
    """ASGI middleware. Refuses strangers, large bodies, and bodies that a browser sends without asking."""

    def __init__(self, app: Any, keys: frozenset[str], max_body: int, hosts: frozenset[str] | None) -> None:
        self.app, self.keys, self.max_body, self.hosts = app, keys, max_body, hosts

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        size, large, started = 0, False, False

        async def counted() -> Any:
            nonlocal size, large
            message = await receive()
            size += len(message.get("body", b""))
            if size > self.max_body:
                large = True
                raise _TooLarge
            return message

        async def noted(message: Any) -> None:
            nonlocal started
            if not large:
                started = True
                await send(message)

        with suppress(_TooLarge):
            await self.app(scope, counted, noted)
        if large and not started:  # whatever the application made of it
            await _answer(send, *self._large())

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]] | None:
        if self.hosts is not None and _host(headers.get("host", "")) not in self.hosts:
            # A page in a browser can let its own name point to the loopback.
            return failure(403, f"Host {headers.get('host', '')!r} is not this server.", "permission_error")
        if self.keys and scope["path"] not in _OPEN:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Headers are bytes; clients write what is not ASCII as Latin-1 or as UTF-8.
            given = key.strip().encode(), key.strip().encode("latin-1")
            known = [hmac.compare_digest(bytes_, known.encode()) for bytes_ in given for known in self.keys]
            if scheme.lower() != "bearer" or not any(known):
                return failure(401, "A valid API key is needed: Authorization: Bearer KEY.", "authentication_error")
        if scope["method"] == "POST" and scope["path"] not in _OPEN:
            length = headers.get("content-length", "")
            if length.isdigit() and int(length) > self.max_body:
                return self._large()
            if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
                return failure(415, "Expected a body of type application/json.", "invalid_request_error")
        return None

    def _large(self) -> tuple[int, bytes, dict[str, str]]:
        return failure(413, f"A request may have at most {self.max_body} bytes.", "invalid_request_error")


class _TooLarge(Exception):
    """The body is larger than it may be."""


async def _answer(send: Any, status: int, body: bytes, headers: dict[str, str]) -> None:
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    pairs.append((b"content-length", str(len(body)).encode()))
    # What the client still sends is not read, so the connection cannot be used again.
    pairs.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


def _host(header: str) -> str:
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


def read_keys(path: str | None) -> frozenset[str]:
    """The keys of a file, one on each line.

    Raises:
        ConfigError: it cannot be read, or holds none.
    """
    if path is None:
        return frozenset()
    try:
        keys = frozenset(line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key; expected one on each line")
    return keys


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
