"""What stands before the routes: keys, sizes, and who may be asked for."""

from __future__ import annotations

import codecs
import hmac
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError, ConfigError, bullet_list

log = logging.getLogger("theodora.serve")

LOOPBACK = ("127.0.0.1", "::1", "localhost")

_SHORT_KEY = 8  # characters; what has fewer can be guessed

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

    Blank lines, blanks around a key, lines that begin with # and a byte order mark are no part of a key, however the
    lines end.

    Raises:
        ConfigError: it cannot be read, is no UTF-8, holds no key, or a line that no client could send as a key.
    """
    if path is None:
        return frozenset()
    try:
        data = Path(path).expanduser().read_bytes()
    except (OSError, ValueError) as error:
        raise ConfigError(f"api_key_file {path} cannot be read: {error}") from error
    keys, problems = _keys_in(_text_of(path, data))
    if problems:
        raise ConfigError(f"api_key_file {path}:{bullet_list(problems)}")
    if not keys:
        raise ConfigError(f"api_key_file {path} holds no key; expected one on each line")
    if any(len(key) < _SHORT_KEY for key in keys):
        log.warning("%s has a key of less than %d characters, which can be guessed", path, _SHORT_KEY)
    if os.name == "posix" and Path(path).expanduser().stat().st_mode & 0o004:
        log.warning("%s can be read by every user of this machine, keys and all; chmod 600 mends that", path)
    return frozenset(keys)


def _text_of(path: str, data: bytes) -> str:
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ConfigError(f'api_key_file {path} is UTF-16 (Windows\' "Unicode"); expected UTF-8: save it as that')
    if b"\0" in data:
        raise ConfigError(f"api_key_file {path} holds NUL bytes: it is no text; expected UTF-8, a key on each line")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"api_key_file {path} is no UTF-8: {error.reason} at byte {error.start}") from error


def _keys_in(text: str) -> tuple[list[str], list[str]]:
    """The keys, and what is wrong with lines; no message shows a key."""
    keys: list[str] = []
    problems: list[str] = []
    # Not splitlines(), which also ends lines where a form feed or U+2028 stands: half a key would be a key.
    for number, line in enumerate(re.split("\r\n|\r|\n", text), 1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if re.search(r"\s#", key):
            problems.append(f"line {number} has a # after a blank; expected one key, comments on lines of their own")
        elif not key.isprintable():
            problems.append(f"line {number} holds characters that are not seen; expected a key alone")
        else:
            keys.append(key)
    return keys, problems


def inside(folder: str | Path, asked: str) -> Path:
    """The adapter folder that `asked` names within `folder`, with everything in it inside as well.

    Raises:
        CheckpointError: it is not there, or leads out.
    """
    root = Path(folder).resolve()
    # One answer for what is outside and what is not there, so that nobody can ask what else the disk holds.
    refusal = CheckpointError(f"There is no adapter {asked!r} in the adapter folder.")
    try:
        path = (root / asked).resolve(strict=True)
        files = list(path.iterdir()) if path.is_relative_to(root) and path.is_dir() else []
        if not files or not all(file.resolve(strict=True).is_relative_to(root) for file in files):
            raise refusal
    except (OSError, ValueError, RuntimeError) as error:
        raise refusal from error
    return path
