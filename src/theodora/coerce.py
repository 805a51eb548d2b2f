"""What YAML and command lines give → the types of a configuration's fields, without guessing."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from theodora.errors import shown


def coerce_all(values: Mapping[str, Any], config_class: type) -> tuple[dict[str, Any], list[str]]:
    """Each value as the type of its field, and complaints about those that cannot be."""
    coerced: dict[str, Any] = {}
    problems: list[str] = []
    hints = type_hints(config_class)
    for name, value in values.items():
        try:
            coerced[name] = coerce(value, hints[name])
        except ValueError as error:
            problems.append(f"{name} is {shown(value)}; expected {error}")
    return coerced, problems


@cache
def type_hints(config_class: type) -> dict[str, Any]:
    """The fields of a configuration class and their types. To be read alone: all callers get the same."""
    hints = get_type_hints(config_class)
    return {f.name: hints[f.name] for f in fields(config_class)}


_EXPECTED = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    tuple: "a list",
    list: "a list",
    dict: "a mapping",
    Mapping: "a mapping",
    type(None): "nothing",
}


def coerce(value: Any, hint: Any) -> Any:
    """Turn what YAML or a command line gave into the type of a field, without guessing.

    YAML reads `1e-3` as text, flags are all text, and lists arrive for fields that are tuples.

    Args:
        value: the value.
        hint: the field's annotation: a type, a `Literal`, or a union of them. Types unknown here pass any value.

    Raises:
        ValueError: what was expected, in words.
    """
    choices = alternatives(hint)
    kinds = [get_origin(choice) or choice for choice in choices]
    literals = [word for choice in choices if get_origin(choice) is Literal for word in get_args(choice)]
    if value is None and type(None) in kinds:
        return None
    if literals and value in literals:
        return value
    if isinstance(value, str | Path) and str in kinds:
        return _storable(str(value))
    if isinstance(value, str):
        value = _parse_scalar(value, kinds)
    if isinstance(value, bool):
        if bool in kinds:
            return value
    elif isinstance(value, int) and int in kinds:
        return value
    elif isinstance(value, int | float) and float in kinds and abs(value) < _TOO_LARGE:
        return float(value)
    elif isinstance(value, float) and float in kinds:  # NaN and infinity, which are for the ranges to refuse
        return value
    elif isinstance(value, float) and int in kinds and value.is_integer():
        return int(value)
    elif isinstance(value, str) and tuple in kinds:
        return split_names(value) or (value,)
    elif isinstance(value, list | tuple | set) and tuple in kinds:
        return tuple(value)
    elif any(isinstance(kind, type) and kind not in (bool, int, float) and isinstance(value, kind) for kind in kinds):
        return value
    if not all(kind in _EXPECTED or kind is Literal for kind in kinds):
        return value
    words = [_EXPECTED[kind] for kind in kinds if kind in _EXPECTED and kind is not type(None)]
    raise ValueError(" or ".join([*(["one of " + ", ".join(map(str, literals))] if literals else []), *words]))


def split_names(text: str) -> tuple[str, ...]:
    """The names in `q_proj,v_proj` or `q_proj, v_proj`, as other tools write lists; none where it is something else."""
    names = [name.strip() for name in text.split(",")]
    plain = len(names) > 1 and all(re.fullmatch(r"[\w.-]*", name) for name in names)
    return tuple(name for name in names if name) if plain else ()


_TOO_LARGE = 10**308
"""Whole numbers from here on have no float (the largest is 1.8e308)."""


def _storable(text: str) -> str:
    """The text, if files can be named after it and hold it."""
    if "\0" in text:
        raise ValueError("text without NUL characters")
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise ValueError("text without halves of characters (lone surrogates)")
    return text


def alternatives(hint: Any) -> list[Any]:
    """The types of a union, or the one type that it is not a union of."""
    if get_origin(hint) in (Union, UnionType):
        return [choice for part in get_args(hint) for choice in alternatives(part)]
    return [hint]


def _parse_scalar(text: str, kinds: list[Any]) -> Any:
    """Read a number or a truth value, if the field holds one; otherwise give the text back."""
    if bool in kinds and text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        if kind in kinds or float in kinds:
            try:
                return kind(text)
            except ValueError:
                pass
    return text
