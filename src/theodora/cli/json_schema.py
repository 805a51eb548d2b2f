"""Configuration classes as JSON Schema (2020-12): what `coerce` takes for each field, and what its docstring says.

YAML leaves open whether `1e-3` is a number or text (in YAML 1.1, which Python reads, it is text), so that numbers may
be text that reads as one, here as in `coerce`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any, Literal, get_args, get_origin

from theodora.cli.arguments import field_docstrings
from theodora.coerce import alternatives, type_hints

DIALECT = "https://json-schema.org/draft/2020-12/schema"
_WHOLE = r"\s*[+-]?\d[\d_]*\s*"
_NUMBER = r"\s*[+-]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)([eE][+-]?\d+)?\s*"
_TRUTH = "[Tt][Rr][Uu][Ee]|[Ff][Aa][Ll][Ss][Ee]"

Schema = dict[str, Any]


def properties_of(config_class: type, leave_out: Sequence[str] = ()) -> dict[str, Schema]:
    """A schema for every field of a configuration class: type, default, and its docstring as the description."""
    hints, texts = type_hints(config_class), field_docstrings(config_class)
    return {
        f.name: described(
            type_schema(hints[f.name]),
            texts.get(f.name, ""),
            f.default if f.default_factory is MISSING else f.default_factory(),
        )
        for f in fields(config_class)
        if f.name not in leave_out
    }


def described(schema: Schema, text: str, default: Any = None) -> Schema:
    """The schema with a description, and with a default unless that is what leaving it out means anyway."""
    words = " ".join(text.split())
    if isinstance(default, Enum):
        default = default.value
    told = default not in (None, MISSING, (), "") and isinstance(default, bool | int | float | str | tuple)
    return {
        **({"description": words} if words else {}),
        **schema,
        **({"default": list(default) if isinstance(default, tuple) else default} if told else {}),
    }


def type_schema(hint: Any) -> Schema:
    """What `coerce(value, hint)` takes. A type that it does not know takes anything."""
    choices = alternatives(hint)
    kinds = [get_origin(choice) or choice for choice in choices]
    if any(kind not in _TYPES and kind is not Literal for kind in kinds):
        return {}
    words = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    others = [choice for choice in choices if get_origin(choice) is not Literal]
    if words and type(None) in kinds:
        words.append(None)
        others = [choice for choice in others if choice is not type(None)]
    if words and not others:
        return {"enum": words}
    plain = _union(others)
    return {"anyOf": [{"enum": words}, plain]} if words else plain


def _union(choices: list[Any]) -> Schema:
    """One schema for several types: keywords such as `pattern` and `items` concern values of one type alone."""
    types: list[str] = []
    patterns: list[str] = []
    schema: Schema = {}
    for choice in choices:
        kind, inner = get_origin(choice) or choice, get_args(choice)
        types.append(_TYPES[kind])
        if kind in _PATTERNS:
            patterns.append(_PATTERNS[kind])
        elif kind in (tuple, list) and inner and (items := type_schema(inner[0])):
            schema["items"] = items
        elif kind in (dict, Mapping) and len(inner) == 2 and (values := type_schema(inner[1])):
            schema["additionalProperties"] = values
        if kind is tuple and inner and inner[0] in (str, Any):
            types.append("string")  # one name, or several with commas
    if patterns and "string" not in types:
        types.append("string")
        schema["pattern"] = f"^({'|'.join(patterns)})$"
    if "number" in types and "integer" in types:
        types.remove("integer")
    types = list(dict.fromkeys(types))
    return {"type": types[0] if len(types) == 1 else types, **schema}


_TYPES = {
    bool: "boolean",
    int: "integer",
    float: "number",
    str: "string",
    tuple: "array",
    list: "array",
    Sequence: "array",
    dict: "object",
    Mapping: "object",
    type(None): "null",
}
_PATTERNS = {bool: _TRUTH, int: _WHOLE, float: _NUMBER}
