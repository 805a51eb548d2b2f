"""A chat as the text that the model is to go on from, and what of it the template does not show."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from theodora.data.templates import as_wanted
from theodora.errors import ConfigError, in_line
from theodora.metered import meter_templates
from theodora.serve.misses import cut
from theodora.serve.protocol import ChatRequest, Templated


def chat_text(tokenizer: Any, asked: Templated, own: str | None = None) -> tuple[str, list[str]]:
    """The prompt that a chat template makes of a chat, and notes on what it leaves out.

    Args:
        tokenizer: the base model's.
        asked: the chat.
        own: the template of the adapter that is asked; None for the tokenizer's.

    Raises:
        ConfigError: there is no template, or it refuses the chat.
    """
    if not (own or getattr(tokenizer, "chat_template", None)):
        raise ConfigError("This model's tokenizer has no chat template; use /v1/completions.")
    shown = asked.shown_tools if isinstance(asked, ChatRequest) else asked.tools
    tools = [tool.plain() for tool in shown] or None
    template = tokenizer.get_chat_template(own, tools)
    more = dict(asked.chat_template_kwargs)
    if isinstance(asked, ChatRequest) and asked.reasoning_effort is not None:
        more.setdefault("reasoning_effort", asked.reasoning_effort)
    if taken := sorted(more.keys() & _OWN):
        raise ConfigError(f"chat_template_kwargs holds {', '.join(taken)}; expected as fields of the request.")
    messages = [message.plain() for message in asked.messages]
    for message in messages:
        if message["role"] == "developer" and not _names(template, "developer"):
            message["role"] = "system"  # as it was called before; templates leave out roles that they do not know
    meter_templates()
    try:
        text = tokenizer.apply_chat_template(
            as_wanted(messages, tokenizer, own, tools),  # as in training
            chat_template=own,
            tools=tools,
            documents=asked.documents or None,
            add_generation_prompt=asked.add_generation_prompt,
            continue_final_message=asked.continue_final_message,
            tokenize=False,
            **more,
        )
    except Exception as error:  # a template raises what it likes
        raise ConfigError(f"The chat template refuses these messages: {cut(str(error), 500)}") from error
    return text, list(_left_out(template, text, messages, asked, tools, more))


_OWN = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "messages",
    "max_length",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


def _left_out(
    template: str, text: str, messages: list[dict[str, Any]], asked: Templated, tools: Any, more: dict[str, Any]
) -> Iterator[str]:
    unseen = [f"messages.{at}" for at, message in enumerate(messages) if message["content"].strip() not in text]
    if unseen:  # reasoning of past turns, which most templates cut out, or a role that they do not know
        yield f"the chat template does not show all of {in_line(unseen, 8)}"
    if tools and not _names(template, "tools"):
        yield "the chat template does not show tools"
    if any("tool_calls" in message for message in messages) and not _names(template, "tool_calls"):
        yield "the chat template does not show tool_calls"
    if asked.documents and not _names(template, "documents"):
        yield "the chat template does not show documents"
    for name in more:
        if not _names(template, name):
            yield f"the chat template does not know {cut(name, 60)}"


def _names(template: str, name: str) -> bool:
    return re.search(rf"\b{re.escape(name)}\b", template) is not None
