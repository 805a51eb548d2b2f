"""POST /v1/responses in its simple form: what it asks for, as a chat. Nothing is stored."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from theodora.errors import ConfigError
from theodora.serve.fields import Body
from theodora.serve.lists import AtMost, keys_at_most
from theodora.serve.messages import Text
from theodora.serve.misses import cut, describe_misses
from theodora.serve.protocol import MOST_MESSAGES, MOST_TOOLS, ChatRequest, Metadata, StreamOptions, Tag


class TextOptions(Body):
    """The form of the answer."""

    format: dict[str, Any] = Field(default_factory=lambda: {"type": "text"})


class ReasoningOptions(Body):
    """How much is thought."""

    effort: Annotated[str, Field(max_length=32)] | None = None


class ResponsesRequest(Body):
    """POST /v1/responses."""

    model: Text
    input: str | Annotated[list[dict[str, Any]], AtMost(4 * MOST_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    temperature: float | None = None
    top_p: float | None = None
    tools: Annotated[list[dict[str, Any]], AtMost(MOST_TOOLS)] = Field(default_factory=list)
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool = True
    text: TextOptions = Field(default_factory=TextOptions)
    reasoning: ReasoningOptions = Field(default_factory=ReasoningOptions)
    include: Annotated[list[Literal["reasoning.encrypted_content"]], AtMost(16)] = Field(default_factory=list)
    """What agents ask for as a matter of course; reasoning is told in plain text."""
    stream: bool = False
    stream_options: StreamOptions | None = None
    truncation: Literal["disabled"] = "disabled"
    metadata: Metadata | None = None
    store: bool = False
    service_tier: Literal["auto", "default"] | None = None
    user: Tag | None = None
    safety_identifier: Tag | None = None
    prompt_cache_key: Tag | None = None
    prompt_cache_retention: Tag | None = None
    prompt_cache_options: dict[str, Any] | None = None

    # vLLM's, as of chats
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: Annotated[dict[int, float], keys_at_most(4096)] | None = None
    min_tokens: int | None = None
    stop_token_ids: Annotated[list[int], AtMost(4096)] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    stop: Annotated[list[str], AtMost(16)] | str | None = None
    ignore_eos: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    structured_outputs: dict[str, Any] | None = None


_MOST_TOOLS_TEXT = 1_000_000  # characters of all tools, which every reply repeats
_NAMED_HERE: dict[Any, tuple[str, ...]] = {
    "messages": ("input",),
    "max_completion_tokens": ("max_output_tokens",),
    "reasoning_effort": ("reasoning", "effort"),
    "response_format": ("text", "format"),
}
_SAME = (
    *("temperature", "top_p", "parallel_tool_calls", "seed", "top_k", "min_p", "repetition_penalty", "stop"),
    *("presence_penalty", "frequency_penalty", "logit_bias", "min_tokens", "stop_token_ids", "skip_special_tokens"),
    *(
        "include_stop_str_in_output",
        "ignore_eos",
        "chat_template_kwargs",
        "structured_outputs",
        "stream",
        "metadata",
        "user",
        "stream_options",
    ),
)


def chat_of(asked: ResponsesRequest) -> ChatRequest:
    """The chat that a request comes to.

    Raises:
        ConfigError: it asks for what is not done, by name.
    """
    if sum(len(json.dumps(tool)) for tool in asked.tools) > _MOST_TOOLS_TEXT:
        raise ConfigError(f"tools: expected at most {_MOST_TOOLS_TEXT} characters together")
    messages = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    given = [{"role": "user", "content": asked.input}] if isinstance(asked.input, str) else asked.input
    body: dict[str, Any] = {
        "model": asked.model,
        "messages": messages + list(_messages(given)),
        "max_completion_tokens": asked.max_output_tokens,
        "tools": [_tool(tool, at) for at, tool in enumerate(asked.tools)],
        "tool_choice": _choice(asked.tool_choice),
        "reasoning_effort": asked.reasoning.effort,
        "response_format": _format(asked.text.format),
        **{name: getattr(asked, name) for name in _SAME},
    }
    try:
        return ChatRequest.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise ConfigError(
            describe_misses({**miss, "loc": _loc(miss["loc"])} for miss in error.errors(include_url=False))
        ) from error
    except UnicodeEncodeError:  # pydantic's
        raise ConfigError("The body holds half a character; expected whole ones.") from None


def _loc(loc: tuple[int | str, ...]) -> tuple[int | str, ...]:
    """A place in the chat, by the names that the request has; several items can be one message."""
    match tuple(part for part in loc if part not in ("FEW", "MANY")):
        case ("messages", int(), *rest):
            return ("input", *(part for part in rest if not isinstance(part, int)))
        case (first, *rest):
            return (*_NAMED_HERE.get(first, (first,)), *rest)
        case same:
            return same


def _messages(items: list[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Items of an input as messages: an assistant's reasoning, text and calls are several items, and one message."""
    turn: dict[str, Any] = {}
    for at, item in enumerate(items):
        kind = item.get("type", "message")
        if kind == "message" and item.get("role") == "assistant" and "content" not in turn and "tool_calls" not in turn:
            turn["content"] = _text(item.get("content"), f"input.{at}.content")
        elif kind == "reasoning":
            parts = item.get("content") or item.get("summary") or []
            thought = "\n\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))
            if "content" in turn or "tool_calls" in turn:
                yield _assistant(turn)
                turn = {}
            if thought:
                turn["reasoning_content"] = "\n\n".join(filter(None, (turn.get("reasoning_content"), thought)))
        elif kind == "function_call":
            function = {"name": item.get("name"), "arguments": item.get("arguments") or "{}"}
            turn.setdefault("tool_calls", []).append(
                {"id": item.get("call_id") or item.get("id"), "type": "function", "function": function}
            )
        else:
            if turn:
                yield _assistant(turn)
                turn = {}
            if kind == "message" and item.get("role") == "assistant":
                turn["content"] = _text(item.get("content"), f"input.{at}.content")
            else:
                yield _other(item, kind, at)
    if turn:
        yield _assistant(turn)


