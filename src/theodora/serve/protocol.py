"""The requests of OpenAI's protocol that are understood. A field that would be ignored is refused instead."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

Text = Annotated[str, Field(max_length=256)]


class StreamOptions(BaseModel):
    """What a stream brings beside the answer."""

    model_config = ConfigDict(extra="forbid")
    include_usage: bool = False


class Common(BaseModel):
    """What completions and chats share. Fields that OpenAI has and that nothing here does must have no effect."""

    model_config = ConfigDict(extra="forbid", strict=False)

    model: Text
    max_tokens: int | None = Field(None, ge=1)
    n: int = Field(1, ge=1, le=16)
    temperature: float = Field(1.0, ge=0, le=100)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=1 << 20)
    seed: int | None = Field(None, ge=-(1 << 63), lt=1 << 63)
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    stream: bool = False
    stream_options: StreamOptions | None = None
    user: str | None = None

    presence_penalty: Literal[0] | float = 0
    frequency_penalty: Literal[0] | float = 0
    logit_bias: dict[str, Any] | None = None

    @field_validator(
        "n", "temperature", "top_p", "top_k", "stream", "presence_penalty", "frequency_penalty", mode="before"
    )
    @classmethod
    def _null_is_the_default(cls, value: Any, info: Any) -> Any:
        return cls.model_fields[info.field_name].default if value is None else value

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, value: str | list[str] | None) -> list[str]:
        stops = [value] if isinstance(value, str) else value or []
        if len(stops) > 16 or any(len(stop) > 256 for stop in stops):
            raise ValueError("expected at most 16 stop texts of at most 256 characters")
        return stops

    @model_validator(mode="after")
    def _nothing_ignored(self) -> Common:
        asked = [name for name in ("presence_penalty", "frequency_penalty", "logit_bias") if getattr(self, name)]
        if asked:
            raise ValueError(f"{', '.join(asked)}: not supported by this server")
        return self

    @property
    def stops(self) -> list[str]:
        """Texts that end the answer."""
        return list(self.stop or [])


class CompletionRequest(Common):
    """POST /v1/completions."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: Literal[False] | None = False
    best_of: int | None = None
    suffix: None = None
    return_tokens_as_token_ids: bool | None = False
    """vLLM's: tokens of log-probabilities by number, as token_id:42, which no text leaves in doubt."""

    @model_validator(mode="after")
    def _best_of_all(self) -> CompletionRequest:
        if self.best_of not in (None, self.n):
            raise ValueError("best_of: not supported by this server (other than equal to n)")
        return self

    def prompts(self) -> list[str] | list[list[int]]:
        """One entry for each prompt."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        if self.prompt and isinstance(self.prompt[0], int):
            return [self.prompt]  # pyright: ignore[reportReturnType]
        return self.prompt  # pyright: ignore[reportReturnType]


class Part(BaseModel):
    """A piece of a message."""

    model_config = ConfigDict(extra="forbid")
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a chat."""

    model_config = ConfigDict(extra="forbid")
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates want it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": self.role, "content": content}


class ChatRequest(Common):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: dict[str, Any] | None = None
    tools: None = None
    tool_choice: Literal["none"] | None = None

    @model_validator(mode="after")
    def _plain_text(self) -> ChatRequest:
        if self.response_format not in (None, {"type": "text"}):
            raise ValueError("response_format: not supported by this server (other than text)")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        return self


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Annotated[str, Field(pattern=r"^[\w][\w.:-]{0,127}$")]
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadRequest(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="forbid")
    lora_name: Text
