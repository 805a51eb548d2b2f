"""How models write calls: one reader for each style, which begins after its marker."""

from __future__ import annotations

import json
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from theodora.serve.calls.jsons import json_calls, stream_object
from theodora.serve.calls.source import Source, compiled
from theodora.serve.calls.values import Schemas, gemma_object, python_call, text_value

Found = Generator[None, None, bool]
"""Whether it was a call; if not, the caller says what stood there."""


@dataclass(frozen=True)
class Offer:
    """The tools that a request offers."""

    schemas: Schemas
    """Name -> JSON schema of the arguments."""

    @property
    def names(self) -> frozenset[str]:
        """Of the tools."""
        return frozenset(self.schemas)

    @property
    def order(self) -> dict[str, list[str]]:
        """Name of a tool -> its arguments in order."""
        return {name: list(schema.get("properties") or ()) for name, schema in self.schemas.items()}


Style = Callable[[Source, Offer], Found]


def tagged(source: Source, offer: Offer) -> Found:
    """After <tool_call>: JSON (Hermes, Qwen), <function=…> (Qwen-Coder), or a name and <arg_key>s (GLM)."""
    yield from source.space()
    start = yield from source.peek()
    if start in ("{", "["):
        is_call = yield from json_calls(source)
    elif start == "<":
        is_call = (yield from source.literal("<function=")) is not None and (yield from function_tag(source, offer))
    else:
        is_call = yield from _arg_keys(source, offer)
    if is_call:
        yield from _closing(source, "</tool_call>")
    return is_call


def json_list(source: Source, offer: Offer) -> Found:
    """After a marker: [{"name": …}, …] (Granite, Phi, Cohere)."""
    is_call = yield from json_calls(source)
    if is_call:
        yield from _closing(source, "<|/tool_call|>", "<|END_ACTION|>")
    return is_call


def bare_json(source: Source, offer: Offer) -> Found:
    """Without a marker (Llama 3): only calls of tools that are on offer are told from other JSON."""
    return (yield from json_calls(source, offer.names))


def python_tag(source: Source, offer: Offer) -> Found:
    """After <|python_tag|>: JSON, or Llama 3.1's brave_search.call(query="…")."""
    yield from source.space()
    if (yield from source.peek()) == "{":
        return (yield from json_calls(source))
    return (yield from _python_calls(source, offer, listed=False))


def function_tag(source: Source, offer: Offer) -> Found:
    """After <function=: NAME>, <parameter=KEY>VALUE</parameter> …, </function>."""
    head = yield from source.pattern(_FUNCTION)
    if head is None:
        return False
    name = head[1]
    source.call(name)
    ended = yield from _parameters(source, offer, name, _PARAMETER, ("</parameter>",), "<parameter=", ("</function>",))
    if ended:
        source.argue("}")
    return True


def _arg_keys(source: Source, offer: Offer) -> Found:
    head = yield from source.pattern(_GLM_NAME)
    if head is None:
        return False
    source.call(head[1])
    count = 0
    while (key := (yield from source.pattern(_GLM_KEY))) is not None:
        value, marker = yield from source.until("</arg_value>")
        source.argue(_member(count, key[1].strip(), text_value(value, head[1], key[1].strip(), offer.schemas), marker))
        if marker is None:
            return True
        count += 1
    yield from source.space()
    closed = yield from source.literal("</tool_call>")
    rest = source.text[source.at :]
    if (
        closed is None
        and source.ended
        and ("</tool_call>".startswith(rest) or rest.startswith("<arg_key"[: len(rest)]))
    ):
        source.at = len(source.text)  # cut: not whole, as JSON that is cut
    else:
        source.argue("}" if count else "{}")
    return True


def invoked(source: Source, offer: Offer) -> Found:
    """After <｜DSML｜function_calls> (DeepSeek 3.2) or <minimax:tool_call>: <invoke name="f"> and its parameters."""
    any_call = False
    while (head := (yield from source.pattern(_INVOKE))) is not None:
        any_call, prefix, name = True, head[1] or "", head[2]
        source.call(name)
        inner = f"<{prefix}parameter"
        closing = (f"</{prefix}parameter>",)
        if not (yield from _parameters(source, offer, name, _NAMED, closing, inner, (f"</{prefix}invoke>",))):
            return True
        source.argue("}")
    if any_call:
        yield from _closing(
            source, "</｜DSML｜function_calls>", "</｜DSML｜tool_calls>", "</｜DSML｜ calls>", "</minimax:tool_call>"
        )
    return any_call


