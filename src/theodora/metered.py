"""Chat templates with a meter: what a stranger's template may compute and write is bounded, wherever it is rendered.

Jinja's sandbox keeps templates from touching anything, but not from working for ever: it bounds `range` alone. Here
each step of a loop, each call, each filter, and every byte that is made, compared or written counts against one
allowance, which grows with what the template is given. No clock is read: a template that is refused on one machine is
refused on all. transformers goes on rendering; `meter_templates` replaces the environment that it makes for each
template by one with a meter, which rewrites the template's tree so that loops and comparisons count, too.
"""

from __future__ import annotations

import re
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, update_wrapper
from types import BuiltinMethodType
from typing import Any

from jinja2 import nodes, pass_context
from jinja2.runtime import Context, LoopContext, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment, SandboxedEscapeFormatter, SandboxedFormatter
from jinja2.utils import Namespace
from markupsafe import Markup

from theodora.errors import ConfigError

ALLOWED = 512 << 20
"""Bytes that one rendering may make; a step counts as `_STEP` of them, so that a million take some seconds."""
PER_BYTE = 64
"""What it may make more for each byte that it is given."""
WHOLE = 4 << 30
"""What all renderings of one job may make beyond an honest pace: a thousand rows, each nearly at its limit."""
LONGEST_TEMPLATE = 1 << 20  # characters; the longest in use have some ten thousand
_STEP = 400  # bytes that a step of a loop, a call or a filter counts as
_VALUE = 16  # bytes that a value counts as, beside its text
_HONEST, _HONEST_PER_BYTE = 1 << 20, 512
"""Bytes that a rendering may make without counting against `WHOLE`, and how many more for each byte it is given."""
_WIDEST = 1000
"""Columns, digits or spaces that a format may ask for."""
_LONGEST_NUMBER = 1 << 16  # bits
_PLAIN = (int, float, bool, type(None), Undefined)
_SPACES = {"ljust", "rjust", "center", "zfill", "expandtabs"}
# Filters whose argument says how often something is repeated, and filters whose work grows faster than the text.
_COUNTING = {"center", "indent", "wordwrap", "batch", "slice", "tojson", "round", "truncate"}
_SLOW = {"urlize", "striptags", "wordwrap", "xmlattr", "title", "pprint", "wordcount"}
_LONGEST_OF_SLOW = 1 << 20
_SORTING = {"sort", "unique", "groupby", "dictsort", "min", "max"}
# Filters and tests that do not look into what they are given.
_SHALLOW = {
    *("length", "count", "first", "last", "list", "default", "d", "items", "attr", "map"),
    *("select", "reject", "selectattr", "rejectattr"),
    *("defined", "undefined", "none", "string", "mapping", "sequence", "iterable", "boolean", "true", "false"),
    *("number", "integer", "float", "callable", "filter", "test", "sameas"),
}
_DIRECTIVE = re.compile(r"%(?:\([^)]*\))?[-#0 +]*(\*|\d+)?(?:\.(\*|\d+))?")
_job: ContextVar[Meter | None] = ContextVar("job", default=None)


class Meter:
    """Counts down an allowance.

    Args:
        allowed: bytes.
    """

    def __init__(self, allowed: int) -> None:
        self.left = self.allowed = allowed

    @property
    def spent(self) -> int:
        """What was counted."""
        return self.allowed - self.left

    def take(self, size: int) -> None:
        """Count some bytes.

        Raises:
            ConfigError: there are no more.
        """
        self.left -= size
        if self.left < 0:
            raise ConfigError(
                "The chat template does far more than a conversation of this size needs (it loops, repeats or nests "
                f"without end): it was stopped after {self.allowed:,} bytes of work. Expected a template that writes "
                "its messages; give another one (chat_template_path, or chat_template.jinja beside the tokenizer)."
            )


@contextmanager
def whole_job() -> Iterator[None]:
    """Within it all renderings together are bounded, too: those of the rows of a file."""
    token = _job.set(Meter(WHOLE))
    try:
        yield
    finally:
        _job.reset(token)


@cache
def meter_templates() -> None:
    """Let transformers render all chat templates of this process with a meter."""
    from transformers.utils import chat_template_utils

    module: Any = chat_template_utils
    module.ImmutableSandboxedEnvironment = MeteredEnvironment
    module._compile_jinja_template.cache_clear()