def _assistant(turn: dict[str, Any]) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **turn}


def _other(item: dict[str, Any], kind: str, at: int) -> dict[str, Any]:
    if kind == "message":
        return {"role": item.get("role"), "content": _text(item.get("content"), f"input.{at}.content")}
    if kind == "function_call_output":
        output = item.get("output")
        text = _text(output, f"input.{at}.output") if isinstance(output, str | list) else json.dumps(output)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": text}
    instead = "; responses are not stored, send the item itself" if kind == "item_reference" else ""
    raise ConfigError(f"input.{at}: an item of type {cut(repr(kind), 60)} is not supported by this server{instead}")


def _text(content: Any, place: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise ConfigError(f"{place}: expected a text, or a list of parts")
    texts: list[str] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind not in ("input_text", "output_text", "text", "refusal"):
            raise ConfigError(
                f"{place}: a part of type {cut(repr(kind), 60)} is not supported by this server, which reads text"
            )
        texts.append(str(part.get("refusal" if kind == "refusal" else "text") or ""))
    return "".join(texts)


def _tool(tool: dict[str, Any], at: int) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise ConfigError(
            f"tools.{at}: a tool of type {cut(repr(tool.get('type')), 60)} is not supported by this server"
        )
    if isinstance(tool.get("function"), dict):  # as chats have it
        return tool
    known = ("name", "description", "parameters", "strict")
    if others := sorted(
        key for key, value in tool.items() if key not in (*known, "type") and value not in (None, False)
    ):
        raise ConfigError(f"tools.{at}.{cut(others[0], 60)}: not supported by this server")
    return {"type": "function", "function": {key: tool[key] for key in known if tool.get(key) is not None}}


def _choice(choice: Any) -> Any:
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") == "function" and "name" in choice:
        return {"type": "function", "function": {"name": choice["name"]}}
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        tools = [_choice(tool) for tool in choice["tools"]]
        return {"type": "allowed_tools", "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools}}
    return choice


def _format(format: dict[str, Any]) -> dict[str, Any] | None:
    if format.get("type") == "json_schema" and "json_schema" not in format:
        return {"type": "json_schema", "json_schema": {key: value for key, value in format.items() if key != "type"}}
    return None if format == {"type": "text"} else format
