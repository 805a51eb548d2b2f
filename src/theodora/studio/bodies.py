"""Bodies of requests, and what is wrong with what was typed."""

from __future__ import annotations

import json
from typing import Any

from fastapi import Request

from theodora.errors import TheodoraError, UsageError, bullet_list


class Mistyped(TheodoraError):
    """Fields make no sense; `problems` says of each what is wrong."""

    def __init__(self, problems: dict[str, str]) -> None:
        super().__init__("What was typed makes no sense:" + bullet_list(list(problems.values())))
        self.problems = problems


async def body_of(request: Request) -> dict[str, Any]:
    """The JSON mapping of a request.

    Raises:
        UsageError: it is something else.
    """
    try:
        given = await request.json()
        json.dumps(given, ensure_ascii=False).encode()  # halves of characters have no place in files or answers
    except (ValueError, RecursionError) as error:
        raise UsageError("The body is no JSON text.") from error
    return mapping(given)


def mapping(given: Any) -> dict[str, Any]:
    """A mapping of names to values.

    Raises:
        UsageError: it is something else.
    """
    if not isinstance(given, dict):
        raise UsageError("Expected a mapping of names to values.")
    return given