def size_of(value: Any) -> int:
    """Bytes that a value takes when written out: a part that occurs n times counts n times, and is measured once."""
    if isinstance(value, str | bytes):
        return _VALUE + len(value)
    return _VALUE if isinstance(value, _PLAIN) else _size(value, {}, 0)


def _size(value: Any, known: dict[int, int], depth: int) -> int:
    if isinstance(value, str | bytes):
        return _VALUE + len(value)
    if isinstance(value, Mapping):
        parts: Any = (part for pair in value.items() for part in pair)
    elif isinstance(value, list | tuple | KeysView | ValuesView | ItemsView):
        parts = value
    elif isinstance(value, Namespace):  # written with all that it holds
        parts = vars(Namespace)["__getattribute__"](value, "_Namespace__attrs").values()
    else:
        return _VALUE
    if id(value) not in known:
        if depth > 200:
            raise RecursionError("nested too deeply")
        known[id(value)] = _VALUE  # of a value within itself
        known[id(value)] = _VALUE + sum(_size(part, known, depth + 1) for part in parts)
    return known[id(value)]


class _Context(Context):
    """A rendering's variables, and its meter."""

    def __init__(self, environment: Any, parent: dict[str, Any], *rest: Any, **named: Any) -> None:
        super().__init__(environment, parent, *rest, **named)
        given = size_of({name: value for name, value in parent.items() if name not in environment.globals})
        self.meter = Meter(ALLOWED + PER_BYTE * given)
        self.honest = _HONEST + _HONEST_PER_BYTE * given
        self.job = _job.get()
        self.counted = 0

    def derived(self, locals: dict[str, Any] | None = None) -> Any:
        """A block's variables, on the same meter."""
        context: Any = super().derived(locals)
        context.meter, context.honest, context.job = self.meter, self.honest, self.job
        return context

    def take(self, size: int = 0) -> None:
        """Count a step that makes, compares or writes so many bytes."""
        self.meter.take(_STEP + size)
        if self.job is not None and (over := self.meter.spent - self.honest - self.counted) > 0:
            self.counted += over
            self.job.take(over)


class _Counted:
    """What a loop runs over, each step of which counts."""

    def __init__(self, values: Any, take: Callable[[int], None], text: int) -> None:
        self._values, self._take, self._text = values, take, text

    def __len__(self) -> int:
        return len(self._values)

    def __iter__(self) -> Iterator[Any]:
        for value in self._values:
            self._take(self._text)
            yield value


@pass_context
def _steps(context: Any, values: Any, text: int) -> Any:
    return values if isinstance(values, Undefined) else _Counted(values, context.take, text)


@pass_context
def _weighed(context: Any, value: Any) -> Any:
    context.take(size_of(value))
    return value


@pass_context
def _copied(context: Any, value: Any) -> Any:
    context.take(_length(value))
    return value


def _length(value: Any) -> int:
    """Bytes of a text or of the list itself, whatever its parts."""
    if isinstance(value, str | bytes):
        return len(value)
    return _VALUE * len(value) if isinstance(value, list | tuple | dict) else 0


def _taken(context: Any, value: Any, name: str = "") -> Any:
    """A value that a call or filter is given, counted; of one that is still to come, each part as it comes."""
    if isinstance(value, Iterator) and not isinstance(value, LoopContext):
        return (_weighed(context, part) for part in value)
    context.take(0 if name in _SHALLOW else size_of(value))
    return value


class _Metered(dict[str, Any]):
    """Filters or tests, each of which counts what it is given and what it makes."""

    def __init__(self, known: Mapping[str, Any], *, are_tests: bool = False) -> None:
        super().__init__()
        self._are_tests = are_tests
        for name, function in known.items():
            self[name] = function

    def __setitem__(self, name: str, function: Any) -> None:
        super().__setitem__(name, _metered(name, function, is_test=self._are_tests))


def _metered(name: str, function: Any, *, is_test: bool = False) -> Any:
    look = name if is_test or name != "string" else ""  # a filter, too, which writes what it is given
    wants = getattr(function, "jinja_pass_arg", None)
    passed = wants.name if wants is not None else ""

    @pass_context
    def counted(context: Any, *given: Any, **named: Any) -> Any:
        given = tuple(_taken(context, value, look) for value in given)
        named = {key: _taken(context, value, look) for key, value in named.items()}
        _check_counts(context, name, given, named)
        if name == "join":
            _take_join(context, given[0], _argument(given, named, 1, "d", ""))
        elif name == "replace":
            old, new = _argument(given, named, 1, "old", ""), _argument(given, named, 2, "new", "")
            _take_replace(context, str(given[0]), str(old), str(new))
        elif name == "format":
            _check_directives(str(given[0]), (*given[1:], *named.values()))
            context.take(str(given[0]).count("%") * sum(map(size_of, named.values())))
        first = {
            "context": (context,),
            "eval_context": (context.eval_ctx,),
            "environment": (context.environment,),
        }.get(passed, ())
        made = function(*first, *given, **named)
        context.take(_length(made))
        return made

    return update_wrapper(counted, function, updated=()) if callable(function) else counted


