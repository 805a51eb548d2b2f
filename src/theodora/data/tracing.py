"""What a chat template makes of a conversation, whatever its words are.

A conversation of placeholders is rendered, each of which stands for any words. A placeholder answers only what follows
from its being some words (it is a string, it is not empty, it may be trimmed, joined and written); what depends on the
words themselves ("does it hold </think>?") is answered for the placeholder and remembered as a condition. Anything else
that a template does with words (it counts them, cuts them, compares them with each other) ends the attempt, and each
conversation is then rendered for itself. What is written holds for all words that meet the conditions.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from typing import Any, Literal, NoReturn, cast

import jinja2
from jinja2 import nodes, pass_context
from jinja2.ext import Extension, loopcontrols
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer
from transformers.utils import chat_template_utils

from theodora.metered import MeteredEnvironment, size_of

PLAIN, ESCAPED, OBJECTS, WITHIN = 0x10C000, 0x10D000, 0x10E000, 0x10F000
"""The first characters that stand for words, for words as JSON writes them, for JSON of whole objects, and for what
objects hold while they are no JSON yet."""
ROOM = 0x1000
MOST_TEXT = 1 << 18
"""Characters of a text with placeholders."""
Ask = Literal["in", "==", "starts", "ends", "clock"]


@dataclass(frozen=True)
class Condition:
    """A question that a template asks about words, and its answer."""

    ask: Ask
    constant: str
    text: str
    """With placeholders."""
    answer: bool | str


@dataclass
class Trace:
    """What came up while templates were rendered."""

    conditions: dict[Condition, None] = field(default_factory=dict[Condition, None])
    failed: bool = False
    objects: list[tuple[dict[str, Any], str, Mapping[str, Any]]] = field(default_factory=list[Any])
    """Objects that were written as JSON, which part of them ("": all), and with which options."""
    generated: list[str] = field(default_factory=list[str])
    """What stands between `{% generation %}` markers."""

    def asks(self, ask: Ask, constant: str, text: str, answer: bool) -> bool:
        """Note a condition, unless its answer does not depend on words."""
        if ask != "in":
            whole = text[::-1] if ask == "ends" else text
            wanted = constant[::-1] if ask == "ends" else constant
            shared = next((i for i, (a, b) in enumerate(zip(whole, wanted, strict=False)) if a != b), None)
            if shared is not None and not is_placeholder(whole[shared]):
                return answer
        self.conditions[Condition(ask, constant, text, answer)] = None
        return answer


class Untraceable(Exception):
    """What a template writes depends on words."""


_trace: ContextVar[Trace] = ContextVar("trace")


def is_placeholder(character: str) -> bool:
    """Whether a character stands for words."""
    return PLAIN <= ord(character) < WITHIN + ROOM - 2  # two are no characters


def holds_words(text: str) -> bool:
    """Whether there are placeholders in a text."""
    return not text.isascii() and any(map(is_placeholder, text))


def _fail(*_: Any, **__: Any) -> NoReturn:
    _trace.get().failed = True
    raise Untraceable


class _Words:
    """A string with placeholders. It is no `str`: what is not written here fails instead of giving a wrong answer."""

    def __init__(self, text: str) -> None:
        self.text = text if len(text) <= MOST_TEXT else _fail()

    def __bool__(self) -> bool:
        return bool(self.text)  # words are never empty

    def __eq__(self, other: object) -> bool:
        if isinstance(other, _Words):
            return self.text == other.text or _fail()
        return isinstance(other, str) and _trace.get().asks("==", other, self.text, self.text == other)

    def __contains__(self, part: object) -> bool:
        return _trace.get().asks("in", part, self.text, part in self.text) if isinstance(part, str) else _fail()

    def __add__(self, other: object) -> _Words:
        return _Words(self.text + _text(other))

    def __radd__(self, other: object) -> _Words:
        return _Words(_text(other) + self.text)

    def startswith(self, *given: Any) -> bool:
        """As `str.startswith`, with one text."""
        (prefix,) = given if len(given) == 1 and isinstance(given[0], str) else _fail()
        return _trace.get().asks("starts", prefix, self.text, self.text.startswith(prefix))

    def endswith(self, *given: Any) -> bool:
        """As `str.endswith`, with one text."""
        (suffix,) = given if len(given) == 1 and isinstance(given[0], str) else _fail()
        return _trace.get().asks("ends", suffix, self.text, self.text.endswith(suffix))

    def strip(self, *given: Any) -> Any:
        """As `str.strip`, of white space: words begin and end with something else."""
        return _wrapped(self.text.strip(*_blanks(given)))

    def lstrip(self, *given: Any) -> Any:
        """As `str.lstrip`, of white space."""
        return _wrapped(self.text.lstrip(*_blanks(given)))

    def rstrip(self, *given: Any) -> Any:
        """As `str.rstrip`, of white space."""
        return _wrapped(self.text.rstrip(*_blanks(given)))

    def split(self, *given: Any) -> list[Any]:
        """As `str.split` at one text that stands nowhere in the words: a tag, which cannot overlap itself."""
        (at,) = given if len(given) == 1 and isinstance(given[0], str) and given[0] else _fail()
        if any(at.startswith(at[i:]) for i in range(1, len(at))):
            _fail()
        pieces = self.text.split(at)
        for piece in filter(holds_words, pieces):
            _trace.get().asks("in", at, piece, False)
        return [_wrapped(piece) for piece in pieces]

    __hash__ = __str__ = __repr__ = __format__ = __len__ = __iter__ = _fail  # type: ignore[assignment]


@dataclass(eq=False)
class _Length:
    """How long words are at least; only what that answers is answered."""

    least: int

    def __bool__(self) -> bool:
        return self.least > 0 or _fail()

    def __eq__(self, other: object) -> bool:
        return False if isinstance(other, int) and other < self.least else _fail()

    def __gt__(self, other: object) -> bool:
        return (isinstance(other, int) and self.least > other) or _fail()

    def __ge__(self, other: object) -> bool:
        return (isinstance(other, int) and self.least >= other) or _fail()

    def __lt__(self, other: object) -> bool:
        return False if isinstance(other, int) and other <= self.least else _fail()

    def __le__(self, other: object) -> bool:
        return False if isinstance(other, int) and other < self.least else _fail()

    __hash__ = __str__ = __repr__ = __format__ = __int__ = __index__ = _fail  # type: ignore[assignment]


@dataclass(eq=False)
class _Object:
    """An object of anybody's that is not empty, which may be written as JSON and nothing else."""

    value: dict[str, Any]
    is_tool: bool = False
    part: str = ""

    def __bool__(self) -> bool:
        return True

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, _Object | dict) and _fail())

    __hash__ = __str__ = __repr__ = __format__ = __len__ = __iter__ = __contains__ = _fail  # type: ignore[assignment]


