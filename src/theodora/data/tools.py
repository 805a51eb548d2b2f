"""Tools and tool calls in anybody's spelling → the one that chat templates read, whatever kind of file they came from.

Tables (Parquet, a saved dataset) keep one set of keys for all rows: they fill the keys of other rows' tools with null,
put keys into an order of their own and turn whole numbers into floats beside fractions. Nothing in a row tells what
was filled in. So objects lose their nulls, and get one order, in every kind of file; arguments that are written as
JSON text, as OpenAI's are, pass through tables as they stand and keep both.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, cast

from theodora.config import is_int
from theodora.data.notes import Notes, is_empty
from theodora.errors import shown
from theodora.parse import parse_json

NULLS = (
    "null values in tools, in the arguments of calls and in results",
    "left out, as tables fill them in by themselves; what is written as JSON text keeps its own",
)
ORDER = (
    "the order of keys in tools, in the arguments of calls and in results",
    "changed to that of `required`, then of the alphabet, as tables have an order of their own; "
    "what is written as JSON text keeps its own",
)
"""These happen to every kind of file, and are only worth saying of one that could have kept it (no table)."""

_NUMBER = re.compile(r"\d\.\d|\d[eE]|\d{10}")
_LARGEST_EXACT = 2**53
_KEYS = (
    "type", "function", "name", "title", "description", "parameters", "strict", "return", "enum", "const", "format",
    "items", "properties", "required", "additionalProperties", "default",
)  # fmt: skip
_RANKS = {key: rank for rank, key in enumerate(_KEYS)}
# Their keys are names that the writer chose.
_NAMED = ("properties", "patternProperties", "$defs", "definitions")
_MOST_LITERAL = 1 << 20  # characters of a Python literal, of which a whole syntax tree is built first

Schemas = Mapping[str, Any]
"""What each tool's arguments are, by the tool's name."""


def read_tools(value: Any, column: str, notes: Notes) -> list[Any]:
    """The tools on offer in a conversation: a list of objects, or JSON text of one; bare functions are wrapped."""
    given = parsed_or_same(value) if isinstance(value, str) else value
    if not isinstance(given, list):
        notes.wrong(f"{column!r} is {describe(value)}; expected a list of tools")
        return []
    tools: list[Any] = []
    for number, item in enumerate(given, 1):
        # A table that holds tools of many shapes may keep each as JSON text.
        tool = parsed_or_same(item) if isinstance(item, str) else item
        if not isinstance(tool, dict) or is_empty(tool):
            notes.wrong(f"tool {number} of {column!r} is {describe(item)}; expected an object that describes a tool")
            continue
        if (
            isinstance(tool.get("name"), str)
            and tool.get("function") is None
            and tool.get("type") in (None, "function")
        ):
            tool = {"type": "function", "function": {k: v for k, v in tool.items() if k != "type"}}
        tool = _with_parameters(tool, f"tool {number} of {column!r}", notes)
        arranged = arranged_tool(tool)
        _say_what_changed(tool, arranged, notes)
        tools.append(arranged)
    return tools


def _with_parameters(tool: dict[str, Any], what: str, notes: Notes) -> dict[str, Any]:
    """A tool whose parameters are an object, also where they are written as JSON text, as Axolotl advises."""
    function = tool.get("function")
    text = function.get("parameters") if isinstance(function, dict) else None
    if not isinstance(text, str):
        return tool
    parameters = parsed_or_same(text) if text.strip() else {}
    if not isinstance(parameters, dict):
        notes.wrong(f"the parameters of {what} are {describe(text)}; expected an object, or JSON text of one")
    return tool | {"function": {**cast(dict[str, Any], function), "parameters": parameters}}


def schemas_of(tools: Sequence[Any]) -> Schemas:
    """What the arguments of each tool are, by its name."""
    functions = [tool.get("function") for tool in tools if isinstance(tool, dict)]
    return {
        function["name"]: function.get("parameters")
        for function in functions
        if isinstance(function, dict) and isinstance(function.get("name"), str)
    }


def read_calls(value: Any, what: str, schemas: Schemas, notes: Notes) -> list[dict[str, Any]]:
    """The `tool_calls` of a message: a list of objects, or JSON text of one."""
    text = isinstance(value, str)
    calls = parsed_or_same(value) if text else value
    if isinstance(calls, dict):
        calls = [calls]
    if not isinstance(calls, list) or not calls:
        notes.wrong(f"{what} is {describe(value)}; expected a list of calls")
        return []
    read = [
        _read_call(call, f"call {n} of {what}" if len(calls) > 1 else what, schemas, notes, text)
        for n, call in enumerate(calls, 1)
    ]
    return [call for call in read if call]


def spoken_calls(content: Any, what: str, schemas: Schemas, notes: Notes) -> tuple[list[dict[str, Any]], str]:
    """The calls of a turn whose words are a call (`function_call`, `tool_call`), and the reasoning in front of them."""
    reasoning = ""
    if isinstance(content, str):
        before, closed, rest = content.partition("</think>")
        if closed:
            reasoning, content = before.strip().removeprefix("<think>").strip(), rest
        if not isinstance(parsed_or_same(content), dict | list):
            notes.wrong(f'{what} is {describe(content)}; expected JSON such as {{"name": …, "arguments": {{…}}}}')
            return [], reasoning
    return read_calls(content, what, schemas, notes), reasoning


def text_of_result(value: Any, what: str, notes: Notes) -> str:
    """A tool's result that is written as an object or a list, as the JSON text that a model reads."""
    arranged = arranged_arguments(value, None)
    _say_what_changed(value, arranged, notes)
    return storable_json(arranged, what, notes)