def _check_counts(context: Any, name: str, given: tuple[Any, ...], named: Mapping[str, Any]) -> None:
    if name in _SLOW and given and size_of(given[0]) > _LONGEST_OF_SLOW:
        raise _refused(f"runs the filter {name} over more than {_LONGEST_OF_SLOW:,} bytes")
    if name in _COUNTING:
        widths = [width for width in (*given[1:], *named.values()) if isinstance(width, int)]
        context.take(size_of(given[0]) * max(map(abs, widths), default=0) // 4)
        _check_widths(name, (*given[1:], *named.values()))
    if name in _SORTING:
        context.take(16 * size_of(given[0]))
    if name == "sum" and not isinstance(_argument(given, named, 2, "start", 0), _PLAIN):
        raise _refused("adds up lists with sum")


def _check_widths(name: str, values: Any) -> None:
    for value in values:
        if (isinstance(value, int) and abs(value) > _WIDEST) or (isinstance(value, str) and len(value) > _WIDEST):
            raise _refused(f"asks {name} for more than {_WIDEST:,} columns")


def _argument(given: tuple[Any, ...], named: Mapping[str, Any], at: int, name: str, otherwise: Any) -> Any:
    return given[at] if len(given) > at else named.get(name, otherwise)


def _take_join(context: Any, parts: Any, between: Any) -> None:
    if isinstance(parts, str | list | tuple | Mapping):
        context.take(len(parts) * len(str(between)))


def _take_replace(context: Any, text: str, old: str = "", new: str = "") -> None:
    context.take(len(text) + text.count(old) * len(new))


def _check_directives(text: str, values: tuple[Any, ...]) -> None:
    for widths in _DIRECTIVE.findall(text):
        for width in widths:
            if width == "*":
                _check_widths("format", values)
            elif len(width) > 3:
                raise _refused(f"asks format for more than {_WIDEST:,} columns")


def _refused(what: str) -> ConfigError:
    return ConfigError(f"The chat template {what}, which no conversation needs. Give another one.")


def _check_spec(spec: str) -> None:
    if any(len(digits) > 3 for digits in re.findall(r"\d+", spec)):
        raise _refused(f"asks format for more than {_WIDEST:,} columns")


class _Formatter(SandboxedFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_spec(format_spec)
        return super().format_field(value, format_spec)


class _EscapeFormatter(SandboxedEscapeFormatter):
    def format_field(self, value: Any, format_spec: str) -> Any:
        _check_spec(format_spec)
        return super().format_field(value, format_spec)


class MeteredEnvironment(ImmutableSandboxedEnvironment):
    """Jinja's sandbox with a meter, in place of the one that transformers names."""

    intercepted_binops = frozenset(("+", "-", "*", "/", "//", "%", "**"))
    context_class = _Context

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        self.finalize = _weighed
        self.filters = _Metered(self.filters)
        self.tests = _Metered(self.tests, are_tests=True)
        dict.update(self.filters, {"-steps": _steps, "-weighed": _weighed, "-copied": _copied})
        self.globals.pop("lipsum", None)
        self.longest_text = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        if len(source) > LONGEST_TEMPLATE:
            raise _refused(f"has {len(source):,} characters")
        tree = super()._parse(source, name, filename)
        for loop in tree.find_all(nodes.For):
            text = _text_in(loop)
            self.longest_text = max(self.longest_text, text)
            loop.iter = _filtered(loop.iter, "-steps", nodes.Const(text, lineno=loop.lineno))
        for part in tree.find_all(nodes.Getitem):
            if isinstance(part.arg, nodes.Slice):
                part.node = _filtered(part.node, "-copied")
        for compared in list(tree.find_all(nodes.Compare)):
            compared.expr = _weighed_node(compared.expr)
            for operand in compared.ops:
                operand.expr = _weighed_node(operand.expr)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [_weighed_node(node) for node in joined.nodes]
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        """An operation, unless its result would be too large."""
        if operator == "%" and isinstance(left, str):
            _check_directives(left, right if isinstance(right, tuple) else (right,))
            context.take(len(left) + size_of(right) * max(1, left.count("%")))
        elif operator == "*" and not (isinstance(left, _PLAIN) and isinstance(right, _PLAIN)):
            held, times = (right, left) if isinstance(left, int) else (left, right)
            count = len(held) if isinstance(held, str | bytes | list | tuple) else 0
            unit = 1 if isinstance(held, str | bytes) else _VALUE
            context.take(unit * count * max(times, 0) if isinstance(times, int) else 0)
        elif operator == "+" and isinstance(left, str | list | tuple) and isinstance(right, str | list | tuple):
            context.take(_length(left) + _length(right))
        else:
            _check_number(operator, left, right)
            context.take()
        return super().call_binop(context, operator, left, right)

    def call(__self, __context: Any, __obj: Any, *given: Any, **named: Any) -> Any:
        """A call, which counts what it is given and what it makes."""
        given = tuple(_taken(__context, value) for value in given)
        named = {name: _taken(__context, value) for name, value in named.items()}
        if isinstance(__obj, LoopContext) and given:
            given = (_Counted(given[0], __context.take, __self.longest_text), *given[1:])
        owner = getattr(getattr(__obj, "__wrapped__", __obj), "__self__", None)
        if isinstance(owner, str | bytes) and isinstance(__obj, BuiltinMethodType):
            __context.take(len(owner))
            _check_method(__context, owner, __obj.__name__, given)
        made = __self._called(__context, __obj, given, named)
        __context.take(_length(made))
        return made

    def _called(self, context: Any, called: Any, given: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        return super().call(context, called, *given, **named)

    def getitem(self, obj: Any, argument: Any) -> Any:
        """A subscript; a key of many parts takes time to look up."""
        if isinstance(argument, tuple) and size_of(argument) > _WIDEST:
            raise _refused("looks something up by a key of many parts")
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: Any) -> Any:
        """`str.format` of the sandbox, without fields of any width."""
        wrapped: Any = super().wrap_str_format(value)
        if wrapped is None:
            return None
        text, is_map = value.__self__, value.__name__ == "format_map"
        formatter = _EscapeFormatter(self, escape=text.escape) if isinstance(text, Markup) else _Formatter(self)

        def format(*given: Any, **named: Any) -> str:
            found, by_name = ((), given[0]) if is_map else (given, named)
            most = ALLOWED // 8
            if text.count("{") * max((size_of(held) for held in (*found, *dict(by_name).values())), default=0) > most:
                raise _refused(f"writes more than {most:,} bytes with format")
            return type(text)(formatter.vformat(text, found, by_name))

        return update_wrapper(format, value)


def _text_in(loop: nodes.For) -> int:
    """Bytes of the text that stands in a loop."""
    return sum(len(data.data) for data in loop.find_all(nodes.TemplateData))


def _weighed_node(node: Any) -> Any:
    """A part of an expression that counts, unless it stands in the template as it is."""
    parts = node.items if isinstance(node, nodes.List | nodes.Tuple) else [node]
    return node if all(isinstance(part, nodes.Const) for part in parts) else _filtered(node, "-weighed")


def _filtered(node: Any, name: str, *given: nodes.Expr) -> Any:
    return nodes.Filter(node, name, list(given), [], None, None, lineno=node.lineno, environment=node.environment)


def _check_number(operator: str, left: Any, right: Any) -> None:
    """Whole numbers have no end in Python."""
    if not isinstance(left, int) or not isinstance(right, int):
        return
    bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length() + right.bit_length()
    if bits > _LONGEST_NUMBER:
        raise _refused("computes with numbers of more digits than can be written")


def _check_method(context: Any, owner: str | bytes, name: str, given: tuple[Any, ...]) -> None:
    if name in _SPACES:
        _check_widths(name, given)
        context.take(len(owner) * _WIDEST if name == "expandtabs" and given else 0)
    elif name == "join" and given:
        _take_join(context, given[0], owner)
    elif name == "replace" and len(given) > 1 and isinstance(owner, str):
        _take_replace(context, owner, str(given[0]), str(given[1]))
    elif name == "translate" and given:
        context.take(len(owner) * size_of(given[0]))
