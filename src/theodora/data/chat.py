"""Renders conversations with any chat template, and finds in the text which characters the model is to learn.

TRL's `assistant_only_loss` needs templates with `{% generation %}` markers, which few models ship. Here the markers are
used if there are any; otherwise each assistant turn is found by rendering the conversation up to it (with the
generation prompt) and through it. Where a template writes a turn differently once others follow (Qwen3 drops earlier
reasoning, DeepSeek-R1 every turn's), its words are found by rendering a marked copy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from theodora.data.masks import Span, agreement
from theodora.data.messages import Message, assistant, calls_of, user
from theodora.errors import ConfigError

Tools = Sequence[Any] | None

# Templates raise the first on purpose, and the others over rows that they were not written for.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

# A character for private use, which neither templates nor data hold.
_MARK = "\ue000"
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")

_FALLBACK_TEMPLATE = """\
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{ '### Response:\n' + message['content'] + eos_token + '\n\n' }}
{%- elif message['role'] == 'system' -%}
{{ message['content'] + '\n\n' }}
{%- else -%}
{{ '### Instruction:\n' + message['content'] + '\n\n' }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\n' }}{%- endif -%}
"""


def fallback_chat_template(tokenizer: PreTrainedTokenizerBase) -> str:
    """The template used for conversations if the tokenizer has none: Alpaca's headings, EOS after each answer.

    Save it with the tokenizer (`tokenizer.chat_template = …`) for others to prompt the model the same way.
    """
    return ("{{ bos_token }}" if adds_bos(tokenizer) else "") + _FALLBACK_TEMPLATE


def adds_bos(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether plain tokenisation begins with BOS."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the stretches of characters to learn, in order."""

    text: str
    spans: tuple[Span, ...]
    ends_open: bool
    """The last turn is learned, but the template wrote no end-of-turn token behind it."""
    altered: int
    """Learned turns of which the template left something out, such as reasoning."""
    as_prompted: bool
    """The last learned turn follows what a model is given to answer (DeepSeek-R1 is given an opened <think>)."""


class ChatRenderer:
    """A tokenizer's chat template, or the fallback.

    Args:
        tokenizer: its own template is used if it has one.
        use_chat_template: False: the fallback template all the same. True: insist on the tokenizer's own.

    Raises:
        ConfigError: a template of its own is insisted on, but there is none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, use_chat_template: bool | None = None) -> None:
        if use_chat_template and not tokenizer.chat_template:
            raise ConfigError(
                "use_chat_template is true, but the tokenizer has no chat template; "
                "set tokenizer.chat_template, or leave use_chat_template out"
            )
        self._tokenizer = tokenizer
        self.is_fallback = use_chat_template is False or not tokenizer.chat_template
        self._template = fallback_chat_template(tokenizer) if self.is_fallback else None

    @cached_property
    def folds_system(self) -> bool:
        """Whether the template refuses a system turn, or drops it (Mistral's do once there is an answer)."""
        asked = [{"role": "system", "content": _MARK}, user("a")]
        try:
            return any(_MARK not in self._render(chat) for chat in (asked, [*asked, assistant("a")]))
        except TEMPLATE_ERRORS:
            return True

    @cached_property
    def _controls(self) -> tuple[str, ...]:
        """Tokens that can end a turn, the longest first."""
        added = {token.content for token in self._tokenizer.added_tokens_decoder.values()}
        return tuple(sorted((token for token in added if token.strip()), key=len, reverse=True))

    @cached_property
    def _control(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._controls or (_MARK,))))

    def render(self, messages: Sequence[Message], tools: Tools = None, *, generation_prompt: bool = False) -> str:
        """The conversation as text. A system turn that the template refuses is put before the first user turn's words.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses this conversation.
        """
        return self._render(self._folded(messages), tools, generation_prompt)

    def render_for_training(self, messages: Sequence[Message], tools: Tools = None) -> RenderedChat | None:
        """The conversation and where its assistant turns (those without `weight: 0`) stand in it.

        Returns None if a turn cannot be found in what the template makes of it.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses this conversation.
        """
        messages = self._folded(messages)
        assistants = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        learned = [i for i in assistants if messages[i].get("weight") != 0]
        text = self._render(messages, tools)
        marked = self._marked_spans(messages, tools)
        if len(marked) == len(assistants):
            spans = [span for i, span in zip(assistants, marked, strict=True) if i in learned]
        elif marked and learned == assistants:
            spans = marked
        else:
            spans = [self._span(text, messages, i, tools) for i in learned]
        found = [span for span in spans if span is not None]
        turns = [messages[i].get("content") or "" for i in learned]
        if len(found) < len(spans):
            return None
        altered = 0
        if len(found) == len(turns):  # markers may split a turn into several stretches
            # What the generation prompt opens (<think>) stands in front of the stretch.
            written = [
                text[before:end] for before, (_, end) in zip([0, *(end for _, end in found)], found, strict=False)
            ]
            if not all(_holds(*pair) for pair in zip(written, map(_without_reasoning, turns), strict=True)):
                return None
            altered = sum(not _holds(*pair) for pair in zip(written, turns, strict=True))
        last = learned[-1] if learned else 0
        return RenderedChat(
            text=text,
            spans=tuple(found),
            ends_open=last == len(messages) - 1 and not text.rstrip().endswith(self._controls),
            altered=altered,
            as_prompted=last == 0 or self._length_if_prefix(text, messages[:last], tools, prompt=True) is not None,
        )

    def _span(self, text: str, messages: Sequence[Message], index: int, tools: Tools) -> Span | None:
        """From behind the generation prompt to behind the end-of-turn token of one assistant turn."""
        start = self._length_if_prefix(text, messages[:index], tools, prompt=True)
        end = self._length_if_prefix(text, messages[: index + 1], tools)
        if start is None or end is None:
            words = self._find_words(text, messages, index, tools)
            if start is None:
                start = words[0] if words else self._end_of_shared_header(text, messages[:index], tools)
            if end is None and start is not None:
                end = words[1] if words else self._end_of_overlap(text, start, messages[: index + 1], tools)
        if start is None or end is None or start >= end:
            return None
        # A line break behind the end-of-turn token is the template's: a model stops before it.
        closed = text[start:end].rstrip()
        if closed.endswith(self._controls):
            return start, start + len(closed)
        return start, self._behind_end_of_turn(text, end)

    def _length_if_prefix(
        self, text: str, messages: Sequence[Message], tools: Tools, prompt: bool = False
    ) -> int | None:
        """The length of what these first messages render to, if the whole conversation begins so."""
        prefix = self._render_or_none(messages, tools, prompt)
        return len(prefix) if prefix is not None and text.startswith(prefix) else None

    def _find_words(self, text: str, messages: Sequence[Message], index: int, tools: Tools) -> Span | None:
        """Where the words of one turn stand, from a copy of the conversation in which a mark stands for them."""
        if not messages[index].get("content"):
            return None
        marked = [*messages[:index], {**messages[index], "content": _MARK}, *messages[index + 1 :]]
        before, mark, after = (self._render_or_none(marked, tools) or "").partition(_MARK)
        start, end = len(before), len(text) - len(after)
        found = mark and start < end and text.startswith(before) and text.endswith(after)
        return (start, end) if found else None

    def _end_of_shared_header(self, text: str, messages: Sequence[Message], tools: Tools) -> int | None:
        """Where a turn departs from the generation prompt, which opens it otherwise than it goes on."""
        history = self._length_if_prefix(text, messages, tools)
        prompted = self._render_or_none(messages, tools, prompt=True)
        if history is None or prompted is None:
            return None
        shared = agreement(text, prompted)
        inside = (token for token in self._control.finditer(text, history) if token.start() < shared < token.end())
        shared = next((token.start() for token in inside), shared)
        return shared if shared > history else None

    def _end_of_overlap(self, text: str, start: int, messages: Sequence[Message], tools: Tools) -> int | None:
        """The end of a turn without words (a tool call) that is written with something in front when it is the last."""
        alone = self._render_or_none(messages, tools) or ""
        for cut in range(start, len(alone)):
            if text.startswith(alone[cut:], start):
                return start + len(alone) - cut
        return None

    def _behind_end_of_turn(self, text: str, position: int) -> int:
        token = self._control.search(text, position)
        return token.end() if token and not text[position : token.start()].strip() else position

    def _render_or_none(self, messages: Sequence[Message], tools: Tools, prompt: bool = False) -> str | None:
        try:
            return self._render(messages, tools, prompt) if messages else None
        except TEMPLATE_ERRORS:
            return None

    def _marked_spans(self, messages: Sequence[Message], tools: Tools) -> list[Span]:
        """The stretches between a template's own `{% generation %}` markers; empty if it has none."""
        template = self._tokenizer.get_chat_template(self._template, list(tools) if tools else None)
        if not _GENERATION.search(template):
            return []
        _, spans = render_jinja_template(
            conversations=[_cleaned(messages)],
            tools=list(tools) if tools else None,
            chat_template=template,
            return_assistant_tokens_mask=True,
            **cast(dict[str, Any], self._tokenizer.special_tokens_map),
        )
        return cast(list[Span], spans[0])

    def _render(self, messages: Sequence[Message], tools: Tools = None, generation_prompt: bool = False) -> str:
        text = self._tokenizer.apply_chat_template(
            _cleaned(messages),
            tools=list(tools) if tools else None,
            chat_template=self._template,
            add_generation_prompt=generation_prompt,
            tokenize=False,
        )
        assert isinstance(text, str)
        return text

    def _folded(self, messages: Sequence[Message]) -> list[Message]:
        messages = list(messages)
        if not self.folds_system or not messages or messages[0]["role"] != "system":
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


def _cleaned(messages: Sequence[Message]) -> list[Message]:
    """Messages as templates expect them: without empty fields, which some print as "None", and without `weight`."""
    whole = [{**message, "tool_calls": calls_of(message)} for message in messages]
    return [{k: v for k, v in message.items() if v is not None and k != "weight"} for message in whole]


def _without_reasoning(content: str) -> str:
    return content.rpartition("</think>")[2]


def _holds(rendered: str, content: str) -> bool:
    return "".join(content.split()) in "".join(rendered.split())
