"""The requests of OpenAI's and vLLM's protocol that are understood.

A field that would be ignored is refused instead, by name (`fields.py`); null and other values that ask for nothing are
let through.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator
from pydantic_core import PydanticKnownError

from theodora.serve.fields import Body
from theodora.serve.lists import MANY, AtMost, keys_at_most
from theodora.serve.messages import (
    Message,
    NamedTool,
    ResponseFormat,
    StructuredOutputs,
    Text,
    Tool,
    ToolChoice,
    ToolsAllowed,
)
from theodora.serve.misses import cut, few

MOST_LOGPROBS = 20
"""Likeliest tokens that can be asked for at each place."""
_MOST_IDS = 4096  # in a list of tokens
_MOST_TOKENS = 1 << 31  # of one answer; how many can be is asked for later
_MOST_ALLOWED = 1 << 20  # tokens: more than vocabularies have
MOST_MESSAGES = 4096
MOST_TOOLS = 1024
_MOST_KWARGS = 64

Tag = Annotated[str, Field(max_length=1024)]
"""A name for the client's own use."""
Metadata = Annotated[dict[Text, Tag], keys_at_most(16)]
"""As OpenAI bounds it."""


class StreamOptions(Body):
    """What a stream brings beside the answer."""

    include_usage: bool = False
    continuous_usage_stats: bool = False
    """vLLM's: the usage so far, in every chunk."""
    include_obfuscation: bool = False
    """OpenAI's: letters in every chunk that hide how long its text is."""


class Common(Body):
    """What completions and chats share."""

    model: Text
    max_tokens: int | None = Field(None, ge=0, le=_MOST_TOKENS)
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 20)
    min_p: float = Field(0.0, ge=0, le=1)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)

    presence_penalty: float = Field(0.0, ge=-2, le=2)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float = Field(1.0, gt=0, le=100)
    logit_bias: Annotated[dict[int, Annotated[float, Field(ge=-100, le=100)]], keys_at_most(_MOST_IDS)] = Field(
        default_factory=dict
    )
    allowed_token_ids: Annotated[list[int], Field(min_length=1), AtMost(_MOST_ALLOWED)] | None = None
    bad_words: Annotated[list[Text], AtMost(256)] = Field(default_factory=list)

    stop: Annotated[list[str], AtMost(MANY)] = Field(default_factory=list)
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], AtMost(_MOST_IDS)] = Field(default_factory=list)
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = Field(0, ge=0, le=_MOST_TOKENS)
    skip_special_tokens: bool = True

    prompt_logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    echo: bool = False
    return_tokens_as_token_ids: bool = False
    """vLLM's: tokens of log-probabilities by number, as token_id:42, which no text leaves in doubt."""
    return_token_ids: bool = False
    """vLLM's: the numbers of the tokens beside the text."""
    truncate_prompt_tokens: int | None = Field(None, ge=-1, le=_MOST_TOKENS)
    """vLLM's: how many tokens of a longer prompt are kept; -1 keeps what fits."""
    truncation_side: Literal["left", "right"] = "left"

    stream: bool = False
    stream_options: StreamOptions | None = None

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None

    request_id: Annotated[str, Field(pattern=r"^[!-~]{1,256}$")] | None = None
    user: Tag | None = None
    metadata: Metadata | None = None
    store: bool = False
    service_tier: Literal["auto", "default"] | None = None
    session_id: Tag | None = None
    safety_identifier: Tag | None = None
    prompt_cache_key: Tag | None = None
    prompt_cache_retention: Tag | None = None
    prompt_cache_options: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _guided(cls, data: Any) -> Any:
        """vLLM's older fields for structured outputs, as the newer one."""
        if not isinstance(data, Mapping):
            return data
        old = {name: data[name] for name in _GUIDED if data.get(name) is not None}
        if not old:
            return data
        if data.get("structured_outputs") is not None:
            raise ValueError(f"{', '.join(old)}: expected structured_outputs alone, which says the same")
        rest = {name: value for name, value in data.items() if name not in _GUIDED}
        return {**rest, "structured_outputs": {_GUIDED[name]: value for name, value in old.items()}}

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: list[str]) -> list[str]:
        if len(value) > 16 or any(len(stop) > 256 for stop in value):
            raise ValueError("expected at most 16 stop texts of at most 256 characters")
        return value

    @model_validator(mode="after")
    def _fits_together(self) -> Common:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: expected with stream: true only")
        if self.stream and self.prompt_logprobs is not None:
            raise ValueError("prompt_logprobs: not supported in a stream by this server; leave stream out")
        most = self.most_tokens
        if most is not None and self.min_tokens > most:
            raise ValueError(f"min_tokens is {self.min_tokens}; expected at most max_tokens, which is {most}")
        return self

    @property
    def most_tokens(self) -> int | None:
        """Tokens that the answer may have, if the request says so."""
        return self.max_tokens

    @property
    def form(self) -> StructuredOutputs | None:
        """The form that the answer must have, whichever field says so."""
        if self.structured_outputs is not None and self.structured_outputs.form:
            return self.structured_outputs
        form = self.response_format
        if form is None or form.type == "text":
            return None
        if form.type == "structural_tag":
            tag = form.model_dump_json(exclude_none=True)
            return StructuredOutputs.model_validate({"structural_tag": tag})
        if form.json_schema is None or form.json_schema.schema_ in (None, True):
            return StructuredOutputs.model_validate({"json_object": True})
        return StructuredOutputs.model_validate({"json": form.json_schema.schema_})

    @property
    def draws(self) -> int:
        """Answers to generate for each prompt."""
        return self.n

    @property
    def tops(self) -> int | None:
        """Likeliest tokens to tell at each place, beside the log-probabilities; None where none are asked for."""
        return None

    @property
    def prompt_tops(self) -> int | None:
        """The same for the places of the prompt."""
        return self.prompt_logprobs


