"""What is wrong with a body, in words about the body: where it is, what is expected there, and what was found."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from theodora.errors import first_of

_FIELD = re.compile(r"\w+")
_KINDS = {"str", "bool", "int", "float", "dict", "list", "NamedTool", "ToolsAllowed", "CHAT", "TEXT", "FEW", "MANY"}
"""Pydantic's names for the kinds that a value may have, as they stand among the names of fields."""
_RENAMED = {"json_": "json", "schema_": "schema"}
_SHOWN = 60  # characters of what was found
_MOST = 8  # misses that are told
_LONGEST = 300  # characters of one

# kind of error -> what is expected; the names in braces are pydantic's
_EXPECTED = {
    "bool_parsing": "true or false",
    "bool_type": "true or false",
    "dict_type": "an object",
    "float_parsing": "a number",
    "float_type": "a number",
    "greater_than": "more than {gt}",
    "greater_than_equal": "at least {ge}",
    "int_from_float": "a whole number",
    "int_parsing": "a whole number",
    "int_type": "a whole number",
    "less_than": "less than {lt}",
    "less_than_equal": "at most {le}",
    "list_type": "a list",
    "literal_error": "{expected}",
    "model_attributes_type": "an object",
    "model_type": "an object",
    "string_pattern_mismatch": "a text like {pattern}",
    "string_too_long": "at most {max_length} characters",
    "string_too_short": "at least {min_length} character(s)",
    "string_type": "a text",
    "too_long": "at most {max_length} entries",
    "too_short": "at least {min_length} entry",
}


def told(errors: Iterable[Mapping[str, Any]]) -> str:
    """Pydantic's errors, each place once: a value that may be of several kinds has an error for each of them.

    Args:
        errors: as pydantic tells them, their places counted from the body.
    """
    expected: dict[tuple[str, str], list[str]] = {}
    others: list[tuple[str, str]] = []
    for error in errors:
        place, kind = place_of(error["loc"]), error["type"]
        context = {name: f"{value:g}" if isinstance(value, float) else value for name, value in _context(error)}
        if kind == "json_invalid":
            return f"The body is no JSON: {context.get('error', 'it cannot be read')}"
        if (wanted := _EXPECTED.get(kind)) is not None:
            kinds = expected.setdefault((place, _found(error.get("input"))), [])
            kinds.append(wanted.format(**context))
        elif kind == "missing":
            others.append((place, "expected, and not there"))
        else:
            others.append((place, error["msg"].removeprefix("Value error, ")))
    for (place, found), wanted in expected.items():
        others.append((place, f"expected {' or '.join(dict.fromkeys(wanted))}, found {found}"))
    places = {place for place, _ in others}
    # Where something within a value is wrong, it is of the kind that has such things.
    kept = [
        cut(f"{place or 'The body'}: {what}" if place or what.startswith("expected") else what, _LONGEST)
        for place, what in dict.fromkeys(others)
        if not place or not any(other.startswith(f"{place}.") for other in places)
    ]
    return few(kept)


def _context(error: Mapping[str, Any]) -> Iterable[tuple[str, Any]]:
    return error.get("ctx", {}).items()


def place_of(parts: Sequence[Any]) -> str:
    """Where in the body, by the names that the body has."""
    named = [part for part in parts if isinstance(part, int) or (_FIELD.fullmatch(part) and part not in _KINDS)]
    return ".".join(cut(_RENAMED.get(str(part), str(part)), _SHOWN) for part in named)


def cut(text: str, most: int) -> str:
    """A text of at most so many characters, and a sign where some are left out."""
    return text if len(text) <= most else text[:most] + "…"


def few(told: Sequence[str], most: int = _MOST) -> str:
    """The first of several, and how many more there are."""
    return "; ".join(first_of(told, most))


def _found(value: Any) -> str:
    if isinstance(value, list | dict) and len(value) > _SHOWN:  # pyright: ignore[reportUnknownArgumentType]
        return f"{'a list' if isinstance(value, list) else 'an object'} of {len(value)}"  # pyright: ignore[reportUnknownArgumentType]
    text = ""
    try:
        for piece in json.JSONEncoder().iterencode(value[: _SHOWN + 1] if isinstance(value, str) else value):
            text += piece
            if len(text) > _SHOWN:  # the rest may be megabytes
                break
    except (TypeError, ValueError):
        text = type(value).__name__
    return cut(text, _SHOWN)
