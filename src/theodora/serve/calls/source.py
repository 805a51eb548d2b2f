"""An answer's text while it arrives, for readers that are written as if all of it were there.

A reader is a generator: it takes text from a `Source`, emits events into it, and yields where it needs more text. What
it does depends on the text alone and never on where it was cut, so that a stream and a whole answer bring the same.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import regex


@dataclass(frozen=True)
class Text:
    """More of what is said to the user."""

    text: str


@dataclass(frozen=True)
class Reasoning:
    """More of what the model thinks before it answers."""

    text: str


@dataclass(frozen=True)
class Call:
    """A call begins."""

    name: str
    id: str | None = None
    """Where the format has one that its template wants back."""


@dataclass(frozen=True)
class Arguments:
    """More of the latest call's arguments, which are JSON when they are whole."""

    text: str


Event = Text | Reasoning | Call | Arguments
type_of_text = type[Text] | type[Reasoning]

Reader = Generator[None, None, Any]
"""Yields where more text is needed."""


class Source:
    """The text so far, how far it has been read, and what it has brought."""

    def __init__(self) -> None:
        self.text = ""
        self.at = 0
        self.ended = False
        self._events: list[Event] = []
        self._space = ""  # at the end of what has been said, as long as nothing follows
        self._kind: type_of_text = Text
        self._fresh = False  # nothing has been said since a call or since the reasoning

    def take_events(self) -> list[Event]:
        """What came since the last time; neighbours of one kind together."""
        events, self._events = self._events, []
        joined: list[Event] = []
        for event in events:
            last = joined[-1] if joined else None
            if last is not None and type(last) is type(event) and not isinstance(event, Call):
                joined[-1] = type(event)(last.text + event.text)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
            else:
                joined.append(event)
        return joined

    # What comes out

    def say(self, text: str, kind: type_of_text = Text) -> None:
        """Bring text. Space at its end waits for what follows, since none is left before a call."""
        if self._fresh:
            text = text.lstrip()
        if not text:
            return
        self._fresh = False
        if kind is not self._kind:
            self._space, self._kind = "", kind
        whole = self._space + text
        body = whole.rstrip()
        self._space = whole[len(body) :]
        if body:
            self._events.append(kind(body))

    def trim(self) -> None:
        """Nothing of the space before and after this place is brought."""
        self._space, self._fresh = "", True

    def call(self, name: str, id: str | None = None) -> None:
        """Begin a call."""
        self.trim()
        self._events.append(Call(name, id))

    def argue(self, text: str) -> None:
        """Bring a piece of the call's arguments."""
        if text:
            self._events.append(Arguments(text))

    def close(self) -> None:
        """Bring the space that still waits; there is no more text."""
        if self._space and self._kind is Text:
            self._events.append(Text(self._space))
        self._space = ""

    # What comes in

    def rest(self) -> str:
        """What has arrived and not been read."""
        return self.text[self.at :]

    def peek(self, count: int = 1) -> Generator[None, None, str]:
        """The next characters: fewer only where the text ends."""
        while len(self.text) - self.at < count and not self.ended:
            yield
        return self.text[self.at : self.at + count]

    def space(self) -> Reader:
        """Skip space."""
        while True:
            while self.at < len(self.text) and self.text[self.at].isspace():
                self.at += 1
            if self.at < len(self.text) or self.ended:
                return
            yield

    def literal(self, *texts: str) -> Generator[None, None, str | None]:
        """Which of these comes next, which is then read; None for neither, and nothing is read."""
        while True:
            rest = self.text[self.at : self.at + max(map(len, texts))]
            for text in texts:
                if rest.startswith(text):
                    self.at += len(text)
                    return text
            if self.ended or not any(text.startswith(rest) for text in texts):
                return None
            yield

    def pattern(self, pattern: Any) -> Generator[None, None, Any]:
        """The match of a `regex` pattern that comes next, which is then read; None if there is none.

        The pattern must end in something definite, since the first match is taken.
        """
        while True:
            match = pattern.match(self.text, self.at, partial=not self.ended)
            if match is None:
                return None
            if not match.partial:
                self.at = match.end()
                return match
            yield

    def until(self, *markers: str) -> Generator[None, None, tuple[str, str | None]]:
        """The text before the first of these, and which it is; both are read. Without one: all, and None."""
        searched = self.at
        longest = max(map(len, markers))
        while True:
            if (first := _first(self.text, markers, searched)) is not None:
                where, marker = first
                before = self.text[self.at : where]
                self.at = where + len(marker)
                return before, marker
            if self.ended:
                before = self.text[self.at :]
                self.at = len(self.text)
                return before, None
            searched = max(self.at, len(self.text) - longest + 1)
            yield

    def bring_until(
        self, markers: tuple[str, ...], bring: Callable[[str], None] | None = None
    ) -> Generator[None, None, str | None]:
        """Bring text up to the first of these, which is read; holds back only what may be the beginning of one.

        Args:
            markers: the texts that end it.
            bring: what to do with the text; without it, it is said.
        """
        bring = bring or self.say
        while True:
            if (first := _first(self.text, markers, self.at)) is not None:
                where, marker = first
                bring(self.text[self.at : where])
                self.at = where + len(marker)
                return marker
            stop = len(self.text) - (0 if self.ended else _beginning(self.text, self.at, markers))
            bring(self.text[self.at : stop])
            self.at = stop
            if self.ended:
                return None
            yield

    def think(self, text: str) -> None:
        """Bring reasoning."""
        self.say(text, Reasoning)


def _first(text: str, markers: tuple[str, ...], start: int) -> tuple[int, str] | None:
    places = [(where, -len(marker), marker) for marker in markers if (where := text.find(marker, start)) >= 0]
    if not places:
        return None
    where, _, marker = min(places)  # the longest of those at one place
    return where, marker


def _beginning(text: str, start: int, markers: tuple[str, ...]) -> int:
    """Characters at the end of the text that may be the beginning of a marker."""
    most = min(len(text) - start, max(map(len, markers), default=1) - 1)
    return next(
        (size for size in range(most, 0, -1) if any(marker.startswith(text[len(text) - size :]) for marker in markers)),
        0,
    )


def compiled(pattern: str) -> Any:
    """A pattern for `Source.pattern`."""
    return regex.compile(pattern)
