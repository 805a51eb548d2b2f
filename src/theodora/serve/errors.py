"""What a server tells those whose request it does not take, or cannot finish. `app.py` has the status of each error."""

from __future__ import annotations

import json
from dataclasses import dataclass

from theodora.errors import TheodoraError
from theodora.serve.misses import cut

_LONGEST = 4000  # characters of a message; what it quotes of a request may be megabytes


class Busy(TheodoraError):
    """As many requests run and wait as may."""


class UnknownModel(TheodoraError):
    """No such model or adapter."""


class Unavailable(TheodoraError):
    """The worker has failed, or the server is stopping."""


@dataclass(frozen=True)
class ErrorReply:
    """An error as it goes over the wire."""

    status: int
    body: bytes
    headers: dict[str, str]


def error_reply(status: int, message: str, kind: str, **headers: str) -> ErrorReply:
    """An error as OpenAI's clients read it.

    Args:
        status: of HTTP.
        message: for people.
        kind: OpenAI's name for errors of this kind.
        **headers: more headers.
    """
    error = {"message": cut(message, _LONGEST), "type": kind, "param": None, "code": status}
    return ErrorReply(status, json.dumps({"error": error}).encode(), {"content-type": "application/json", **headers})
