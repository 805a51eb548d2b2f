"""Conversations of one build are rendered once: the others differ in words alone, which are put in.

A conversation of that build with a placeholder for each run of words is rendered and searched as any other, while
`tracing` watches what the template asks about the words. Where it asks nothing, or what other conversations answer
alike, they give the same text around their words, and what is learned of them lies between the same pieces of it.
Whatever does not fit is rendered by itself, which is the same with more work.
"""

from __future__ import annotations

import json
import re
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import accumulate
from typing import Any

from jinja2.exceptions import TemplateError

from theodora.data.answer_spans import Compared, RenderedChat
from theodora.data.builds import BuildReader, Odd
from theodora.data.marks import RARE
from theodora.data.masks import Span, agreement
from theodora.data.messages import Message
from theodora.data.templates import TEMPLATE_ERRORS, Forms, Template, Tools, in_forms
from theodora.data.tracing import (
    ESCAPED,
    MOST_TEXT,
    OBJECTS,
    PLAIN,
    WITHIN,
    Condition,
    Trace,
    Untraceable,
    holds_words,
    is_placeholder,
    render_traced,
    tracing,
)
from theodora.errors import ConfigError

_MOST = 1024
"""Builds to remember. One that comes for the first time is rendered as it is."""
_TRIED = 16
"""Builds that are tried in vain before a template is given up."""
_MOST_TIMES = 100
"""How often the same words are put in or asked about: it must cost no more than the meter lets a template cost."""
_MOST_IN_OBJECTS = 1 << 13  # characters: each text in them needs a mark, and there is so much room

Place = tuple[int, int]
"""A place in a text: the number of a piece, and characters from where that begins."""
Piece = str | int
"""Text of the template, or the number of words that are put in: first those of the build, those again as JSON writes
them, then objects as JSON."""
Alone = Callable[[Template, Sequence[Message], Tools, list[Compared] | None], RenderedChat | None]


@dataclass(frozen=True)
class _Asked:
    """A condition on words."""

    ask: str
    constant: str
    pieces: tuple[Piece, ...]
    answer: bool | str

    def holds(self, words: Sequence[str]) -> bool:
        """Whether these words answer as the placeholders did."""
        text = "".join(words[piece] if isinstance(piece, int) else piece for piece in self.pieces)
        if self.ask == "in":
            return (self.constant in text) is self.answer
        if self.ask == "starts":
            return text.startswith(self.constant) is self.answer
        if self.ask == "ends":
            return text.endswith(self.constant) is self.answer
        if self.ask == "==":
            return (text == self.constant) is self.answer
        return datetime.now().strftime(self.constant) == self.answer


@dataclass(frozen=True)
class _Skeleton:
    """What conversations of one build have in common."""

    pieces: tuple[Piece, ...]
    escaped: tuple[int, ...]
    """The numbers of the words that are written as JSON writes them."""
    objects: tuple[tuple[int, str, Mapping[str, Any]], ...]
    """The objects that are written as JSON, which part of them ("": all), and with which options."""
    asked: tuple[_Asked, ...]
    ends: tuple[tuple[Place, Place], ...]
    """Where tokens stand that can end a turn."""
    spans: tuple[tuple[Place, Place], ...]
    answered: Mapping[int, tuple[Place, Place]]
    unshown: tuple[int, ...]
    """The numbers of the words that the template does not write."""
    chat: RenderedChat
    """That of the placeholders."""

    def filled(self, words: list[str], objects: Sequence[Any], ends: re.Pattern[str]) -> RenderedChat | None:
        """The conversation with these words; None if they need a render of their own."""
        if not all(map(str.isascii, words)) and any(map(RARE.search, words)):
            return None
        if not all(asked.holds(words) for asked in self.asked):
            return None
        if self.escaped:
            words = [*words, *(json.dumps(words[i], ensure_ascii=False)[1:-1] for i in self.escaped)]
        if self.objects:
            written = [json.dumps(objects[i][part] if part else objects[i], **how) for i, part, how in self.objects]
            whole = "".join(written)
            # A tag in an object could be taken for one of the template's.
            if len(whole) > _MOST_IN_OBJECTS or "<" in whole or RARE.search(whole):
                return None
            words = [*words, *written]
        parts = [words[piece] if isinstance(piece, int) else piece for piece in self.pieces]
        text = "".join(parts)
        if any(words[i] in text for i in self.unshown):
            return None  # a call's name counts as shown where the answer holds it
        begins = list(accumulate(map(len, parts), initial=0))
        found = [token.span() for token in ends.finditer(text)]
        if len(found) != len(self.ends) or found != _spans(self.ends, begins):
            return None
        return RenderedChat(
            text=text,
            spans=tuple(_spans(self.spans, begins)),
            ends_open=self.chat.ends_open,
            as_prompted=self.chat.as_prompted,
            earlier_as_prompted=self.chat.earlier_as_prompted,
            hidden=self.chat.hidden,
            answered={turn: _span(places, begins) for turn, places in self.answered.items()},
        )


