"""Renders conversations with any chat template: as a prompt, or with the stretches that are to be learned."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from transformers import PreTrainedTokenizerBase

from theodora.data.answer_spans import Compared, RenderedChat, find_answers
from theodora.data.marks import Kind, mark
from theodora.data.messages import Message
from theodora.data.skeletons import Skeletons
from theodora.data.templates import Template, Tools, fallback_chat_template
from theodora.ends import template_end_ids
from theodora.errors import ConfigError

# Tags (`</think>`) may be the last words of an answer: such a token does not end the turn.
_TAG = re.compile(r"</?[\w:-]+>")

# Kinds of words to leave without marks, tried in this order: a template may escape such words, or compare them.
_UNMARKED: tuple[tuple[Kind, ...], ...] = (
    (),
    ("tools",),
    ("tools", "argument"),
    ("tools", "argument", "name", "system", "user", "tool"),
)


class ChatRenderer:
    """A tokenizer's chat template, or the fallback.

    Args:
        tokenizer: its own template is used if it has one.
        use_chat_template: False: the fallback template all the same. True: insist on the tokenizer's own.

    Raises:
        ConfigError: a template of its own is insisted on, but there is none; or there are several without a default.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None) -> None:
        if use_chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "use_chat_template is true, but the tokenizer has no chat template; "
                "set tokenizer.chat_template, or leave use_chat_template out"
            )
        self._tokenizer = tokenizer
        is_fallback = use_chat_template is False or not tokenizer.chat_template
        own = fallback_chat_template(tokenizer) if is_fallback else None
        try:
            self.template = Template.of(tokenizer, own, None)
        except ValueError as error:  # several templates, and none of them the default
            raise ConfigError(f"The tokenizer's chat template: {error}") from error
        # Some models have another template for conversations with tools.
        self._with_tools = Template.of(tokenizer, own, [{}]) if isinstance(tokenizer.chat_template, dict) else None

    @property
    def folds_system(self) -> bool:
        """Whether the template refuses a system turn, or drops it (Mistral's do once there is an answer)."""
        return self.template.refuses_system

    def render(self, messages: Sequence[Message], tools: Tools = None, *, generation_prompt: bool = False) -> str:
        """The conversation as text. A system turn that the template refuses is put before the first user turn's words.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses this conversation.
        """
        return self._for(tools).render(self.folded(messages), tools, generation_prompt)

    def render_for_training(self, messages: Sequence[Message], tools: Tools = None) -> RenderedChat | None:
        """The conversation and where its assistant turns (those without `weight: 0`) stand in it.

        Returns None if a turn cannot be found in what the template makes of it.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses this conversation.
        """
        return self._skeletons.render(self._for(tools), messages, tools)

    def _rendered_alone(
        self, template: Template, messages: Sequence[Message], tools: Tools, compared: list[Compared] | None = None
    ) -> RenderedChat | None:
        messages = self.folded(messages)
        text = template.render(messages, tools)
        for without in _UNMARKED:
            marked = mark(messages, tools, text, arguments_in_text=template.forms.arguments_in_text, without=without)
            if marked is None:
                continue
            marked_text = template.render_or_none(marked.messages, marked.tools)
            if marked_text and marked.read(marked_text)[0] == text:
                own_spans = template.generation_spans(messages, tools)
                return find_answers(template, self.turn_ends, marked, marked_text, own_spans, compared)
        return None

    @cached_property
    def _skeletons(self) -> Skeletons:
        return Skeletons(self._rendered_alone, self.turn_ends)

    @cached_property
    def turn_ends(self) -> re.Pattern[str]:
        """Tokens that can end a turn, the longest first."""
        added = self._tokenizer.added_tokens_decoder
        ends = {token.content for token in added.values() if token.special or not _TAG.fullmatch(token.content)}
        # A tag of a name alone is mostly part of an answer (`<think>`), unless the template ends turns with it.
        ends |= {added[id].content for id in template_end_ids(self._tokenizer) if id in added}
        ends |= {str(self._tokenizer.eos_token)}
        names = sorted((token for token in ends if token.strip()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)))

    def _for(self, tools: Tools) -> Template:
        return self._with_tools if tools and self._with_tools else self.template

    def folded(self, messages: Sequence[Message]) -> list[Message]:
        """The conversation, its system turn before the first user's words if the template takes none of its own."""
        messages = list(messages)
        if not messages or messages[0]["role"] != "system" or not self.folds_system:
            return messages
        rules, *rest = messages
        for i, message in enumerate(rest):
            if message["role"] == "user":
                rest[i] = {**message, "content": f"{rules['content']}\n\n{message['content']}"}
                return rest
        return messages


def tools_of(row: Mapping[str, Any]) -> Tools:
    """The tools on offer in a row's conversation."""
    return json.loads(row["tools"]) if row.get("tools") else None
