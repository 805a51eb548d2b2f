"""Marks around the words of a conversation, to find them again in what a chat template makes of it.

A mark is one rare character, which templates carry along with the words that it touches. A copy of the
conversation with marks is rendered; without them its text must be the plain one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast

from theodora.data.masks import Span
from theodora.data.messages import Message, calls_of
from theodora.data.tools import parsed_or_same

# A thought is reasoning that stands in the content.
Kind = Literal["system", "user", "tool", "text", "thought", "reasoning", "call", "argument", "name", "tools"]

_ROOM = 0x4000  # characters for the marks of one conversation: two for each part
# Rare ideographs, which also Python's repr leaves as they are, and if data holds those, characters for private use.
_BASES = (0x20000, 0x24000, *range(0xF0000, 0x10C000, _ROOM))
RARE = re.compile("[\U00020000-\U0010fffd]")
# What stands between reasoning and answer where a turn's content holds both.
TAG = re.compile(r"(</?think>|\[/?THINK\]|<\|channel>(?:thought)?|<channel\|>)")
_CLOSING = ("</think>", "[/THINK]", "<channel|>")


@dataclass(frozen=True)
class Part:
    """A run of words of a conversation."""

    message: int
    """The index of its message; -1: of the tools on offer."""
    kind: Kind
    words: str


@dataclass(frozen=True)
class Marked:
    """A conversation with marks around its parts."""

    messages: list[Message]
    tools: Sequence[Any] | None
    parts: list[Part]
    bare: list[Part]
    """The parts that have no marks around them."""
    base: int

    def read(self, rendered: str) -> tuple[str, dict[int, Span]]:
        """The text without marks, and where in it each part (by its index) stands first."""
        pieces: list[str] = []
        begun, extents = dict[int, int](), dict[int, Span]()
        position = behind = 0
        for mark in RARE.finditer(rendered):
            number, is_end = divmod(ord(mark[0]) - self.base, 2)
            if not 0 <= number < len(self.parts):
                continue
            pieces.append(rendered[behind : mark.start()])
            position, behind = position + len(pieces[-1]), mark.end()
            if not is_end:
                begun.setdefault(number, position)
            elif number not in extents and number in begun:
                extents[number] = begun[number], position
        pieces.append(rendered[behind:])
        return "".join(pieces), extents


def mark(
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    text: str,
    *,
    arguments_in_text: bool = False,
    without: Collection[Kind] = (),
) -> Marked | None:
    """Put marks around all words of a conversation whose plain text is `text`, except around some kinds of them.

    Returns None if the text leaves no characters for marks, or if the conversation needs too many.
    """
    taken = {ord(character) for character in RARE.findall(text)} if not text.isascii() else set[int]()
    free = (b for b in _BASES if not any(b <= c < b + _ROOM for c in taken))
    base = next(free, None)
    if base is None:
        return None
    pen = _Pen(base, arguments_in_text, without)
    marked = [pen.message(index, message) for index, message in enumerate(messages)]
    offered = [pen.tool(tool) for tool in tools] if tools else tools
    return Marked(marked, offered, pen.parts, pen.bare, base) if 2 * len(pen.parts) <= _ROOM else None


@dataclass
class _Pen:
    base: int
    arguments_in_text: bool
    without: Collection[Kind]
    parts: list[Part] = field(default_factory=list[Part])
    bare: list[Part] = field(default_factory=list[Part])

    def message(self, index: int, message: Message) -> Message:
        role, marked = message["role"], dict(message)
        content = message.get("content")
        if isinstance(content, str):
            marked["content"] = (
                self._answer(index, content) if role == "assistant" else self.words(index, cast(Kind, role), content)
            )
        if role == "assistant":
            if isinstance(reasoning := message.get("reasoning_content"), str):
                marked["reasoning_content"] = self.words(index, "reasoning", reasoning)
            if isinstance(calls := calls_of(message), list):
                marked["tool_calls"] = [self._call(index, call) for call in cast("list[Any]", calls)]
        if role != "tool" and isinstance(name := message.get("name"), str):
            marked["name"] = self.words(index, "name", name)
        return marked

    def tool(self, tool: Any) -> Any:
        return self._named(-1, "tools", tool)

    def words(self, index: int, kind: Kind, text: str) -> str:
        words = text.strip()
        if not words:
            return text
        if kind in self.without:
            self.bare.append(Part(index, kind, words))
            return text
        begin = self.base + 2 * len(self.parts)
        self.parts.append(Part(index, kind, words))
        before, _, behind = text.partition(words)
        return f"{before}{chr(begin)}{words}{chr(begin + 1)}{behind}"

    def _answer(self, index: int, content: str) -> str:
        pieces = TAG.split(content)
        closed = [*(tag in _CLOSING for tag in pieces[1::2]), False]
        pieces[::2] = [
            self.words(index, "thought" if closes else "text", piece)
            for piece, closes in zip(pieces[::2], closed, strict=True)
        ]
        return "".join(pieces)

    def _call(self, index: int, call: Any) -> Any:
        named = self._named(index, "call", call)
        holder = named.get("function", named) if isinstance(named, dict) else None
        if not isinstance(holder, dict) or "arguments" not in holder:
            return named
        arguments = holder["arguments"]
        if isinstance(arguments, str) and not self.arguments_in_text:
            parsed = parsed_or_same(arguments)
            arguments = parsed if isinstance(parsed, dict) else arguments
        changed = {**cast(Message, holder), "arguments": self._values(index, arguments)}
        return changed if holder is named else {**cast(Message, named), "function": changed}

    def _named(self, index: int, kind: Kind, thing: Any) -> Any:
        """A call or a tool with marks around its name, which stands in it or in its `function`."""
        if not isinstance(thing, dict):
            return thing
        entry = cast(Message, thing)
        if isinstance(entry.get("function"), dict):
            return {**entry, "function": self._named(index, kind, entry["function"])}
        if isinstance(name := entry.get("name"), str):
            return {**entry, "name": self.words(index, kind, name)}
        return entry

    def _values(self, index: int, value: Any) -> Any:
        if isinstance(value, str):
            return self.words(index, "argument", value)
        if isinstance(value, Mapping):
            return {key: self._values(index, item) for key, item in cast("Mapping[str, Any]", value).items()}
        return [self._values(index, item) for item in cast("list[Any]", value)] if isinstance(value, list) else value