def _part(whole: _Object, name: object) -> _Object:
    """Every tool has a `function`, which is an object with a name."""
    return _Object(whole.value["function"], part="function") if whole.is_tool and name == "function" else _fail()


@dataclass(frozen=True)
class _Written:
    """What is written out; only the environment makes it, so that no placeholder gets into a common string unseen."""

    text: str

    def __str__(self) -> str:
        return self.text


def _text(value: object) -> str:
    return value.text if isinstance(value, _Words) else value if isinstance(value, str) else _fail()


def _wrapped(text: str) -> Any:
    return _Words(text) if holds_words(text) else text


def _blanks(given: Sequence[Any]) -> Sequence[Any]:
    fits = not given or (len(given) == 1 and (given[0] is None or (isinstance(given[0], str) and given[0].isspace())))
    return given if fits else _fail()


# What a string and an object answer to Jinja's tests; other tests of theirs end the attempt.
_STRING = {"string": True, "iterable": True, "sequence": True, "defined": True}
_MAPPING = {"mapping": True, "iterable": True, "sequence": True, "defined": True}
_NEITHER = dict.fromkeys(
    ("undefined", "none", "number", "integer", "float", "boolean", "callable", "true", "false"), False
)
_COMPARING = {"eq", "equalto", "==", "ne", "!=", "in"}


