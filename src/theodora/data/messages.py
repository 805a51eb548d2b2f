"""Turns of a conversation in anybody's spelling → messages with `role` and `content`, as chat templates expect them."""

from __future__ import annotations

import json
import re
from typing import Any

from theodora.config import is_int
from theodora.data.problems import nearest
from theodora.errors import shown
from theodora.parse import parse_json

Message = dict[str, Any]

_NUMBER = re.compile(r"\d\.\d|\d[eE]|\d{10}")

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
    "observation": "tool",
    "function_response": "tool",
}
# What chat templates read beside role and content and `tool_calls`.
_TEXTS = ("reasoning_content", "tool_call_id", "name")


def user(content: str) -> Message:
    """A user's turn."""
    return {"role": "user", "content": content}


def assistant(content: str) -> Message:
    """A model's turn."""
    return {"role": "assistant", "content": content}


def read_turns(value: Any, column: str, problems: list[str]) -> list[Message]:
    """A cell that holds a conversation, as messages; what is wrong is appended to `problems`.

    Turns may be spelt `{"role", "content"}` or, as in ShareGPT, `{"from", "value"}`. Text in JSON (from a CSV cell) is
    read too.
    """
    if isinstance(value, str):
        value = parsed_or_same(value)
    if not isinstance(value, list) or not value:
        problems.append(f"{column!r} is {describe(value)}; expected a list of turns")
        return []
    messages = [_read_turn(turn, f"turn {number} of {column!r}", problems) for number, turn in enumerate(value, 1)]
    return [message for message in messages if message]


def check_answered(messages: list[Message], column: str, problems: list[str]) -> None:
    """Note a conversation that has nothing to learn from."""
    if not any(message["role"] == "assistant" and message.get("weight") != 0 for message in messages):
        problems.append(f"{column!r} has no assistant turn, so there is nothing to learn from it")


def read_text(value: Any, what: str, problems: list[str]) -> str:
    """A cell that holds text (or text parts, as the OpenAI API writes them); what is wrong goes to `problems`."""
    if isinstance(value, list) and value and all(isinstance(part, dict) and "type" in part for part in value):
        kinds = sorted({str(part["type"]) for part in value} - {"text"})
        if kinds:
            problems.append(f"{what} has parts of type {', '.join(kinds)}; only text can be trained on here")
            return ""
        value = "".join(str(part.get("text") or "") for part in value)
    if not isinstance(value, str):
        problems.append(f"{what} is {describe(value)}; expected text")
        return ""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            problems.append(f"{what} holds half a character (a lone surrogate) at position {error.start + 1}")
            return ""
    return value


def describe(value: Any) -> str:
    """A value in an error message: its kind, and as much of it as fits."""
    if value is None:
        return "null"
    text = shown(value)
    return f"the {type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"


def parsed_or_same(text: str) -> Any:
    """What a JSON text holds, or the text itself."""
    try:
        return parse_json(text)
    except ValueError:
        return text


def storable_json(value: Any, what: str, problems: list[str]) -> str:
    """A value as JSON text; one that JSON cannot say goes to `problems`."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        problems.append(f"{what} is nothing that JSON can say ({error}): {describe(value)}")
        return ""
    return text


def calls_of(message: Message) -> Any:
    """The tool calls of a message, which may be stored as JSON text."""
    calls = message.get("tool_calls")
    return parsed_or_same(calls) if isinstance(calls, str) else calls


def _read_extras(turn: Message, what: str, problems: list[str]) -> Message:
    extras: Message = {}
    for key in _TEXTS:
        if (value := turn.get(key)) is not None:
            extras[key] = value if is_int(value) else read_text(value, f"{key} of {what}", problems)
    # OpenAI's, which keeps an answer out of the loss.
    if (weight := turn.get("weight")) is not None:
        if weight not in (0, 1):
            problems.append(f"weight of {what} is {describe(weight)}; expected 0 (not learned) or 1")
        extras["weight"] = weight
    if (calls := calls_of(turn)) is not None:
        if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
            problems.append(f"tool_calls of {what} is {describe(calls)}; expected a list of calls")
        text = storable_json(calls, f"tool_calls of {what}", problems)
        extras["tool_calls"] = calls if _survives_ujson(text) else text
    return extras


def _survives_ujson(text: str) -> bool:
    """Whether datasets' JSON column gives back what it was given: it rounds numbers to ten digits."""
    return _NUMBER.search(text) is None


def _read_turn(turn: Any, what: str, problems: list[str]) -> Message:
    if not isinstance(turn, dict):
        problems.append(f"{what} is {describe(turn)}; expected an object with role and content")
        return {}
    name = turn.get("role") if turn.get("role") is not None else turn.get("from")
    role = ROLES.get(name.strip().lower()) if isinstance(name, str) else None
    if role is None:
        known = "system, user, assistant, tool (or human, gpt, …)"
        hint = nearest(name, list(ROLES)) if isinstance(name, str) else ""
        problems.append(f"{what} has the role {shown(name)}; expected {known}{hint}")
        return {}
    content = turn.get("content") if turn.get("content") is not None else turn.get("value")
    extras = _read_extras(turn, what, problems)
    if content is None and extras.get("tool_calls"):
        content = ""
    text = read_text(content, f"{what} ({role})", problems)
    if isinstance(content, str) and role == "assistant" and not text.strip() and not extras.get("tool_calls"):
        problems.append(f"{what} is an empty assistant turn")
    return {"role": role, "content": text, **extras}
