"""The build of a conversation: all of it that is not words, and the words by themselves.

Words are what stands between white space at the ends of a text (and between the tags of reasoning in an answer): those
that `marks` puts marks around, and ids. Tools, and arguments of calls that hold some text, are taken as a whole.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from theodora.data.marks import TAG
from theodora.data.messages import Message, calls_of
from theodora.data.tracing import PLAIN, ROOM, WITHIN

_PLAIN = ("role", "content")
_LONGEST_LITERAL = 1000  # characters


class Odd(Exception):
    """A conversation that is written otherwise than expected."""


class BuildReader:
    """Reads the build of a conversation; with `stands_in`, makes the conversation of placeholders of that build."""

    def __init__(self, *, stands_in: bool = False) -> None:
        self.key: list[object] = []
        self.words: list[str] = []
        self.objects: list[Any] = []
        self._said: set[int] = set()
        self._stands_in = stands_in

    @property
    def said(self) -> frozenset[int]:
        """The numbers of the words that are an answer's text or reasoning; known of placeholders."""
        return frozenset(self._said)

    def conversation(self, messages: Sequence[Message], tools: Sequence[Any] | None) -> tuple[list[Message], Any]:
        """The conversation itself, or that of placeholders.

        Raises:
            Odd: it is written otherwise than expected, or too long.
        """
        made = [self.message(message) for message in messages]
        self.key.append(len(tools) if tools else None)
        offered = [self.tool(tool) for tool in tools] if tools else tools
        if len(self.words) > ROOM or len(self.objects) > ROOM - 2:
            raise Odd
        return made, offered

    def message(self, message: Message) -> Message:
        """One turn."""
        role = message["role"]
        if not self._stands_in and self._is_plain(role, message):
            return message
        self.key.append(len(message))
        made: Message = {}
        for name, value in message.items():
            before = len(self.words)
            self.key.append(name)
            if name == "role" or value is None:
                made[name] = self.literal(value)
            elif name == "tool_calls":
                made[name] = self.calls(calls_of(message))
            elif not isinstance(value, str):
                made[name] = self.literal(value)
            elif name == "content" and role == "assistant" and TAG.search(value):
                self.key.append(0)
                pieces = TAG.split(value)
                for i, piece in enumerate(pieces):
                    pieces[i] = self.text(piece) if i % 2 == 0 else self.literal(piece)
                made[name] = "".join(pieces)
            else:
                made[name] = self.text(value)
            if role == "assistant" and name != "tool_calls":
                self._said.update(range(before, len(self.words)))
        return made

    def _is_plain(self, role: Any, message: Message) -> bool:
        """Whether a turn is a role and words, as most are, which are then noted: the key is the role alone."""
        words = message.get("content")
        if tuple(message) != _PLAIN or not isinstance(words, str) or not isinstance(role, str) or not words:
            return False
        if words.strip() != words or (role == "assistant" and ("<" in words or "[" in words) and TAG.search(words)):
            return False
        self.key.append(role)
        self.words.append(words)
        return True

    def literal(self, value: Any) -> Any:
        """A part that belongs to the build itself."""
        written = repr(value)
        if len(written) > _LONGEST_LITERAL:
            raise Odd
        self.key.append(written)
        return value

    def text(self, text: str) -> str:
        """A text: white space belongs to the build."""
        words = text.strip()
        if words == text and words:
            self.key.append(1)
        else:
            before, _, behind = text.partition(words) if words else (text, "", "")
            if len(before) + len(behind) > _LONGEST_LITERAL:
                raise Odd
            self.key += (2, before, behind, bool(words))
            if not words:
                return text
        self.words.append(words)
        if not self._stands_in:
            return text
        before, _, behind = text.partition(words)
        return f"{before}{chr(PLAIN + len(self.words) - 1)}{behind}"

    def calls(self, calls: Any) -> Any:
        """The calls of a turn."""
        if not isinstance(calls, list):
            raise Odd
        self.key += ("calls", len(cast("list[Any]", calls)))
        return [self.call(call) for call in cast("list[Any]", calls)]

    def call(self, call: Any) -> Any:
        """A call; its name and id are words."""
        if not isinstance(call, dict):
            raise Odd
        parts = cast(Message, call)
        self.key.append(len(parts))
        made: Message = {}
        for name, value in parts.items():
            self.key.append(name)
            if name == "function" and isinstance(value, dict):
                made[name] = self.call(value)
            elif name == "arguments":
                made[name] = self.arguments(value)
            elif isinstance(value, str) and name in ("name", "id"):
                made[name] = self.text(value)
            else:
                made[name] = self.literal(value)
        return made

    def arguments(self, value: Any) -> Any:
        """Arguments, as a whole if they hold some text."""
        if not isinstance(value, dict):
            raise Odd
        if not value:
            return self.literal(cast(object, value))
        # One with a text in it gets marks, and one without gets none.
        self.key.append(says := _says_something(value))
        within = self.object(value)
        return {"x": within} if says else {within: 1}

    def tool(self, tool: Any) -> Any:
        """A tool on offer, as a whole."""
        function = cast(Message, tool).get("function") if isinstance(tool, dict) else None
        name = cast(Message, function).get("name") if isinstance(function, dict) else None
        if not isinstance(name, str) or not name.strip():
            raise Odd
        return {"type": "function", "function": {"name": self.object(tool)}}

    def object(self, value: Any) -> str:
        """What stands within an object that is taken as a whole."""
        self.objects.append(value)
        self.key.append(3)
        return chr(WITHIN + len(self.objects) - 1)


def _says_something(value: Any) -> bool:
    """Whether there is text in an object, which `marks` would mark."""
    if isinstance(value, str):
        return bool(value.strip())
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return any(map(_says_something, cast("Sequence[Any]", parts)))