def _parameters(
    source: Source, offer: Offer, tool: str, pattern: Any, closing: tuple[str, ...], inner: str, end: tuple[str, ...]
) -> Found:
    """Bring the parameters of one call; whether it came to its end. The last brace is left to the caller."""
    count = 0
    while True:
        yield from source.space()
        if (yield from source.literal(*end)) is not None:
            if not count:
                source.argue("{")
            return True
        start = source.at
        head = yield from source.pattern(pattern)
        if head is None:  # something else, which is skipped, or the end of the text
            _, marker = yield from source.until(inner, *end)
            if marker is None:
                return False
            if source.at - len(marker) > start:  # else it is one that cannot be read, and is skipped
                source.at -= len(marker)
            continue
        value, marker = yield from source.until(*closing, inner, *end)
        if marker is not None and marker not in closing:  # the closing tag was forgotten
            source.at -= len(marker)
        value = value.removeprefix("\n").removesuffix("\n")
        key, string = head[1].strip(), head.groupdict().get("string")
        if string == "true":
            read: Any = value
        else:
            read = text_value(value, tool, key, offer.schemas if string is None else {})
        source.argue(_member(count, key, read, marker))
        if marker is None:
            return False
        count += 1


def _member(count: int, key: str, value: Any, marker: str | None) -> str:
    """One member of the arguments' object. Without an end, a text is left open, as JSON that is cut."""
    text = json.dumps(value, ensure_ascii=False)
    if marker is None and isinstance(value, str):
        text = text[:-1]
    return ("{" if count == 0 else ", ") + json.dumps(key, ensure_ascii=False) + ": " + text


def mistral(source: Source, offer: Offer) -> Found:
    """After [TOOL_CALLS]: a list of objects, or since version 11 a name, [ARGS], and the arguments."""
    yield from source.space()
    if (yield from source.peek()) in ("[", "{"):
        return (yield from json_calls(source))
    head = yield from source.pattern(_MISTRAL)
    if head is None:
        return False
    source.call(head[1], head[2])
    yield from stream_object(source)
    return True


def gemma(source: Source, offer: Offer) -> Found:
    """After <|tool_call>: call:f{key:<|"|>text<|"|>}, <tool_call|>."""
    head = yield from source.pattern(_GEMMA)
    if head is None:
        return False
    source.call(head[1])
    body, _ = yield from source.until("<tool_call|>")
    arguments = gemma_object(body)
    # What is not as it should be, or cut, is for the client to see.
    source.argue(body if arguments is None else json.dumps(arguments, ensure_ascii=False))
    return True


def deepseek(source: Source, offer: Offer) -> Found:
    """After <｜tool▁calls▁begin｜>: calls between <｜tool▁call▁begin｜> and <｜tool▁call▁end｜> (V3, R1, V3.1)."""
    any_call = False
    while (head := (yield from source.pattern(_DEEPSEEK))) is not None:
        any_call = True
        source.call((head[1] or head[2]).strip())
        if not (yield from stream_object(source)):
            return True
        yield from source.pattern(_DEEPSEEK_END)
    if any_call:
        yield from _closing(source, "<｜tool▁calls▁end｜>")
    return any_call


def kimi(source: Source, offer: Offer) -> Found:
    """After <|tool_calls_section_begin|>: functions.f:0 and the arguments, each between markers."""
    any_call = False
    while (head := (yield from source.pattern(_KIMI))) is not None:
        any_call = True
        source.call(head[2], head[1])
        if not (yield from stream_object(source)):
            return True
        yield from _closing(source, "<|tool_call_end|>")
    if any_call:
        yield from _closing(source, "<|tool_calls_section_end|>")
    return any_call