def _spans(places: Sequence[tuple[Place, Place]], begins: Sequence[int]) -> list[Span]:
    return [(begins[i] + start, begins[j] + end) for (i, start), (j, end) in places]


def _span(places: tuple[Place, Place], begins: Sequence[int]) -> Span:
    (i, start), (j, end) = places
    return begins[i] + start, begins[j] + end


@dataclass
class _Seen:
    """What came up while a conversation of placeholders was rendered."""

    trace: Trace = field(default_factory=Trace)
    first: str | None = None
    """The first render: the whole conversation."""
    generated: Sequence[str] = ()


@dataclass(frozen=True)
class _Watched(Template):
    """A template, each of whose renders is traced, too."""

    base: Template
    seen: _Seen

    @property
    def forms(self) -> Forms:
        return self.base.forms

    @property
    def header(self) -> str:
        return self.base.header

    @property
    def always_prompts(self) -> bool:
        return self.base.always_prompts

    def render(self, messages: Sequence[Message], tools: Tools = None, prompt: bool = False) -> str:
        try:
            text = self.base.render(messages, tools, prompt)
        except TEMPLATE_ERRORS as error:
            try:
                self._traced(messages, tools, prompt)
            except TEMPLATE_ERRORS as same:
                if isinstance(same, TemplateError) and str(same) == str(error):
                    raise error from None
            raise Untraceable from error
        try:
            traced = self._traced(messages, tools, prompt)
        except TEMPLATE_ERRORS as error:  # words were no string to it, which is no refusal of the template's
            raise Untraceable from error
        if _expanded(traced, self.seen.trace) != text:
            raise Untraceable
        if self.seen.first is None:
            self.seen.first, self.seen.generated = traced, list(self.seen.trace.generated)
        return text

    def generation_spans(self, messages: Sequence[Message], tools: Tools = None) -> list[Span]:
        spans = self.base.generation_spans(messages, tools)
        text = _expanded(self.seen.first or "", self.seen.trace)
        # Where they are not what stands between the markers, they move otherwise than the text.
        if spans and [text[a:b] for a, b in spans] != [_expanded(g, self.seen.trace) for g in self.seen.generated]:
            raise Untraceable
        return spans

    def _traced(self, messages: Sequence[Message], tools: Tools, prompt: bool) -> str:
        return render_traced(self.text, in_forms(messages, self.forms), tools, dict(self.tokens), prompt)


def _expanded(traced: str, trace: Trace) -> str:
    """A traced text as the template writes it."""
    return "".join(_written(character, trace) for character in traced) if holds_words(traced) else traced


def _written(character: str, trace: Trace) -> str:
    code = ord(character)
    if ESCAPED <= code < OBJECTS:
        return chr(code - ESCAPED + PLAIN)
    if OBJECTS <= code < WITHIN:
        value, _, how = trace.objects[code - OBJECTS]
        return json.dumps(value, **how)
    return character


class Skeletons:
    """Renders conversations for training, those of a known build by putting in their words.

    Args:
        alone: renders and searches one conversation, and adds to a list what it compared.
        ends: matches the tokens that can end a turn.
    """

    def __init__(self, alone: Alone, ends: re.Pattern[str]) -> None:
        self._alone, self._ends = alone, ends
        self._known = OrderedDict[tuple[object, ...], "_Skeleton | bool"]()
        self._failed, self._built = 0, 0

    def render(self, template: Template, messages: Sequence[Message], tools: Tools) -> RenderedChat | None:
        """The conversation and where its answers stand, as `ChatRenderer.render_for_training` gives it."""
        if self._failed >= _TRIED and not self._built:
            return self._alone(template, messages, tools, None)
        read = BuildReader()
        try:
            read.conversation(messages, tools)
        except (Odd, *TEMPLATE_ERRORS):
            return self._alone(template, messages, tools, None)
        key = tuple(read.key)
        known = self._known.get(key)
        if isinstance(known, _Skeleton):
            self._known.move_to_end(key)
            if chat := known.filled(read.words, read.objects, self._ends):
                return chat
        chat = self._alone(template, messages, tools, None)
        if known is None:
            self._remember(key, True)
        elif known is True:
            skeleton = self._build(template, messages, tools)
            fits = skeleton is not None and skeleton.filled(read.words, read.objects, self._ends) in (None, chat)
            self._built += fits
            self._failed += not fits
            self._remember(key, skeleton if skeleton is not None and fits else False)
        return chat

    def _remember(self, key: tuple[object, ...], what: _Skeleton | bool) -> None:
        self._known[key] = what
        if len(self._known) > _MOST:
            self._known.popitem(last=False)

    def _build(self, template: Template, messages: Sequence[Message], tools: Tools) -> _Skeleton | None:
        read, compared, seen = BuildReader(stands_in=True), list[Compared](), _Seen()
        watched = _Watched(template.text, template.tokens, template, seen)
        try:
            standing_in, offered = read.conversation(messages, tools)
            with tracing(seen.trace):
                chat = self._alone(watched, standing_in, offered, compared)
        except (Odd, Untraceable, ConfigError, *TEMPLATE_ERRORS):
            return None
        if chat is None or seen.first is None or seen.trace.failed or not all(map(_compares_alike, compared)):
            return None
        try:
            return _skeleton(chat, seen.first, seen.trace, self._ends, len(read.words), len(read.objects), read.said)
        except _Unplaced:
            return None