def _checked(name: str, function: Any, *, is_test: bool) -> Any:
    """A filter or a test that words and objects may meet."""

    def checked(*given: Any, **named: Any) -> Any:
        values = [*given[1:], *named.values()]  # behind the context
        if not any(isinstance(value, _Words | _Object | _Length) for value in values):
            return function(*given, **named)
        if any(isinstance(value, _Length) for value in values):
            return _fail()
        first = values[0]
        known = (_STRING if isinstance(first, _Words) else _MAPPING) | _NEITHER
        if isinstance(first, _Words) and not is_test and len(values) == 1:
            if name == "trim":
                return first.strip()
            if name in ("length", "count"):
                return _Length(len(first.text))
            if name == "string":
                return first
        if is_test and len(values) == 1 and name in ("string", "mapping"):
            return (name == "string") is isinstance(first, _Words)
        if is_test and len(values) == 1 and name in known:
            return known[name]
        comparable = all(not isinstance(value, _Object) for value in values)
        if (is_test and name in _COMPARING and comparable) or (not is_test and name in ("default", "d")):
            return function(*given, **named)
        return _fail()

    return pass_context(checked)


def _joined(values: Iterable[Any], between: Any = "") -> Any:
    parts = list(values)
    if not any(isinstance(part, _Words) for part in (*parts, between)):
        return str(between).join(map(str, parts))
    return _Words(_text(between).join(part.text if isinstance(part, _Words) else str(part) for part in parts))


def _concat(parts: Iterable[Any]) -> Any:
    return _wrapped("".join(part.text if isinstance(part, _Words) else part for part in parts))


def _as_json(value: Any, **how: Any) -> Any:
    trace = _trace.get()
    options: dict[str, Any] = {"ensure_ascii": False, **how}
    quoted: dict[str, str] = {}
    replaced = _replaced(value, options, trace, quoted, nested=False)
    text = json.dumps(replaced, **options)
    for placeholder, character in quoted.items():
        text = text.replace(f'"{placeholder}"', character)
    if holds_words(text) and options["ensure_ascii"]:
        _fail()
    return _wrapped(text)


def _replaced(value: Any, how: Mapping[str, Any], trace: Trace, quoted: dict[str, str], *, nested: bool) -> Any:
    if isinstance(value, _Object):
        if (nested and how.get("indent") is not None) or how.get("sort_keys") or len(trace.objects) >= ROOM:
            _fail()
        trace.objects.append((value.value, value.part, dict(how)))
        character = chr(OBJECTS + len(trace.objects) - 1)
        return quoted.setdefault(character, character)
    if isinstance(value, _Words):
        if any(ord(c) >= ESCAPED for c in value.text if is_placeholder(c)):
            _fail()
        return "".join(chr(ord(c) + ESCAPED - PLAIN) if is_placeholder(c) else c for c in value.text)
    if isinstance(value, dict):
        parts = cast("dict[Any, Any]", value).items()
        return {key: _replaced(part, how, trace, quoted, nested=True) for key, part in parts}
    if isinstance(value, list | tuple):
        return [_replaced(part, how, trace, quoted, nested=True) for part in cast("list[Any]", value)]
    return value


