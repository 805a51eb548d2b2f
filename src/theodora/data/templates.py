"""A chat template by itself: renders messages, once it is known in which form it shows what they hold.

Templates differ in what they expect: tool calls' arguments as an object or as JSON text, content as a string or as a
list of parts, reasoning as a field or as a part. Each form is tried on a few words, and the first that shows them is
taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, cast

from jinja2.exceptions import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from theodora.data.masks import Span, agreement
from theodora.data.messages import Message, assistant, calls_of, user
from theodora.data.tools import parsed_or_same
from theodora.metered import meter_templates

Tools = Sequence[Any] | None

# Templates raise the first on purpose, and the others over rows that they were not written for.
TEMPLATE_ERRORS = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)

_HALF_A_TAG = re.compile(r"<[^<>\s]*$")
_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Reasoning before the answer in its text, as data sets without a field for it have it.
_THOUGHT = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_LIST = re.compile(r"""\[\{["']type["']: ?["']t""")
# What templates call reasoning: Qwen and GLM, Gemma and Nemotron, gpt-oss and LFM.
_REASONING = ("reasoning_content", "reasoning", "thinking")

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
class Forms:
    """In which form a template shows what messages hold, and whether it shows reasoning at all."""

    in_parts: bool = False
    """Content is a list of parts (the templates of some vision models read nothing else)."""
    arguments_in_text: bool = False
    """A call's arguments are JSON text (DeepSeek adds them to strings)."""
    thinking_in_parts: bool = False
    """Reasoning is a part of the content (Magistral, Ministral)."""
    thinking_in_field: bool = False
    """Reasoning is understood in a field, but not in the content as <think>…</think> (Gemma 4, gpt-oss)."""
    shows_reasoning: bool = False
    """Reasoning in a field is shown, be it the last answer's alone."""
    shows_thoughts: bool = False
    """Reasoning in the content is shown, too."""


@dataclass(frozen=True)
class Template:
    """A Jinja template with the special tokens that it may name."""

    text: str
    tokens: tuple[tuple[str, Any], ...]

    @staticmethod
    def of(tokenizer: PreTrainedTokenizerBase, template: str | None, tools: Tools) -> Template:
        """`template`, or the one that a tokenizer has for conversations with or without tools."""
        text = tokenizer.get_chat_template(template, list(tools) if tools else None)
        tokens = cast(Mapping[str, Any], tokenizer.special_tokens_map)
        return Template(text, tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in tokens.items()))

    @property
    def is_marked(self) -> bool:
        """Whether it has `{% generation %}` markers around what a model writes."""
        return _GENERATION.search(self.text) is not None

    @property
    def forms(self) -> Forms:
        """The forms in which it shows what messages hold."""
        return _forms(self)

    @property
    def refuses_system(self) -> bool:
        """Whether it refuses a system turn, or drops it once there is an answer."""
        return _refuses_system(self)

    @property
    def always_prompts(self) -> bool:
        """Whether it writes a generation prompt behind any conversation, asked for or not (Command A)."""
        return _always_prompts(self)

    @property
    def header(self) -> str:
        """What the generation prompt adds to a question, without blanks in front."""
        return _header(self)

    def render(self, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str:
        """The conversation as text.

        Raises:
            one of TEMPLATE_ERRORS: the template refuses this conversation.
        """
        return _render(self, in_forms(messages, self.forms), tools, prompt=prompt)[0]

    def render_or_none(self, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str | None:
        """The same, or None if the template refuses this conversation."""
        try:
            return self.render(messages, tools, prompt)
        except TEMPLATE_ERRORS:
            return None

    def generation_spans(self, messages: Sequence[Message], tools: Tools = None) -> list[Span]:
        """The stretches of `render`'s text between `{% generation %}` markers; empty if there are none."""
        if not self.is_marked:
            return []
        return _render(self, in_forms(messages, self.forms), tools, marked=True)[1]


def for_template(
    messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase, template: str | None = None, tools: Tools = None
) -> list[Message]:
    """Messages in the form in which a template shows all that it can, for `apply_chat_template`.

    Args:
        messages: as `tokenize` takes them.
        tokenizer: whose chat template is used.
        template: another one.
        tools: the tools on offer, for which some tokenizers have a template of its own.
    """
    forms = Template.of(tokenizer, template, tools).forms
    return in_forms(messages, forms)


def in_forms(messages: Sequence[Message], forms: Forms) -> list[Message]:
    """Messages in the form that a template expects."""
    return [_in_form(message, forms) for message in messages]


def _in_form(message: Message, forms: Forms) -> Message:
    """A message in a template's form: without empty fields, which some print as "None", and without `weight`."""
    whole = {k: v for k, v in message.items() if v is not None and k != "weight"}
    if calls := calls_of(message):
        whole["tool_calls"] = [_call_in_form(call, forms.arguments_in_text) for call in calls]
    else:
        whole.pop("tool_calls", None)
    reasoning = next((whole[key] for key in _REASONING if whole.get(key)), None)
    is_answer = message["role"] == "assistant"
    if (
        forms.thinking_in_field
        and is_answer
        and not reasoning
        and (thought := _THOUGHT.match(whole.get("content") or ""))
    ):
        reasoning, whole["content"] = thought[1].strip(), whole["content"][thought.end() :]
    as_part = forms.thinking_in_parts and is_answer and reasoning
    if as_part or (forms.in_parts and isinstance(whole.get("content"), str)):
        text = whole.get("content") or ""
        thinking = [{"type": "thinking", "thinking": reasoning}] if as_part else []
        whole["content"] = thinking + ([{"type": "text", "text": text}] if text or not thinking else [])
    if reasoning and not as_part:
        whole |= dict.fromkeys(_REASONING, reasoning)
    return whole


def _call_in_form(call: Message, in_text: bool) -> Message:
    holder = call.get("function") if isinstance(call.get("function"), dict) else call
    arguments = cast(Message, holder).get("arguments")
    if arguments is None:
        return call
    if in_text and not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not in_text and isinstance(arguments, str):
        arguments = value if isinstance(value := parsed_or_same(arguments), dict) else arguments
    changed = {**cast(Message, holder), "arguments": arguments}
    return changed if holder is call else {**call, "function": changed}


def _render(
    template: Template, messages: list[Message], tools: Tools, *, prompt: bool = False, marked: bool = False
) -> tuple[str, list[Span]]:
    meter_templates()
    texts, spans = render_jinja_template(
        conversations=[messages],
        tools=list(tools) if tools else None,
        chat_template=template.text,
        add_generation_prompt=prompt,
        return_assistant_tokens_mask=marked,
        **dict(template.tokens),
    )
    return texts[0], cast("list[Span]", spans[0]) if marked else []


@lru_cache(maxsize=64)
def _forms(template: Template) -> Forms:
    forms = Forms()
    answered = [user("qxasked"), assistant("qxtext")]
    if not _shows(template, forms, answered, "qxtext"):
        as_parts = replace(forms, in_parts=True)
        forms = as_parts if _shows(template, as_parts, answered, "qxtext") else forms
    function = {"name": "qxname", "arguments": {"qxkey": "qxvalue"}}
    call = {"id": "qxcallid1", "type": "function", "function": function}  # Mistral wants nine letters or digits
    called = [user("qxasked"), {**assistant(""), "tool_calls": [call]}]
    if not _shows(template, forms, called, "qxname", "qxkey", "qxvalue"):
        in_text = replace(forms, arguments_in_text=True)
        forms = in_text if _shows(template, in_text, called, "qxname", "qxkey", "qxvalue") else forms
    return _forms_of_reasoning(template, forms)


def _forms_of_reasoning(template: Template, forms: Forms) -> Forms:
    field = [user("qxasked"), {**assistant("qxtext"), "reasoning_content": "qxreason"}]
    inside = [user("qxasked"), assistant("<think>\nqxreason\n</think>\n\nqxtext")]
    fits = (
        f for f in (forms, replace(forms, thinking_in_parts=True)) if _shows(template, f, field, "qxreason", "qxtext")
    )
    if fitting := next(fits, None):
        same = _text(template, fitting, inside) == _text(template, fitting, field)
        forms = replace(fitting, shows_reasoning=True, thinking_in_field=not same)
    return replace(forms, shows_thoughts=_shows(template, forms, inside, "qxreason"))


@lru_cache(maxsize=64)
def _refuses_system(template: Template) -> bool:
    asked = [{"role": "system", "content": "qxsystem"}, user("qxasked")]
    chats = (asked, [*asked, assistant("qxtext")])
    return not all(_shows(template, template.forms, chat, "qxsystem") for chat in chats)


@lru_cache(maxsize=64)
def _header(template: Template) -> str:
    plain, prompted = (_behind(template, [user("qxasked")], "qxasked", prompt=prompt) for prompt in (False, True))
    return prompted[whole_tags(prompted, agreement(plain, prompted)) :].lstrip()


@lru_cache(maxsize=64)
def _always_prompts(template: Template) -> bool:
    turns = [user("qxasked"), assistant("qxtext"), user("qxagain")]
    asked, answered = _behind(template, turns[:1], "qxasked"), _behind(template, turns[:2], "qxtext")
    followed = _behind(template, turns, "qxtext").partition("qxagain")[0]
    if not followed or followed.startswith(answered):
        return False
    header = answered[whole_tags(answered, agreement(answered, followed)) :]
    continues = _behind(template, turns[:2], "qxasked").startswith(asked)
    return continues and bool(header.strip()) and asked.endswith(header)


def whole_tags(text: str, end: int) -> int:
    """`end`, or the beginning of the tag that it would cut."""
    half = _HALF_A_TAG.search(text[:end])
    return half.start() if half else end


def _behind(template: Template, messages: Sequence[Message], word: str, *, prompt: bool = False) -> str:
    try:
        text, _ = _render(template, [_in_form(message, template.forms) for message in messages], None, prompt=prompt)
    except TEMPLATE_ERRORS:
        return ""
    return text.rpartition(word)[2]


def _shows(template: Template, forms: Forms, messages: Sequence[Message], *words: str) -> bool:
    text = _text(template, forms, messages) or ""
    # A template that prints the list itself ("[{'type': 'text', …") does not understand parts.
    return all(word in text for word in words) and not _LIST.search(text)


def _text(template: Template, forms: Forms, messages: Sequence[Message]) -> str | None:
    try:
        return _render(template, [_in_form(message, forms) for message in messages], None)[0]
    except TEMPLATE_ERRORS:
        return None
