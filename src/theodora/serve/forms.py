"""How the answer to a request is to be read, and what form it must have: reasoning, calls, structured outputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from theodora.errors import ConfigError
from theodora.serve.calls.families import (
    BY_NAME,
    THINKING_BY_NAME,
    Family,
    Parser,
    Thinking,
    family_of,
    thinking_of,
)
from theodora.serve.calls.forced import calls_format, constant, sequence, thinking_format
from theodora.serve.chat_formats import ChatFormat
from theodora.serve.config import ServeConfig
from theodora.serve.grammar import Grammar, Grammars, format_of
from theodora.serve.messages import NamedTool, ToolsAllowed
from theodora.serve.protocol import ChatRequest, Common
from theodora.serve.schemas import check_size, enforceable


@dataclass(frozen=True)
class Form:
    """How the answers to a request are read, and picked."""

    grammar: Grammar | None = None
    tokenizer: Any = None
    """Turns tokens into the text that is read; None for the model's own."""
    new_parser: Callable[[], Parser] | None = None
    """Makes a parser for one answer; None where answers are plain text."""


@dataclass
class Forms:
    """The forms that one model's answers can have."""

    tokenizer: Any
    config: ServeConfig
    grammars: Grammars
    _known: dict[str, tuple[Family | None, Thinking | None]] = field(default_factory=dict[str, Any])

    async def of_completion(self, asked: Common, chat_format: ChatFormat) -> Form:
        """The form of a completion of the model, or adapter, whose chat format it is.

        Raises:
            ConfigError: it makes no sense, or cannot be kept to.
        """
        form = asked.form
        if form is None:
            return Form()
        return Form(await self.grammars.grammar(lambda: format_of(form), ends=chat_format.ends))

    async def of_chat(self, asked: ChatRequest, prompt: str, chat_format: ChatFormat) -> Form:
        """The form of a chat's answer.

        Args:
            asked: the request.
            prompt: as the chat template wrote it.
            chat_format: of the model, or adapter, that is asked.

        Raises:
            ConfigError: it makes no sense, or cannot be kept to.
        """
        family, thinking = self._of_template(asked, chat_format.template_of(bool(asked.shown_tools)))
        if thinking is not None and thinking.closed_by(prompt):
            thinking = None
        opened = thinking is not None and thinking.opened_by(prompt)
        tools = {tool.function.name: tool.function.parameters or {} for tool in asked.shown_tools}
        format = None
        if asked.shown_tools or asked.form is not None:
            format = await self.grammars.made(self._format, asked, family, thinking, opened)
        read = thinking is not None or (family is not None and (bool(tools) or family.read is not None))
        words = (*(family.tokens if family else ()), *(thinking.tokens if thinking else ()))
        can_come = words if read else ()
        grammar = None if format is None else await self.grammars.grammar(format, can_come, chat_format.ends)
        if not read:
            return Form(grammar)
        parser = partial(Parser, family, tools or None, thinking, opened)
        return Form(grammar, with_visible(self.tokenizer, words), parser)

    def _of_template(self, asked: ChatRequest, own: str | None) -> tuple[Family | None, Thinking | None]:
        template = self.tokenizer.get_chat_template(own, [{}] if asked.shown_tools else None)
        if template not in self._known:
            self._known[template] = (
                _named(self.config.tool_call_parser, BY_NAME, family_of(template)),
                _named(self.config.reasoning_parser, THINKING_BY_NAME, thinking_of(template)),
            )
        return self._known[template]

    def _format(
        self, asked: ChatRequest, family: Family | None, thinking: Thinking | None, opened: bool
    ) -> dict[str, Any] | None:
        tools = asked.shown_tools
        must = _must_call(asked)
        strict = [tool.function.name for tool in tools if tool.function.strict]
        before = thinking_format(family, thinking, opened)
        if asked.form is not None:
            if must:
                raise ConfigError(
                    "tool_choice asks for a call, and response_format or structured_outputs for something else; "
                    "expected one of them."
                )
            said = format_of(asked.form)
            if family is not None and family.name == "harmony":
                said = sequence(constant("<|channel|>final<|message|>"), said)
            # response_format is about what is said, beside which tools can be called; structured_outputs about all.
            may_call = tools and family is not None and asked.response_format is not None
            calls = self._calls(asked, family, "required") if may_call and family is not None else None
            form = said if calls is None else {"type": "or", "elements": [said, calls]}
        elif tools and (must or strict or not asked.parallel_tool_calls):
            if family is None:
                raise ConfigError(
                    "tool_choice, strict and parallel_tool_calls need a tool_call_parser; this server has none."
                )
            if family.name == "harmony" and not must:
                return None  # its messages end with end tokens, which no grammar of several messages can hold
            form = self._calls(asked, family, "required" if must else "auto")
        else:
            return None
        return form if before is None else sequence(before, form)

    def _calls(self, asked: ChatRequest, family: Family, choice: Any) -> dict[str, Any]:
        tools: list[tuple[str, Any]] = []
        for tool in asked.shown_tools:
            schema = tool.function.parameters
            check_size(schema, f"The schema of {tool.function.name}")
            if schema is not None and tool.function.strict:
                schema = enforceable(schema, f"The schema of {tool.function.name}")
            tools.append((tool.function.name, schema))
        return calls_format(
            family, tools, choice, asked.parallel_tool_calls and not isinstance(asked.tool_choice, NamedTool)
        )


def _must_call(asked: ChatRequest) -> bool:
    choice = asked.tool_choice
    if isinstance(choice, ToolsAllowed):
        return choice.allowed_tools.mode == "required"
    return choice == "required" or isinstance(choice, NamedTool)


def _named(name: str, known: dict[str, Any], recognised: Any) -> Any:
    return recognised if name == "auto" else known.get(name)


def with_visible(tokenizer: Any, words: Sequence[str]) -> Any:
    """The tokenizer; or, if some of the words are special tokens of its, one whose text always shows these."""
    special = set(tokenizer.all_special_ids)
    visible = {id for word in words if (id := tokenizer.convert_tokens_to_ids(word)) in special}
    return _WithVisible(tokenizer, special - visible) if visible else tokenizer


class _WithVisible:
    def __init__(self, tokenizer: Any, hidden: set[int]) -> None:
        self._tokenizer, self._hidden = tokenizer, hidden

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = False, **options: Any) -> str:
        """As the tokenizer, but for the visible special tokens, which are never skipped."""
        if skip_special_tokens:
            tokens = [token for token in tokens if token not in self._hidden]
        return self._tokenizer.decode(tokens, skip_special_tokens=False, **options)