def _compares_alike(compared: Compared) -> bool:
    """Whether all conversations of a build compare alike here: without words, or up to a place behind whole objects."""
    expected, found, is_end = compared
    if not holds_words(expected + found):
        return True
    if not is_end or any(ord(c) < WITHIN for c in expected + found if is_placeholder(c)):
        return False
    shared = agreement(expected, found)
    return not any(map(is_placeholder, expected[shared : shared + 1] + found[shared : shared + 1]))


class _Unplaced(Exception):
    """Something stands within words."""


def _skeleton(
    chat: RenderedChat,
    traced: str,
    trace: Trace,
    ends: re.Pattern[str],
    words: int,
    objects: int,
    said: frozenset[int],
) -> _Skeleton:
    escaped = sorted({ord(c) - ESCAPED for c in traced if ESCAPED <= ord(c) < OBJECTS})
    written = [(_object_number(value), part, how) for value, part, how in trace.objects]
    shown = sorted({ord(c) - OBJECTS for c in traced if OBJECTS <= ord(c) < WITHIN})
    # What an answer says and a template escapes would be taken for shortened.
    if any(ord(c) >= WITHIN for c in traced if is_placeholder(c)) or said & set(escaped):
        raise _Unplaced
    if {written[i][0] for i in shown} != set(range(objects)) or chat.text != _expanded(traced, trace):
        raise _Unplaced
    numbers = {chr(ESCAPED + k): words + i for i, k in enumerate(escaped)}
    numbers |= {chr(OBJECTS + k): words + len(escaped) + i for i, k in enumerate(shown)}
    stretches = [stretch for stretch in re.split(f"([{chr(PLAIN)}-{chr(WITHIN - 1)}])", traced) if stretch]
    pieces: list[Piece] = [numbers.get(s, ord(s[0]) - PLAIN) if is_placeholder(s[0]) else s for s in stretches]
    lengths = [len(_expanded(stretch, trace)) for stretch in stretches]
    asked = tuple(dict.fromkeys(map(_asked, trace.conditions)))
    _check_work(pieces, asked)
    begins = list(accumulate(lengths, initial=0))

    def place(at: int) -> Place:
        number = next(i for i in range(len(begins) - 1, -1, -1) if begins[i] <= at)
        if number < len(pieces) and at > begins[number] and isinstance(pieces[number], int):
            raise _Unplaced
        return number, at - begins[number]

    def places(span: Span) -> tuple[Place, Place]:
        return place(span[0]), place(span[1])

    return _Skeleton(
        pieces=tuple(pieces),
        escaped=tuple(escaped),
        objects=tuple(written[i] for i in shown),
        asked=asked,
        ends=tuple(places(token.span()) for token in ends.finditer(chat.text)),
        spans=tuple(map(places, chat.spans)),
        answered={turn: places(span) for turn, span in chat.answered.items()},
        unshown=tuple(sorted(set(range(words)) - set(escaped) - set(pieces))),
        chat=chat,
    )


def _check_work(pieces: Sequence[Piece], asked: Sequence[_Asked]) -> None:
    everything = [*pieces, *(piece for question in asked for piece in question.pieces)]
    times = Counter(piece for piece in everything if isinstance(piece, int))
    text = len(asked) + sum(len(piece) for piece in everything if isinstance(piece, str))
    is_rare = any(isinstance(piece, str) and RARE.search(piece) for piece in pieces)
    if is_rare or text > MOST_TEXT or max(times.values(), default=0) > _MOST_TIMES:
        raise _Unplaced


def _object_number(value: Any) -> int:
    return next(ord(c) - WITHIN for c in json.dumps(value, ensure_ascii=False) if ord(c) >= WITHIN)


def _asked(condition: Condition) -> _Asked:
    """A condition on words without marks: what holds no tag holds none between marks either."""
    text = condition.text
    if condition.ask == "in" and condition.answer is False:
        text = "".join(c for c in text if is_placeholder(c) or not RARE.match(c))
    pieces = [p for p in re.split(f"([{chr(PLAIN)}-{chr(WITHIN + 0xFFD)}])", text) if p]
    if any(ord(p[0]) >= ESCAPED for p in pieces if is_placeholder(p[0])):
        raise _Unplaced
    numbered = tuple(ord(p[0]) - PLAIN if is_placeholder(p[0]) else p for p in pieces)
    return _Asked(condition.ask, condition.constant, numbered, condition.answer)
