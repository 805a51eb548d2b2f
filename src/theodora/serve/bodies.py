"""A request's body, from bytes to a checked request: JSON of a bounded shape; what is wrong with it is told briefly."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn

from fastapi import Request
from pydantic import TypeAdapter, ValidationError

from theodora.errors import ConfigError
from theodora.serve.daemon_threads import LONG
from theodora.serve.misses import describe_misses

_DEEPEST = 128  # lists and objects in each other: readers and templates go down them by recursion
_MOST_PIECES = 100_000  # lists, objects and keys: megabytes of text can hold millions of them, each an object in memory
_STRING = re.compile(r'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)
"""A text, also one that never ends: were that no match, each quote in it would begin another search to the end."""

_HALF = re.compile("[\ud800-\udfff]|\\\\u[dD][89a-fA-F]")
"""Where half a character may be: no answer that repeats it could be sent."""


def body_of(kind: Any) -> Callable[[Request], Awaitable[Any]]:
    """A dependency that reads the body as `kind`, long ones in a thread of the application's `state.reading`.

    Raises:
        ConfigError: it is none, in words about the body.
    """
    adapter: TypeAdapter[Any] = TypeAdapter(kind)

    def read(body: bytes) -> Any:
        return validated(adapter, parsed(body))

    async def reader(request: Request) -> Any:
        # Not request.body(), which would keep the bytes for as long as the answer takes.
        body = (await request.receive()).get("body", b"")
        return await request.app.state.reading(read, body) if len(body) > LONG else read(body)

    return reader


def parsed(body: bytes) -> Any:
    """The JSON that a body holds.

    Raises:
        ConfigError: it holds none, or one that is nested too deeply, or in too many pieces.
    """
    if not body:
        raise ConfigError("The body is empty; expected a JSON object.")
    try:
        text = body.decode(json.detect_encoding(body), "surrogatepass")
        check_pieces(text)
        value = json.loads(text, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise _deep() from None
    except ValueError as error:  # of JSON, of UTF-8, or a number of thousands of digits
        raise ConfigError(f"The body is no JSON: {str(error)[:200]}") from None
    check_depth(value)
    if _HALF.search(text):
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ConfigError("The body holds half a character; expected whole ones.") from None
    return value


def check_pieces(text: str) -> None:
    """Refuse JSON of too many lists, objects and keys, before they are made: each is looked at again and again.

    Raises:
        ConfigError: naming the limit.
    """
    if _count(text) > _MOST_PIECES and _count(_STRING.sub("", text)) > _MOST_PIECES:
        raise ConfigError(f"The body holds more than {_MOST_PIECES} lists, objects and keys; expected fewer.")


def _count(text: str) -> int:
    return text.count("[") + text.count("{") + text.count(":")


def check_depth(value: Any) -> None:
    """Refuse what is nested too deeply.

    Raises:
        ConfigError: naming the limit.
    """
    level, deep = [value] if isinstance(value, dict | list) else [], 0
    while level:
        deep += 1
        if deep > _DEEPEST:
            raise _deep()
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]


def validated(adapter: TypeAdapter[Any], value: Any) -> Any:
    """What was asked.

    Raises:
        ConfigError: it is something else, and where.
    """
    try:
        return adapter.validate_python(value)
    except ValidationError as error:
        raise ConfigError(describe_misses(error.errors(include_url=False))) from None
    except UnicodeEncodeError:  # pydantic's
        raise ConfigError("The body holds half a character; expected whole ones.") from None


def _deep() -> ConfigError:
    return ConfigError(f"The body is nested too deeply; expected at most {_DEEPEST} lists and objects in each other.")


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")


def _finite(text: str) -> float:
    if math.isinf(number := float(text)):
        raise ValueError(f"{text[:40]} is too large a number")
    return number