class _Generation(Extension):
    """The markers around what a model writes, of which the words alone count here."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], Any]) -> Any:
        made = caller()
        _trace.get().generated.append(_text(made))
        return made


class _Namespace(Namespace):
    """A namespace as transformers has it: without names that begin with an underscore."""


class _Joins(NodeTransformer):
    """Writes `a ~ b` as a filter, because Jinja joins strings alone."""

    def __init__(self, environment: Any) -> None:
        self.environment = environment

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        parts = nodes.List([self.visit(part) for part in node.nodes], lineno=node.lineno)
        return nodes.Filter(parts, "-joined", [], [], None, None, lineno=node.lineno, environment=self.environment)


class _Environment(MeteredEnvironment):
    """Jinja's sandbox with a meter, set up as transformers does it, in which words are placeholders.

    The meter counts here too: a template may find out that it is traced, and work for ever only then.
    """

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self.filters |= {"tojson": _as_json, "join": _join_filter}
        own = {name: f for name, f in self.filters.items() if name.startswith("-")}
        filters = {name: _checked(name, f, is_test=False) for name, f in self.filters.items() if name not in own}
        filters |= {"tojson": self.filters["tojson"], "join": self.filters["join"], "-joined": _joined}
        self.filters = {**own, **filters}
        self.tests = {name: _checked(name, f, is_test=True) for name, f in self.tests.items()}
        self.globals |= {"raise_exception": _raise, "strftime_now": _now, "namespace": _Namespace, "dict": dict}
        self.concat = _concat  # type: ignore[assignment]
        self.finalize = _finalized

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return cast(nodes.Template, _Joins(self).visit(super()._parse(source, name, filename)))

    def getattr(self, obj: Any, attribute: str) -> Any:
        """An attribute; of words, a method that they have."""
        if isinstance(obj, _Words):
            return self._of_words(obj, attribute)
        if isinstance(obj, _Object):
            return _part(obj, attribute)
        return super().getattr(obj, attribute)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A subscript; words have none."""
        if isinstance(obj, _Words):
            return self._of_words(obj, argument) if isinstance(argument, str) else _fail()
        if isinstance(obj, _Object):
            return _part(obj, argument)
        return super().getitem(obj, argument)

    def _of_words(self, words: _Words, name: str) -> Any:
        if name in ("strip", "lstrip", "rstrip", "startswith", "endswith", "split"):
            return getattr(words, name)
        return _fail() if hasattr(str, name) else self.undefined(obj="", name=name)


def _join_filter(value: Any, d: Any = "", attribute: Any = None) -> Any:
    return _joined(value, d) if attribute is None else _fail()


@pass_context
def _finalized(context: Any, value: Any) -> Any:
    context.take(len(value.text) if isinstance(value, _Words) else size_of(value))
    if isinstance(value, _Object):
        _fail()
    return _Written(value.text) if isinstance(value, _Words) else value


def _raise(message: Any) -> NoReturn:
    raise jinja2.exceptions.TemplateError(str(message))


def _now(how: str) -> str:
    text = datetime.now().strftime(how)
    _trace.get().conditions[Condition("clock", how, "", text)] = None
    return text


@lru_cache(maxsize=16)
def _compiled(template: str) -> jinja2.Template:
    return _Environment().from_string(template)


@contextmanager
def tracing(trace: Trace):
    """Within it, renders add to `trace`."""
    token = _trace.set(trace)
    try:
        yield
    finally:
        _trace.reset(token)


def render_traced(
    template: str, messages: Sequence[Any], tools: Sequence[Any] | None, tokens: Mapping[str, Any], prompt: bool
) -> str:
    """What the template makes of messages with placeholders.

    Raises:
        Untraceable: that depends on the words that they stand for.
        one of TEMPLATE_ERRORS: the template refuses them.
    """
    aliased = _with_aliases(list(messages))
    given = {"messages": [_worded(message) for message in aliased], "documents": None, **tokens}
    given |= {"tools": [_offered(tool) for tool in tools] if tools else None, "add_generation_prompt": prompt}
    rendered = cast(Any, _compiled(template).render(**given))
    return rendered.text if isinstance(rendered, _Words) else rendered


def _with_aliases(messages: list[Any]) -> list[Any]:
    """Messages as transformers gives them to templates: newer versions give reasoning all its names."""
    return getattr(chat_template_utils, "_alias_reasoning_fields", list)(messages)


def _offered(tool: Any) -> Any:
    """A tool, which is taken as a whole."""
    return _Object(cast(dict[str, Any], tool), is_tool=True) if isinstance(tool, dict) else tool


def _worded(value: Any) -> Any:
    if isinstance(value, str):
        return _Words(value) if holds_words(value) else value
    if isinstance(value, dict):
        parts = cast("dict[str, Any]", value)
        is_object = any(isinstance(part, str) and _is_object(part) for part in (*parts, *parts.values()))
        return _Object(parts) if is_object else {key: _worded(part) for key, part in parts.items()}
    return [_worded(part) for part in cast("list[Any]", value)] if isinstance(value, list) else value


def _is_object(text: str) -> bool:
    return any(ord(character) >= WITHIN for character in text if is_placeholder(character))
