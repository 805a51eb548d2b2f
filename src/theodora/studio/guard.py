"""Who may ask the studio: the browser that was given the token, for this host alone, from this page alone.

It stands before the routes, so that none can forget it. A page of a stranger's in the same browser has three ways here,
and each is closed: it lets its own name point to the loopback (Host is looked at), it posts without asking (the cookie
is SameSite=Strict, and Origin is looked at, which has the port in it), or it shows the studio in a frame (headers).
"""

from __future__ import annotations

import hmac
import json
from typing import Any
from urllib.parse import parse_qs

from theodora.serve.guards import LOOPBACK, host_of

COOKIE = "theodora-studio"
LARGEST_BODY = 1 << 20
"""Bytes of a request that is no upload: a form has a few thousand."""
LARGEST_UPLOAD = 8 << 30
_HEADERS = {
    # Trusted types: not even our own script can put text into the page as markup, the browser refuses it.
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; form-action 'none'; base-uri 'none'; frame-ancestors 'none'; "
    "require-trusted-types-for 'script'; trusted-types 'none'",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Guard:
    """ASGI middleware: lets through who has the token, and gives every answer its headers.

    Args:
        app: what is guarded.
        token: the secret of this start.
        port: that is listened on; Host and Origin have it in them.
    """

    def __init__(self, app: Any, token: str, port: int) -> None:
        self.app, self.token = app, token
        self.port, self.cookie = port, f"{COOKIE}-{port}"  # cookies know no ports, and there may be two studios

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Let a request through, or answer it."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":  # no sockets are spoken here
            return

        async def with_headers(message: Any) -> None:
            if message["type"] == "http.response.start":
                own = [(key.encode(), value.encode()) for key, value in _HEADERS.items()]
                given = [(key, value) for key, value in message.get("headers", ()) if key.decode() not in _HEADERS]
                message = {**message, "headers": [*given, *own]}
            await send(message)

        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        if (refusal := self._refusal(scope, headers)) is not None:
            await _answer(with_headers, *refusal)
        elif scope["path"] == "/" and scope["query_string"]:
            # The token leaves the address, and with it bookmarks, screenshots and what is copied.
            cookie = f"{self.cookie}={self.token}; Path=/; HttpOnly; SameSite=Strict"
            await _answer(with_headers, 303, "", {"location": "/", "set-cookie": cookie})
        else:
            await self.app(scope, receive, with_headers)

    def _refusal(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        host = headers.get("host", "")
        if host_of(host) not in LOOPBACK or not host.endswith(f":{self.port}"):
            return 403, f"Host {host!r} is not this studio."
        if scope["method"] not in ("GET", "HEAD", "POST"):
            return 405, "Expected GET or POST."
        if scope["path"] == "/" and scope["query_string"]:
            given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])
            if scope["method"] == "POST" or not self._is_token(given[-1]):
                return 403, "This is not the token of this studio. Open the address that it printed last."
            return None
        if not self._is_token(_cookie(headers.get("cookie", ""), self.cookie)):
            return 403, "The studio opens by the address that `theodora studio` printed, with the token in it."
        return self._refusal_of_post(scope, headers) if scope["method"] == "POST" else None

    def _refusal_of_post(self, scope: Any, headers: dict[str, str]) -> tuple[int, str] | None:
        if headers.get("origin") != f"http://{headers['host']}":
            return 403, f"Origin {headers.get('origin')!r} is not this studio's page."
        uploads = scope["path"] == "/api/upload"
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != (expected := "application/octet-stream" if uploads else "application/json"):
            return 415, f"Expected a body of type {expected}."
        length = headers.get("content-length", "")
        if not length.isdigit() or len(length) > 18:
            return 411, "Expected a body whose length is said."
        if int(length) > (most := LARGEST_UPLOAD if uploads else LARGEST_BODY):
            return 413, f"Expected at most {most:,} bytes."
        return None

    def _is_token(self, given: str) -> bool:
        return hmac.compare_digest(given.encode(), self.token.encode())


def _cookie(header: str, name: str) -> str:
    pairs = (part.strip().partition("=") for part in header.split(";"))
    return next((value for key, _, value in pairs if key == name), "")


async def _answer(send: Any, status: int, message: str, more: dict[str, str] | None = None) -> None:
    body = json.dumps({"error": message}).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **(more or {})}
    pairs = [(key.encode(), value.encode()) for key, value in headers.items()]
    # What the client may still send is not read, so the connection cannot be used again.
    await send({"type": "http.response.start", "status": status, "headers": [*pairs, (b"connection", b"close")]})
    await send({"type": "http.response.body", "body": body})
