"""The messages of a chat as clients send them, the tools on offer, and the form that an answer must have."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from theodora.serve.fields import Body
from theodora.serve.lists import AtMost
from theodora.serve.misses import cut

Text = Annotated[str, Field(max_length=256)]
MOST_PARTS = 4096
_MOST_CHOICES = 65_536


class Part(Body):
    """A piece of a message's text."""

    type: Literal["text", "input_text", "output_text", "refusal"]
    text: str = ""
    refusal: str = ""
    annotations: list[Any] | None = None
    cache_control: dict[str, Any] | None = None
    """Anthropic's hint about what to cache; prefixes are reused without one."""

    @model_validator(mode="before")
    @classmethod
    def _text_only(cls, data: Any) -> Any:
        if isinstance(data, str):
            return {"type": "text", "text": data}
        kinds = ("text", "input_text", "output_text", "refusal")
        if isinstance(data, dict) and (kind := data.get("type")) not in kinds:
            raise ValueError(
                f"a content part of type {cut(repr(kind), 60)}: not supported by this server, which reads text"
            )
        return data


class FunctionCall(Body):
    """A function that the model called."""

    name: str
    arguments: dict[str, Any] = Field(default_factory=dict)
    """As an object, which chat templates want; clients send it as text."""
    parsed_arguments: Any = None
    """What OpenAI's client has made of `arguments`, and sends back."""

    @field_validator("arguments", mode="before")
    @classmethod
    def _parsed(cls, value: Any) -> Any:
        if not isinstance(value, str):
            return value
        try:
            arguments = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError) as error:
            raise ValueError(f"expected an object as JSON text, found {value[:80]!r}: {str(error)[:80]}") from error
        if not isinstance(arguments, dict):
            raise ValueError(f"expected an object as JSON text, found {value[:80]!r}")
        return arguments


class ToolCall(Body):
    """One call of a past turn."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: FunctionCall
    index: int | None = None
    """Which piece of a stream it came in; some clients send it back."""


_UNSHOWN: Any = {"index": True, "function": {"parsed_arguments"}}


class Message(Body):
    """One message of a chat; also the server's own reply, as clients send it back."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[Part], AtMost(MOST_PARTS)] | None = None
    name: str | None = None
    tool_calls: Annotated[list[ToolCall], AtMost(256)] | None = None
    function_call: FunctionCall | None = None
    """The older form of a single call."""
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    """vLLM's newer name of `reasoning_content`."""
    refusal: str | None = None
    annotations: list[Any] | None = None
    """What a web search found to a reply; no chat template shows it."""
    parsed: Any = None
    """What OpenAI's client has made of a reply's content, and sends back."""

    @model_validator(mode="after")
    def _whole(self) -> Message:
        if self.content is None and self.role in ("system", "developer", "user"):
            raise ValueError(f"content: expected the {self.role}'s text, found null")
        if self.role != "assistant" and (self.tool_calls or self.function_call):
            raise ValueError(f"tool_calls: only an assistant calls tools, this is a message of role {self.role!r}")
        return self

    @property
    def text(self) -> str:
        """All that the message says."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.refusal if part.type == "refusal" else part.text for part in content)
        return content or self.refusal or ""

    def plain(self) -> dict[str, Any]:
        """As chat templates want it, without keys that say nothing."""
        calls = list(self.tool_calls or ())
        if self.function_call is not None:
            calls.append(ToolCall(function=self.function_call))
        more = {
            "name": self.name,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
            "tool_calls": [call.model_dump(exclude_none=True, exclude=_UNSHOWN) for call in calls],
        }
        role = "tool" if self.role == "function" else self.role
        return {"role": role, "content": self.text, **{key: value for key, value in more.items() if value}}


class Function(Body):
    """A function on offer."""

    name: Annotated[str, Field(min_length=1, max_length=256)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of the arguments' object."""
    strict: bool | None = None


class Tool(Body):
    """A tool on offer."""

    type: Literal["function"] = "function"
    function: Function

    def plain(self) -> dict[str, Any]:
        """As chat templates want it."""
        function = self.function
        description: dict[str, Any] = {"name": function.name}
        if function.description is not None:
            description["description"] = function.description
        description["parameters"] = function.parameters or {"type": "object", "properties": {}}
        return {"type": "function", "function": description}


class Named(Body):
    """The name of a function."""

    name: str


class NamedTool(Body):
    """The one tool that must be called."""

    type: Literal["function"] = "function"
    function: Named


class AllowedTools(Body):
    """Some of the tools on offer."""

    mode: Literal["auto", "required"] = "auto"
    tools: Annotated[list[NamedTool], Field(min_length=1), AtMost(1024)]


class ToolsAllowed(Body):
    """A `tool_choice` among some of the tools on offer."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = Literal["none", "auto", "required"] | NamedTool | ToolsAllowed


def _underscored(data: Any, name: str) -> Any:
    """A body whose field `name`, which pydantic keeps for itself, is called `name_` here."""
    if isinstance(data, dict) and name in data:
        return {f"{name}_" if key == name else key: value for key, value in data.items()}
    return data


class JsonSchema(Body):
    """A schema that the answer must fit."""

    name: str = "answer"
    description: str | None = None
    schema_: dict[str, Any] | bool | None = None
    strict: bool | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        return _underscored(data, "schema")


class ResponseFormat(Body):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema", "structural_tag"]
    json_schema: JsonSchema | None = None
    format: dict[str, Any] | None = None
    """vLLM's structural tags, in their newer form."""
    structures: Annotated[list[dict[str, Any]], AtMost(1024)] | None = None
    triggers: Annotated[list[str], AtMost(1024)] | None = None
    """The older form."""

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema: expected with type json_schema, and only there")
        if (self.type == "structural_tag") != (self.format is not None or self.structures is not None):
            raise ValueError("format: expected with type structural_tag, and only there")
        return self


class StructuredOutputs(Body):
    """vLLM's way to say the form of the answer: one of these."""

    json_: dict[str, Any] | str | None = None
    regex: str | None = None
    choice: Annotated[list[str], AtMost(_MOST_CHOICES)] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | None = None
    disable_any_whitespace: bool = False
    disable_additional_properties: bool = False
    whitespace_pattern: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _renamed(cls, data: Any) -> Any:
        return _underscored(data, "json")

    @model_validator(mode="after")
    def _one(self) -> StructuredOutputs:
        asked = [
            name for name in ("json", "regex", "choice", "grammar", "json_object", "structural_tag") if self.asks(name)
        ]
        if len(asked) > 1:
            raise ValueError(f"{' and '.join(asked)}: expected one of them")
        return self

    def asks(self, name: str) -> bool:
        """Whether it says anything by that name."""
        value = getattr(self, "json_" if name == "json" else name)
        return value is not None and value is not False

    @property
    def form(self) -> str | None:
        """Which of json, regex, choice, grammar, json_object, structural_tag it asks for."""
        names = ("json", "regex", "choice", "grammar", "json_object", "structural_tag")
        return next((name for name in names if self.asks(name)), None)
