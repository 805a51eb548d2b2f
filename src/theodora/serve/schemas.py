"""JSON schemas of strangers: how large they may be, and what of them would not be enforced."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from theodora.errors import ConfigError

MOST_CHARACTERS = 200_000
"""Of a schema, an expression or a grammar: longer ones take long to compile."""
MOST_OPTIONAL = 5000
"""Optional parts of an expression or a grammar: a row of them takes memory by its square. (50,000 took 10 GB.)"""
_OPTIONAL = re.compile(r"""[?*{]|\|\s*[|)]|\(\s*\||""|''""")
_DEEPEST, _MOST_REFERENCES = 64, 500  # levels, and references: each level and reference is compiled by recursion

# What xgrammar reads over: to take it would be a promise that is not kept.
_UNENFORCED = (
    *("not", "if", "then", "else", "contains", "minContains", "maxContains"),
    *("dependentRequired", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef", "unevaluatedItems"),
)
_ANNOTATIONS = {
    "title",
    "description",
    "default",
    "examples",
    "example",
    "deprecated",
    "readOnly",
    "writeOnly",
    "nullable",
}
_SAID = _ANNOTATIONS | {"$defs", "definitions", "$schema", "$id", "$comment", "$anchor", "discriminator", "strict"}
_OF_TYPE = {
    "string": ("minLength", "maxLength", "pattern", "format"),
    "number": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "object": ("properties", "required", "additionalProperties", "patternProperties", "propertyNames", "minProperties"),
}
# xgrammar writes the letters of a pattern into the JSON as they are, unescaped; out of a class of letters it leaves
# those that would have to be escaped.
_CLASS = re.compile(r"\[(?:\\.|[^\]\\])*\]", re.DOTALL)
_UNWRITTEN = re.compile(r'"|\\\\|\\[ntrfv0]|\\x([01]|22|5[cC])|\\u00([01]|22|5[cC])|[\x00-\x1f]')
_INNER = ("items", "additionalProperties", "propertyNames", "unevaluatedProperties")
_LISTS = ("anyOf", "oneOf", "allOf", "prefixItems")
_MAPS = ("properties", "patternProperties", "$defs", "definitions")


def check_size(value: Any, what: str) -> None:
    """Refuse what would take too long, or too much, to compile.

    Raises:
        ConfigError: naming the limit.
    """
    try:
        text = value if isinstance(value, str) else json.dumps(value)
    except (RecursionError, ValueError) as error:
        raise ConfigError(f"{what} is nested too deeply.") from error
    if len(text) > MOST_CHARACTERS:
        raise ConfigError(f"{what} has {len(text)} characters; expected at most {MOST_CHARACTERS}.")
    if isinstance(value, str):
        return
    if (deep := _depth(value)) > _DEEPEST:
        raise ConfigError(f"{what} is nested {deep} deep; expected at most {_DEEPEST}.")
    if (count := text.count('"$ref"')) > _MOST_REFERENCES:
        raise ConfigError(f"{what} has {count} references ($ref); expected at most {_MOST_REFERENCES}.")
    check_optional(list(_expressions(value)), what)


def check_optional(expressions: list[str], what: str) -> None:
    """Refuse expressions and grammars that would take too much memory to compile.

    Raises:
        ConfigError: naming the limit.
    """
    cost = sum(len(_OPTIONAL.findall(text)) ** 2 for text in expressions)
    if cost > MOST_OPTIONAL**2:
        raise ConfigError(
            f"{what} has about {int(cost**0.5)} optional parts (of several expressions, the root of the sum of their "
            f"squares); expected at most {MOST_OPTIONAL}."
        )


def _expressions(value: Any) -> Iterator[str]:
    """Expressions and grammars, wherever they stand."""
    if isinstance(value, Mapping):
        yield from (text for name in ("pattern", "grammar") if isinstance(text := value.get(name), str))
        if isinstance(named := value.get("patternProperties"), Mapping):
            yield from named
    inner = value.values() if isinstance(value, Mapping) else value if isinstance(value, list) else ()
    for item in inner:
        yield from _expressions(item)


def _depth(value: Any) -> int:
    deep, level = 0, [value]
    while level:
        deep += 1
        level = [
            inner
            for item in level
            for inner in (item.values() if isinstance(item, Mapping) else item if isinstance(item, list) else ())
        ]
    return deep - 1


def enforceable(schema: Any, what: str = "The schema") -> Any:
    """The schema in words that xgrammar enforces, which may allow less than before, and never more.

    Raises:
        ConfigError: it asks for something that would not be enforced, with its place.
    """
    problems = [f"{place or 'the schema itself'}: {problem}" for place, problem in _problems(schema, "")]
    if problems:
        raise ConfigError(f"{what} asks for what cannot be kept to: " + "; ".join(problems[:5]) + ".")
    return narrowed(schema)


def narrowed(schema: Any) -> Any:
    """The schema with implied types and properties written out: without these xgrammar reads over parts of it."""
    if not isinstance(schema, Mapping):
        return schema
    new: dict[str, Any] = {}
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            new[key] = {name: narrowed(inner) for name, inner in value.items()}
        elif key in _LISTS and isinstance(value, list):
            new[key] = [narrowed(inner) for inner in value]
        else:
            new[key] = narrowed(value) if key in _INNER else value
    if not {"type", "enum", "const", "$ref", *_LISTS[:3]} & new.keys():
        kind = next((kind for kind, words in _OF_TYPE.items() if any(word in new for word in words)), None)
        if kind is not None:
            new["type"] = kind
    if (
        new.get("type") == "string"
        and {"minLength", "maxLength"} & new.keys()
        and not {"pattern", "format"} & new.keys()
    ):
        # By itself xgrammar lets control characters through here, which are no JSON.
        least, most = new.pop("minLength", 0), new.pop("maxLength", "")
        new["pattern"] = rf'^[^"\\\x00-\x1f]{{{least},{most}}}$'
    if isinstance(required := new.get("required"), list) and new.get("type") == "object":
        more = new.get("additionalProperties", True)
        known = new.get("properties") or {}
        missing = [name for name in required if name not in known]
        if missing and more is not False:
            new["properties"] = {**known, **{name: more if isinstance(more, Mapping) else {} for name in missing}}
    return new


def _problems(schema: Any, place: str) -> Iterator[tuple[str, str]]:
    if not isinstance(schema, Mapping):
        return
    for word in _UNENFORCED:
        if word in schema:
            yield place, f"{word!r} is not supported"
    if schema.get("uniqueItems"):
        yield place, "'uniqueItems' is not supported"
    if len(schema.get("allOf") or ()) > 1:
        yield place, "'allOf' of several schemas is not supported; write them as one"
    reference = schema.get("$ref")
    if isinstance(reference, str) and not reference.startswith("#"):
        yield place, f"{reference!r} is not within the schema"
    for word in ("$ref", "anyOf", "oneOf", "allOf", "enum", "const"):
        if word in schema and (beside := sorted(schema.keys() - _SAID - {word} - _redundant(schema, word))):
            yield place, f"{', '.join(map(repr, beside))} beside {word!r} is not supported; move it inside"
    yield from ((place, problem) for problem in _of_numbers_and_strings(schema))
    for key, value in schema.items():
        if key in _MAPS and isinstance(value, Mapping):
            for name, inner in value.items():
                yield from _problems(inner, f"{place}.{key}.{name}".lstrip("."))
        elif key in _LISTS and isinstance(value, list):
            for at, inner in enumerate(value):
                yield from _problems(inner, f"{place}.{key}.{at}".lstrip("."))
        elif key in _INNER:
            yield from _problems(value, f"{place}.{key}".lstrip("."))


def _of_numbers_and_strings(schema: Mapping[str, Any]) -> Iterator[str]:
    bounds = {"minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"} & schema.keys()
    if "multipleOf" in schema and (bounds or schema.get("type") != "integer"):
        yield "'multipleOf' is supported of integers without bounds"
    if {"pattern", "format"} & schema.keys() and {"minLength", "maxLength"} & schema.keys():
        yield "a length beside 'pattern' or 'format' is not supported; say it in the pattern"
    for pattern in [schema.get("pattern"), *(schema.get("patternProperties") or ())]:
        if isinstance(pattern, str) and any(look in pattern for look in ("(?=", "(?!", "(?<")):
            yield f"looking ahead or behind ({pattern!r}) is not supported"
        if isinstance(pattern, str) and _UNWRITTEN.search(_CLASS.sub("", pattern)):
            yield f"a quote, a backslash, or a control character in a pattern ({pattern!r}) is not supported"


def _redundant(schema: Mapping[str, Any], word: str) -> set[str]:
    """A type beside values that all have it says nothing."""
    if word not in ("enum", "const"):
        return set()
    values = schema["enum"] if word == "enum" else [schema["const"]]
    kinds = schema.get("type")
    kinds = [kinds] if isinstance(kinds, str) else kinds
    if not isinstance(kinds, list) or not isinstance(values, list):
        return set()
    types = {
        "string": (str,), "integer": (int,), "number": (int, float), "boolean": (bool,), "null": (type(None),),
        "array": (list,), "object": (dict,),
    }  # fmt: skip

    def is_of(value: Any, kind: Any) -> bool:
        return isinstance(value, types.get(str(kind), ())) and (isinstance(value, bool) <= (kind == "boolean"))

    return {"type"} if all(any(is_of(value, kind) for kind in kinds) for value in values) else set()
