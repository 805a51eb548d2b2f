"""Calls that are JSON objects: {"name": "f", "arguments": {…}}, in the orders and by the names that models write."""

from __future__ import annotations

import json
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any

from theodora.serve.calls.source import Reader, Source, compiled

_STRING = r'"((?:[^"\\]|\\.){0,256})"'
# Name and arguments in the usual order: the arguments go out while they are written.
_HEAD = compiled(rf'\{{\s*"name"\s*:\s*{_STRING}\s*,\s*"(?:arguments|parameters)"\s*:\s*(?=\{{)')
_KEY = compiled(rf"\{{\s*{_STRING}\s*:")
_FIRST_KEYS = {
    "name",
    "tool_name",
    "function",
    "arguments",
    "parameters",
    "input",
    "id",
    "tool_call_id",
    "type",
    "index",
}
_NAMES = ("name", "tool_name", "function")
_ARGUMENTS = ("arguments", "parameters", "input")
_IDS = ("id", "tool_call_id")


def json_call(source: Source, known: frozenset[str] | None = None) -> Generator[None, None, bool]:
    """Read the object at this place if it is a call; whether it is. If it is none, nothing is read.

    Args:
        source: stands before a `{`.
        known: the only names that are calls; None for any.
    """
    start = source.at
    head = yield from source.pattern(_HEAD)
    if head is not None:
        name = _unescaped(head[1])
        if name is not None and (known is None or name in known):
            source.call(name)
            if (yield from stream_object(source)):
                yield from _rest_of_object(source)
            return True
        source.at = start
        return False
    key = yield from source.pattern(_KEY)  # other objects need not be waited for
    source.at = start
    if key is None or key[1] not in _FIRST_KEYS:
        return False
    entry = yield from whole_object(source)
    call = None if entry is None else _call_of(entry)
    if call is None or (known is not None and call.name not in known):
        source.at = start
        return False
    source.call(call.name, call.id)
    source.argue(call.arguments)
    return True


def json_calls(source: Source, known: frozenset[str] | None = None) -> Generator[None, None, bool]:
    """Read one call, or a list of them; whether there was one. If there was none, nothing is read."""
    yield from source.space()
    start = source.at
    listed = (yield from source.literal("[")) is not None
    if listed:
        yield from source.space()
    if (yield from source.peek()) != "{" or not (yield from json_call(source, known)):
        source.at = start
        return False
    while True:
        after = source.at
        yield from source.space()
        if (yield from source.literal(",", ";")) is not None:
            yield from source.space()
        if (yield from source.peek()) != "{" or not (yield from json_call(source, known)):
            source.at = after
            break
    if listed:
        yield from source.space()
        yield from source.literal("]")
    return True


def stream_object(source: Source) -> Generator[None, None, bool]:
    """Bring the JSON object at this place as arguments, while it is written; whether it came to its end."""
    scan = _Scan()
    while True:
        begin = source.at
        end = scan.end(source.text, begin)
        source.at = len(source.text) if end is None else end
        source.argue(source.text[begin : source.at])
        if end is not None:
            return True
        if source.ended:
            return False
        yield


def whole_object(source: Source) -> Generator[None, None, dict[str, Any] | None]:
    """The JSON object at this place, which is read; None if it is none, or does not end."""
    scan, begin, at = _Scan(), source.at, source.at
    while True:
        end = scan.end(source.text, at)
        if end is not None:
            break
        at = len(source.text)
        if source.ended:
            return None
        yield
    source.at = end
    try:
        value = json.loads(source.text[begin:end])
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _rest_of_object(source: Source) -> Reader:
    """Skip what stands between the arguments and the end of the object they are in."""
    yield from source.space()
    if (yield from source.literal("}")) is None and (yield from source.peek()) == ",":
        scan = _Scan(depth=1)
        while (end := scan.end(source.text, source.at)) is None and not source.ended:
            source.at = len(source.text)
            yield
        source.at = len(source.text) if end is None else end


@dataclass(frozen=True)
class _WholeCall:
    name: str
    arguments: str
    """As JSON."""
    id: str | None


def _call_of(entry: dict[str, Any]) -> _WholeCall | None:
    """The call that an object is; None if it is none."""
    inner = entry.get("function")
    id = next((str(entry[key]) for key in _IDS if isinstance(entry.get(key), str | int)), None)
    if isinstance(inner, dict):  # as OpenAI's protocol nests it
        entry = inner
    name = next((entry[key] for key in _NAMES if isinstance(entry.get(key), str)), None)
    if not name:
        return None
    arguments = next((entry[key] for key in _ARGUMENTS if key in entry), {})
    if isinstance(arguments, str):
        return _WholeCall(name, arguments, id)
    if not isinstance(arguments, dict | None):
        return None
    return _WholeCall(name, json.dumps(arguments or {}, ensure_ascii=False), id)


def _unescaped(text: str) -> str | None:
    try:
        return json.loads(f'"{text}"')
    except ValueError:
        return None


class _Scan:
    """Finds the end of a JSON object, over text that comes in pieces."""

    def __init__(self, depth: int = 0) -> None:
        self._depth = depth
        self._quoted = self._escaped = False

    def end(self, text: str, start: int) -> int | None:
        """Where the object has ended; None if it has not."""
        for at in range(start, len(text)):
            letter = text[at]
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped, self._quoted = letter == "\\", letter != '"'
            elif letter == '"':
                self._quoted = True
            elif letter in "{[":
                self._depth += 1
            elif letter in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    return at + 1
        return None
