"""Arguments that are not JSON, as JSON values: text between tags, Gemma's and Python's literals."""

from __future__ import annotations

import ast
import json
import warnings
from collections.abc import Mapping
from typing import Any

GEMMA_QUOTE = '<|"|>'
Schemas = Mapping[str, Mapping[str, Any]]
"""Name of a tool -> the JSON schema of its arguments."""

_DEEPEST = 64


def text_value(text: str, tool: str, key: str, schemas: Schemas) -> Any:
    """The value that stands between two tags as text: JSON, unless the tool's schema says that it is a string."""
    schema = _property(schemas.get(tool), key)
    if isinstance(schema, Mapping) and text.strip() in (schema.get("enum") or ()):
        return text.strip()
    kinds = _kinds(schema)
    if kinds == {"string"}:
        return text
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = _python_word(text)
    if isinstance(value, str) or (kinds and "string" in kinds and _kind(value) not in kinds):
        return text
    return value


def _property(schema: Mapping[str, Any] | None, key: str) -> Any:
    properties = (schema or {}).get("properties")
    return properties.get(key) if isinstance(properties, Mapping) else None


def _kinds(schema: Any) -> set[str]:
    """The types that a schema allows; empty where it leaves them open."""
    if not isinstance(schema, Mapping):
        return set()
    kind = schema.get("type")
    if isinstance(kind, str):
        return {kind}
    if isinstance(kind, list):
        return {str(name) for name in kind}
    if isinstance(values := schema.get("enum"), list):
        return {_kind(value) for value in values}
    for word in ("anyOf", "oneOf"):
        if isinstance(choices := schema.get(word), list):
            kinds = [_kinds(choice) for choice in choices]
            return set().union(*kinds) if all(kinds) else set()
    return set()


def _kind(value: Any) -> str:
    kinds = {bool: "boolean", int: "integer", float: "number", str: "string", list: "array", dict: "object"}
    return kinds.get(type(value), "null")


def _python_word(text: str) -> Any:
    words = {"True": True, "False": False, "None": None}
    return words.get(text.strip(), text)


def gemma_object(text: str) -> dict[str, Any] | None:
    """{key:<|"|>text<|"|>,other:[1,true]} as an object; None if it is something else."""
    try:
        value, at = _gemma(text, _skip(text, 0), 0)
    except (ValueError, IndexError):
        return None
    return value if isinstance(value, dict) and _skip(text, at) == len(text) else None


def _gemma(text: str, at: int, depth: int) -> tuple[Any, int]:
    if depth > _DEEPEST:
        raise ValueError
    if text.startswith(GEMMA_QUOTE, at):
        begin = at + len(GEMMA_QUOTE)
        end = text.index(GEMMA_QUOTE, begin)
        return text[begin:end], end + len(GEMMA_QUOTE)
    if text[at] == '"':  # as JSON, which small models fall back to
        return json.JSONDecoder().raw_decode(text, at)
    if text[at] not in "{[":
        end = at
        while end < len(text) and text[end] not in ",}]":
            end += 1
        word = text[at:end].strip()
        return _word(word), end
    pairs, items = text[at] == "{", []
    closing = "}" if pairs else "]"
    at = _skip(text, at + 1)
    while text[at] != closing:
        if pairs:
            key, at = _gemma_key(text, at)
            value, at = _gemma(text, _skip(text, at), depth + 1)
            items.append((key, value))
        else:
            value, at = _gemma(text, at, depth + 1)
            items.append(value)
        at = _skip(text, at)
        if text[at] == ",":
            at = _skip(text, at + 1)
    return dict(items) if pairs else items, at + 1


def _gemma_key(text: str, at: int) -> tuple[str, int]:
    for quote in (GEMMA_QUOTE, '"'):
        if text.startswith(quote, at):
            end = text.index(quote, at + len(quote))
            return text[at + len(quote) : end], text.index(":", end) + 1
    colon = text.index(":", at)
    return text[at:colon].strip(), colon + 1


def _word(word: str) -> Any:
    if not word:
        raise ValueError
    try:
        return json.loads(word)
    except ValueError:
        return _python_word(word)


def _skip(text: str, at: int) -> int:
    while at < len(text) and text[at].isspace():
        at += 1
    return at


def python_call(text: str, names: Mapping[str, list[str]]) -> tuple[str, dict[str, Any]] | None:
    """Name and arguments of `f(a=1, b="x")`; None if it is something else.

    Args:
        text: the call.
        names: name of a tool -> its arguments' names in order, for those that are given without.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a backslash too much
            node = ast.parse(text.strip(), mode="eval").body
        if not isinstance(node, ast.Call):
            return None
        name = ast.unparse(node.func)
        order = names.get(name, [])
        if len(node.args) > len(order):
            return None
        pairs = [*zip(order, node.args, strict=False), *((word.arg, word.value) for word in node.keywords)]
        return name, {key: _literal(value) for key, value in pairs if key is not None}
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> Any:
    if isinstance(node, ast.Name) and node.id in ("true", "false", "null"):  # JSON's
        return {"true": True, "false": False, "null": None}[node.id]
    if isinstance(node, ast.List | ast.Tuple | ast.Set):
        return [_literal(item) for item in node.elts]
    if isinstance(node, ast.Dict):
        return {str(_literal(key)): _literal(value) for key, value in zip(node.keys, node.values, strict=True) if key}
    value = ast.literal_eval(node)
    json.dumps(value)  # complex numbers and bytes are no JSON
    return value
