"""The formats of calls as grammars (xgrammar's structural tags), for calls that must come or must fit their schemas."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import xgrammar

from theodora.serve.calls import harmony
from theodora.serve.calls.families import Family, Thinking
from theodora.serve.schemas import narrowed

MOST_SPACE = 40
"""Characters of space in a row within JSON; without a limit a model can write space for ever."""
Format = dict[str, Any]
Choice = Literal["auto", "required"]
"""Whether calls may come or must."""

# Families whose format xgrammar knows, by its names.
_KNOWN = {
    "hermes": "qwen_3",
    "qwen3_xml": "qwen_3_5",
    "glm4": "glm_4_7",
    "llama3_json": "llama",
    "harmony": "harmony",
    "deepseek_v3": "deepseek_r1",
    "deepseek_v3_1": "deepseek_v3_1",
    "deepseek_v3_2": "deepseek_v3_2",
    "kimi_k2": "kimi",
    "gemma4": "gemma_4",
}
_NO_ARGUMENTS = {"type": "object", "properties": {}, "additionalProperties": False}


def calls_format(family: Family, tools: Sequence[tuple[str, Any]], choice: Choice, parallel: bool) -> Format:
    """What an answer with calls looks like.

    Args:
        family: how calls are written.
        tools: names, and JSON schemas of the arguments.
        choice: whether calls must come.
        parallel: whether there may be several.
    """
    if (known := _KNOWN.get(family.name)) is not None:
        offered: list[Any] = [
            {"type": "function", "function": {"name": name, "parameters": narrowed(schema) or _NO_ARGUMENTS}}
            for name, schema in tools
        ]
        tag = xgrammar.get_model_structural_tag(
            known,
            offered,
            choice,
            reasoning="disabled",
            parallel_tool_calls=parallel or family.name == "harmony",
            max_whitespace_cnt=MOST_SPACE,
        )
        format = tag.model_dump(mode="json", exclude_none=True)["format"]
        if family.name == "harmony" and choice == "required":
            # <|call|> ends the answer: it is the model's end token, and no part of the text.
            format |= {"tags": [{**tag, "end": ""} for tag in format["tags"]], "stop_after_first": True}
        return format
    opening, separator, closing = _FRAMES.get(family.name, ("", "\n", ""))
    tags = [_tag(family.name, name, narrowed(schema) or _NO_ARGUMENTS) for name, schema in tools]
    if choice == "required":
        calls: Format = {
            "type": "tags_with_separator",
            "tags": tags,
            "separator": separator,
            "at_least_one": True,
            "stop_after_first": not parallel,
        }
        return sequence(constant(opening), calls, constant(closing))
    # Text, in which a call is one as soon as it begins.
    more: Format = {"type": "star", "content": sequence(constant(separator), {"type": "or", "elements": tags})}
    begun = [
        {
            "type": "tag",
            "begin": opening + tag["begin"],
            "content": sequence(tag["content"], constant(tag["end"]), *([more] if parallel and closing else ())),
            "end": closing,
        }
        for tag in tags
    ]
    trigger = opening or _TRIGGERS.get(family.name, "")
    return {"type": "triggered_tags", "triggers": [trigger], "tags": begun, "stop_after_first": not parallel}


_TRIGGERS = {"json": '{"name": "', "mistral_v11": "[TOOL_CALLS]"}
# What stands before the calls, between them, and behind them.
_FRAMES = {
    "granite": ("<|tool_call|>[", ", ", "]"),
    "phi4": ("<|tool_call|>[", ", ", "]<|/tool_call|>"),
    "mistral": ("[TOOL_CALLS][", ", ", "]"),
    "mistral_v11": ("", "", ""),
    "cohere": ("<|START_ACTION|>[", ", ", "]<|END_ACTION|>"),
    "llama4_pythonic": ("[", ", ", "]"),
    "lfm2": ("<|tool_call_start|>[", ", ", "]<|tool_call_end|>"),
    "minimax": ("<minimax:tool_call>\n", "", "</minimax:tool_call>"),
}


def _tag(family: str, name: str, schema: Any) -> Format:
    content = json_format(schema)
    if family == "mistral_v11":
        return {"type": "tag", "begin": f"[TOOL_CALLS]{name}[ARGS]", "content": content, "end": ""}
    if family in ("llama4_pythonic", "lfm2"):
        return {"type": "tag", "begin": f"{name}(", "content": _keywords(schema), "end": ")"}
    if family == "minimax":
        content["style"] = "minimax_xml"
        return {"type": "tag", "begin": f'<invoke name="{name}">\n', "content": content, "end": "</invoke>\n"}
    begin = f'{{"name": "{name}", "arguments": '
    if family == "cohere":
        begin = f'{{"tool_call_id": "0", "tool_name": "{name}", "parameters": '
    return {"type": "tag", "begin": begin, "content": content, "end": "}"}


def _keywords(schema: Any) -> Format:
    """Arguments as Python writes them: a=1, b="x". Values are JSON, which the reader takes as well."""
    properties = schema.get("properties") if isinstance(schema, dict) else None
    if not isinstance(properties, dict) or not properties:
        return constant("")
    required = [name for name in schema.get("required") or () if name in properties]
    first = required or list(properties)[:1]
    rest = [name for name in properties if name not in first]
    shared = {key: schema[key] for key in ("$defs", "definitions") if key in schema}

    def keyword(name: str, comma: bool) -> Format:
        value = properties[name]
        value = {**value, **shared} if isinstance(value, dict) else value
        return sequence(constant((", " if comma else "") + f"{name}="), json_format(value))

    optional = [{"type": "optional", "content": keyword(name, True)} for name in rest]
    whole = sequence(*(keyword(name, at > 0) for at, name in enumerate(first)), *optional)
    return whole if required else {"type": "optional", "content": whole}


def thinking_format(family: Family | None, thinking: Thinking | None, opened: bool) -> Format | None:
    """The reasoning that may come before what is forced; None where none can come.

    Args:
        family: of the model.
        thinking: the tags of reasoning, where it is told apart.
        opened: the prompt ends within the reasoning.
    """
    anything: Format = {"type": "any_text"}
    if family is not None and family.read is harmony.read:
        begin, end = "<|channel|>analysis<|message|>", "<|end|>"
        thought = {"type": "tag", "begin": begin, "content": anything, "end": end}
        return {"type": "optional", "content": sequence(thought, constant("<|start|>assistant"))}
    if thinking is None:
        return None
    space: Format = {"type": "regex", "pattern": r"[ \n]{0,3}"}
    if opened:
        return sequence({"type": "tag", "begin": "", "content": anything, "end": thinking.close}, space)
    thought = {"type": "tag", "begin": thinking.open, "content": anything, "end": thinking.close}
    return {"type": "optional", "content": sequence(thought, space)}


def json_format(schema: Any) -> Format:
    """JSON that fits a schema."""
    return {"type": "json_schema", "json_schema": schema, "max_whitespace_cnt": MOST_SPACE}


def sequence(*formats: Format) -> Format:
    """One after the other."""
    parts = [format for format in formats if format.get("value") != ""]
    if not parts:
        return constant("")
    return parts[0] if len(parts) == 1 else {"type": "sequence", "elements": parts}


def constant(text: str) -> Format:
    """This text."""
    return {"type": "const_string", "value": text}