_GUIDED = {
    "guided_json": "json",
    "guided_regex": "regex",
    "guided_choice": "choice",
    "guided_grammar": "grammar",
    "guided_json_object": "json_object",
    "guided_whitespace_pattern": "whitespace_pattern",
}


_MOST_PROMPT = 1 << 24  # tokens
_TOLD = 100  # prompts whose misses are all told
_PROMPTS = ({int, float, bool}, {str}, {list})  # kinds of entries; numbers are told apart later


def _one_kind(value: Any) -> Any:
    """Of many prompts, the kind and the number are known before each is looked at."""
    if not isinstance(value, list) or len(value) <= _TOLD:
        return value
    kinds = next((kinds for kinds in _PROMPTS if type(value[0]) in kinds), set[type]())
    if not kinds.issuperset(map(type, value)):
        at = next(at for at, entry in enumerate(value) if type(entry) not in kinds)
        raise ValueError(
            f"expected token ids, texts, or lists of token ids alone, found {cut(repr(value[at]), 60)} at {at}"
        )
    if float not in kinds and len(value) > MANY:
        raise PydanticKnownError("too_long", {"field_type": "List", "max_length": MANY, "actual_length": len(value)})
    return value


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: Annotated[
        str
        | Annotated[list[int], AtMost(_MOST_PROMPT, _TOLD)]
        | Annotated[list[str], AtMost(MANY, _TOLD)]
        | Annotated[list[Annotated[list[int], AtMost(_MOST_PROMPT)]], AtMost(MANY, _TOLD)],
        BeforeValidator(_one_kind),
    ]
    logprobs: int | None = Field(None, ge=0, le=MOST_LOGPROBS)
    best_of: int | None = Field(None, ge=1, le=16)
    add_special_tokens: bool = True

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of is not None and self.best_of < self.n:
            raise ValueError(f"best_of is {self.best_of}; expected at least n, which is {self.n}")
        if self.stream and self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported in a stream, whose answers are told before all are known")
        return self

    @property
    def draws(self) -> int:
        """Answers to generate for each prompt."""
        return self.best_of or self.n

    @property
    def tops(self) -> int | None:
        """Likeliest tokens to tell at each place, beside the log-probabilities; None where none are asked for."""
        return self.logprobs

    @property
    def prompt_tops(self) -> int | None:
        """The same for the places of the prompt."""
        asked = [count for count in (self.prompt_logprobs, self.logprobs if self.echo else None) if count is not None]
        return max(asked, default=None)

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class Templated(Body):
    """What a chat template writes."""

    messages: Annotated[list[Message], Field(min_length=1), AtMost(MOST_MESSAGES)]
    tools: Annotated[list[Tool], AtMost(MOST_TOOLS)] = Field(default_factory=list)
    documents: Annotated[list[dict[str, Any]], AtMost(MOST_TOOLS)] = Field(default_factory=list)
    chat_template_kwargs: Annotated[dict[Text, Any], keys_at_most(_MOST_KWARGS)] = Field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    add_special_tokens: bool = False

    @model_validator(mode="before")
    @classmethod
    def _goes_on(cls, data: Any) -> Any:
        """Who asks to go on from the last message need not say that none is begun."""
        if isinstance(data, Mapping) and data.get("continue_final_message") is True:
            if data.get("add_generation_prompt") is True:
                raise ValueError("continue_final_message: expected without add_generation_prompt")
            return {**data, "add_generation_prompt": False}
        return data