def pythonic(source: Source, offer: Offer) -> Found:
    """After a marker: [f(a=1), g()] (Llama 4, LFM2)."""
    is_call = yield from _python_calls(source, offer)
    if is_call:
        yield from _closing(source, "<|python_end|>", "<|tool_call_end|>")
    return is_call


def bare_pythonic(source: Source, offer: Offer) -> Found:
    """Without a marker (Llama 4): only calls of tools that are on offer are told from other text in brackets."""
    return (yield from _python_calls(source, offer, known=offer.names))


def _python_calls(source: Source, offer: Offer, known: frozenset[str] | None = None, listed: bool = True) -> Found:
    start = source.at
    if listed and (yield from source.pattern(_BRACKET)) is None:
        return False
    any_call = False
    while (name := (yield from source.pattern(_PYTHON_NAME))) is not None:
        begin = name.start(1)
        if known is not None and name[1] not in known:
            break
        end = yield from _closing_bracket(source)
        call = None if end is None else python_call(source.text[begin:end], offer.order)
        if end is None or call is None:
            break
        source.at = end
        any_call = True
        source.call(call[0].removesuffix(".call") if not listed else call[0])
        source.argue(json.dumps(call[1], ensure_ascii=False))
        start = source.at
        yield from source.space()
        if (yield from source.literal(",", ";")) is None:
            if listed:
                yield from source.literal("]")
            return True
    source.at = start
    return any_call


def _closing_bracket(source: Source) -> Generator[None, None, int | None]:
    """Where the call ends whose opening bracket has just been read; nothing is read."""
    at, depth, quote = source.at, 1, ""
    while True:
        while at < len(source.text):
            letter = source.text[at]
            if quote:
                if letter == "\\":
                    at += 1
                elif letter == quote:
                    quote = ""
            elif letter in "\"'":
                quote = letter
            elif letter in "([{":
                depth += 1
            elif letter in ")]}":
                depth -= 1
                if depth == 0:
                    return at + 1
            at += 1
        if source.ended:
            return None
        yield


def _closing(source: Source, *markers: str) -> Generator[None, None, None]:
    """Read a closing marker if it comes next, or as much of it as there is, with the space before it."""
    start = source.at
    yield from source.space()
    if (yield from source.literal(*markers)) is not None:
        return
    rest = source.text[source.at :]
    source.at = len(source.text) if source.ended and any(marker.startswith(rest) for marker in markers) else start


_WORD = r"[\w.\-:/]{1,256}"
_FUNCTION = compiled(rf"\s*({_WORD})\s*>")
_PARAMETER = compiled(r"<parameter=([^>\n]{1,256})>")
_NAMED = compiled(r'<(?:｜DSML｜ ?)?parameter name="([^"\n]{1,256})"(?: string="(?P<string>true|false)")?>')
_INVOKE = compiled(r'\s*<(｜DSML｜ ?)?invoke name="([^"\n]{1,256})">')
_GLM_NAME = compiled(rf"({_WORD})\s*(?=<arg_key>|</tool_call>)")
_GLM_KEY = compiled(r"\s*<arg_key>([^<]{1,256})</arg_key>\s*<arg_value>")
_MISTRAL = compiled(rf"({_WORD})\s*(?:\[CALL_ID\]\s*(\w{{1,64}})\s*)?(?:\[ARGS\]\s*)?(?=\{{)")
_GEMMA = compiled(rf"\s*call:({_WORD})\s*(?=\{{)")
_DEEPSEEK = compiled(
    r"\s*<｜tool▁call▁begin｜>(?:function<｜tool▁sep｜>([^\n<]{1,256})\n```json\n|([^\n<]{1,256})<｜tool▁sep｜>)\s*(?=\{)"
)
_DEEPSEEK_END = compiled(r"\s*(?:```)?\s*<｜tool▁call▁end｜>")
_KIMI = compiled(
    r"\s*<\|tool_call_begin\|>\s*((?:functions\.)?([\w.\-/]{1,256}?)(?::\d+)?)\s*<\|tool_call_argument_begin\|>\s*(?=\{)"
)
_BRACKET = compiled(r"\s*\[\s*(?=[A-Za-z_][\w.]*\()")
_PYTHON_NAME = compiled(r"\s*([A-Za-z_][\w.]{0,256})\(")