def storable_calls(
    calls: list[dict[str, Any]], what: str, schemas: Schemas, notes: Notes
) -> list[dict[str, Any]] | str:
    """Calls as datasets can keep them, and as they are read again the same: as objects if possible, else as text.

    Its JSON column rounds numbers to ten digits; and nulls or an order that came in text are kept in text alone.
    """
    text = storable_json(calls, what, notes)
    if not text:
        return calls
    functions = [call["function"] for call in calls]
    arranged = [arranged_arguments(function["arguments"], schemas.get(function["name"])) for function in functions]
    unchanged = json.dumps([function["arguments"] for function in functions]) == json.dumps(arranged)
    return calls if unchanged and _NUMBER.search(text) is None else text


def arranged_tool(value: Any, names: Sequence[str] | None = None) -> Any:
    """A tool's description without nulls, its keys in the order that people write them in.

    Args:
        value: the tool, or a part of it.
        names: the names that are required, if the keys of `value` are names.
    """
    if isinstance(value, list):
        return [arranged_tool(item) for item in value]
    if not isinstance(value, dict):
        return whole_number(value)
    parts = cast(dict[str, Any], value)
    rank = _RANKS if names is None else {name: place for place, name in enumerate(names)}
    required = parts.get("required")
    named = [name for name in required if isinstance(name, str)] if isinstance(required, list) else []
    return {
        key: arranged_tool(parts[key], named if key in _NAMED and names is None else None)
        for key in sorted(parts, key=lambda key: (rank.get(key, len(rank)), str(key)))
        if parts[key] is not None
    }


def arranged_arguments(value: Any, schema: Any) -> Any:
    """Arguments without nulls, in the order of the tool's description; what it does not describe by the alphabet."""
    schema = schema if isinstance(schema, dict) else {}
    if isinstance(value, list):
        return [arranged_arguments(item, schema.get("items")) for item in value]
    if not isinstance(value, dict):
        return whole_number(value)
    known = schema.get("properties")
    known = known if isinstance(known, dict) else {}
    rank = {name: place for place, name in enumerate(known)}
    return {
        key: arranged_arguments(value[key], known.get(key))
        for key in sorted(value, key=lambda key: (rank.get(key, len(rank)), str(key)))
        if value[key] is not None
    }


def describe(value: Any) -> str:
    """A value in an error message: its kind, and as much of it as fits."""
    if value is None:
        return "null"
    text = shown(value)
    return f"the {type(value).__name__} {text if len(text) <= 40 else text[:37] + '…'}"


