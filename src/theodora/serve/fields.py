"""Which fields a body may hold: one that nothing here does is refused by name, unless its value asks for nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from theodora.serve.misses import few

# Fields of OpenAI's or vLLM's that nothing here does -> the values that ask for nothing. Null always is one.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    # OpenAI's
    "audio": (),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "suffix": ("",),
    "verbosity": ("medium",),
    "web_search_options": (),
    # OpenAI's, of /v1/responses
    "background": (False,),
    "context_management": ([],),
    "conversation": (),
    "max_tool_calls": (),
    "previous_response_id": (),
    "prompt": (),
    "summary": ("auto",),
    "generate_summary": ("auto",),
    # vLLM's, of this and of earlier versions
    "best_of": (1,),
    "cache_salt": (),
    "chat_template": (),
    "early_stopping": (False,),
    "ec_transfer_params": ({},),
    "guided_decoding_backend": ("auto", "xgrammar"),
    "include_reasoning": (True,),
    "is_3d_lora_weight": (False,),
    "kv_transfer_params": ({},),
    "length_penalty": (1,),
    "logits_processors": ([],),
    "logprob_token_ids": ([],),
    "media_io_kwargs": ({},),
    "mm_processor_kwargs": ({},),
    "priority": (0,),
    "prompt_embeds": ([],),
    "repetition_detection": (),
    "return_mm_kwargs": (True,),
    "return_prompt_text": (False,),
    "return_token_offsets": (False,),
    "routed_experts_prompt_start": (0,),
    "spaces_between_special_tokens": (True,),
    "stream_interval": (1,),
    "thinking_token_budget": (-1,),
    "use_beam_search": (False,),
    "vllm_xargs": ({},),
    "watermarking": (False,),
    # of other routes
    "add_generation_prompt": (True,),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "logprobs": (False, 0),
    "max_completion_tokens": (),
    "messages": (),
    "n": (1,),
    "parallel_tool_calls": (True,),
    "reasoning_effort": ("none",),
    "request_id": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_logprobs": (0,),
}
_INSTEAD = {
    "previous_response_id": "responses are not stored, send the items of before as input",
    "conversation": "responses are not stored, send the items of before as input",
    "chat_template": "the model's own is used, with chat_template_kwargs",
    "functions": "send tools",
    "function_call": "send tool_choice",
    "use_beam_search": "n or best_of draw several answers",
    "cache_salt": "prefixes are shared within one adapter; start the server with --no-prefix-reuse",
}


class Body(BaseModel):
    """A body, or part of one. Null stands for a field's default; fields that nothing here does must ask for nothing."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _nothing_ignored(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        known, given, refused = cls.model_fields, {}, []
        for name, value in data.items():
            if name in known:
                if value is not None or known[name].is_required():
                    given[name] = value
            elif value is not None and not _asks_for_nothing(name, value):
                refused.append(_refusal(str(name)))
        if refused:
            raise ValueError(few(refused))
        return given


def _asks_for_nothing(name: str, value: Any) -> bool:
    return any(
        value == neutral and isinstance(value, bool) == isinstance(neutral, bool) for neutral in _NEUTRAL.get(name, ())
    )


def _refusal(name: str) -> str:
    if name not in _NEUTRAL:
        return f"{name[:100]}: not supported by this server, which knows no such field"
    instead = f"; {_INSTEAD[name]}" if name in _INSTEAD else ""
    return f"{name}: not supported by this server{instead}"