class ChatRequest(Common, Templated):
    """POST /v1/chat/completions."""

    max_completion_tokens: int | None = Field(None, ge=0, le=_MOST_TOKENS)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=MOST_LOGPROBS)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    reasoning_effort: Annotated[str, Field(max_length=32)] | None = None

    @model_validator(mode="after")
    def _plain_text(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        names = {tool.function.name for tool in self.tools}
        if not names and self.tool_choice not in (None, "none", "auto"):
            raise ValueError("tool_choice: expected with tools")
        for name in _named(self.tool_choice):
            if name not in names:
                raise ValueError(
                    f"tool_choice: there is no tool {cut(name, 60)!r}; expected one of {few(sorted(names))}"
                )
        return self

    @property
    def most_tokens(self) -> int | None:
        """Tokens that the answer may have, if the request says so."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    @property
    def tops(self) -> int | None:
        """Likeliest tokens to tell at each place, beside the log-probabilities; None where none are asked for."""
        return self.top_logprobs if self.logprobs else None

    @property
    def shown_tools(self) -> list[Tool]:
        """The tools that the model may call."""
        if self.tool_choice == "none":
            return []
        named = _named(self.tool_choice)
        return [tool for tool in self.tools if not named or tool.function.name in named]


def _named(choice: ToolChoice | None) -> list[str]:
    if isinstance(choice, NamedTool):
        return [choice.function.name]
    if isinstance(choice, ToolsAllowed):
        return [tool.function.name for tool in choice.allowed_tools.tools]
    return []


class TokenizeRequest(Body):
    """POST /tokenize, of a text."""

    model: Text | None = None
    prompt: str
    add_special_tokens: bool = True
    return_token_strs: bool = False


class TokenizeChatRequest(Templated):
    """POST /tokenize, of a chat."""

    model: Text | None = None
    return_token_strs: bool = False


class DetokenizeRequest(Body):
    """POST /detokenize."""

    model: Text | None = None
    tokens: Annotated[list[Annotated[int, Field(ge=0)]], AtMost(_MOST_PROMPT)]


class LoadRequest(Body):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, Field(pattern=r"^[\w][\w.:-]{0,127}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool = False
    """Replace the adapter of that name."""


class UnloadRequest(Body):
    """POST /v1/unload_lora_adapter."""

    lora_name: Text