def parsed_or_same(text: str) -> Any:
    """What a JSON text (or pandas' spelling of a list or object in a CSV cell) holds, or the text itself."""
    try:
        return parse_json(text)
    except ValueError as error:
        if not isinstance(error, json.JSONDecodeError):  # the same key twice, or nested too deeply
            return text
    if text.lstrip()[:1] not in ("[", "{") or len(text) > _MOST_LITERAL:
        return text
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of escapes that only Python minds
        try:
            return ast.literal_eval(text.strip())
        except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
            return text


def storable_json(value: Any, what: str, notes: Notes) -> str:
    """A value as JSON text; one that JSON cannot say goes to the problems."""
    try:
        text = json.dumps(value, ensure_ascii=False, allow_nan=False)
        text.encode()
    except (ValueError, TypeError, RecursionError) as error:
        notes.wrong(f"{what} is nothing that JSON can say ({error}): {describe(value)}")
        return ""
    return text


def _read_call(call: Any, what: str, schemas: Schemas, notes: Notes, text: bool) -> dict[str, Any]:
    if isinstance(call, str):
        call = parsed_or_same(call)
    if not isinstance(call, dict):
        notes.wrong(f"{what} is {describe(call)}; expected a list of calls")
        return {}
    function = call if is_empty(call.get("function")) else call["function"]
    kind = call.get("type")
    name = function.get("name") if isinstance(function, dict) else None
    if kind not in (None, "function") or not isinstance(name, str) or not name:
        notes.wrong(f'{what} is {describe(call)}; expected {{"function": {{"name": …, "arguments": {{…}}}}}}')
        return {}
    arguments = _read_arguments(function, what, schemas.get(name), notes, text)
    read: dict[str, Any] = {"type": "function", "function": {"name": name, "arguments": arguments}}
    if not is_empty(identity := call.get("id")):
        if not isinstance(identity, str) and not is_int(identity):
            notes.wrong(f"the id of {what} is {describe(identity)}; expected text")
        read["id"] = str(identity)
    for key in {**call, **function}:
        spelt = key in ("type", "id", "function", "name", "arguments", "parameters")
        if not spelt and not (is_empty(call.get(key)) and is_empty(function.get(key))):
            notes.leave_out(f"the key {key!r} of tool calls")
    return read


def _read_arguments(function: dict[str, Any], what: str, schema: Any, notes: Notes, text: bool) -> dict[str, Any]:
    given = function.get("arguments") if function.get("arguments") is not None else function.get("parameters")
    if given is None or (isinstance(given, str) and not given.strip()):
        return {}
    arguments = given
    if isinstance(given, str):
        text = True
        try:
            arguments = parse_json(given)
        except ValueError:
            arguments = None
    if not isinstance(arguments, dict):
        notes.wrong(f"the arguments of {what} are {describe(given)}; expected an object, or JSON text of one")
        return {}
    if text:
        return arguments
    arranged = arranged_arguments(arguments, schema)
    _say_what_changed(arguments, arranged, notes)
    return arranged


def _say_what_changed(before: Any, after: Any, notes: Notes) -> None:
    if _holds_null(before):
        notes.leave_out(*NULLS)
    if not _same_order(before, after):
        notes.leave_out(*ORDER)


def _holds_null(value: Any) -> bool:
    if isinstance(value, dict):
        return any(item is None or _holds_null(item) for item in value.values())
    return isinstance(value, list) and any(map(_holds_null, value))


def _same_order(before: Any, after: Any) -> bool:
    if isinstance(before, dict):
        keys = [key for key in before if before[key] is not None]
        return keys == list(after) and all(_same_order(before[key], after[key]) for key in keys)
    return not isinstance(before, list) or all(_same_order(*pair) for pair in zip(before, after, strict=True))


def whole_number(value: Any) -> Any:
    """A whole number as one: tables make floats of those that stand beside fractions."""
    if isinstance(value, float) and value.is_integer() and abs(value) < _LARGEST_EXACT:
        return int(value)
    return value
