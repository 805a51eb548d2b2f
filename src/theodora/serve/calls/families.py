"""Which family of formats a model's chat template belongs to, and the parser of an answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from theodora.serve.calls import harmony, styles
from theodora.serve.calls.source import Arguments, Call, Event, Reader, Reasoning, Source, Text
from theodora.serve.calls.styles import Offer, Style


@dataclass(frozen=True)
class Family:
    """How the models of a family write calls."""

    name: str
    signs: tuple[tuple[str, ...], ...] = ()
    """What shows the family in a chat template: all of one of these."""
    styles: tuple[tuple[str, Style], ...] = ()
    """Marker -> what reads a call after it."""
    bare: Style | None = None
    """What reads a call without a marker, with which the answer begins."""
    words: tuple[str, ...] = ()
    """Further texts of the format that may be special tokens."""
    read: Callable[[Source, Offer | None], Reader] | None = None
    """What reads the whole answer, where it is not text with calls in it."""

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts of the format that may be special tokens, which the answer's text must keep."""
        return (*self.markers, *self.words)

    @property
    def markers(self) -> tuple[str, ...]:
        """After which a call comes."""
        return tuple(marker for marker, _ in self.styles)


@dataclass(frozen=True)
class Thinking:
    """The tags between which a model thinks before it answers."""

    name: str
    open: str
    close: str

    @property
    def tokens(self) -> tuple[str, ...]:
        """Texts of the tags that may be special tokens."""
        return (self.open, self.open.removesuffix("thought"), self.close)

    def opened_by(self, prompt: str) -> bool:
        """Whether a prompt ends within the reasoning, so that the answer begins there."""
        return prompt.rstrip().endswith(self.open)

    def closed_by(self, prompt: str) -> bool:
        """Whether a prompt ends with reasoning that is over, so that the answer has none."""
        return prompt.rstrip().endswith(self.close)


_TAG = (("<tool_call>", styles.tagged),)
# In the order in which they are looked for: a family whose signs another one has too comes before that one.
FAMILIES = (
    Family("harmony", (("<|channel|>", "<|message|>"),), read=harmony.read, words=harmony.MARKERS),
    Family(
        "gemma4",
        (("<|tool_call>",),),
        (("<|tool_call>", styles.gemma),),
        words=("<tool_call|>", '<|"|>', "<|tool_call>"),
    ),
    Family(
        "deepseek_v3_2",
        (("｜DSML｜",),),
        tuple((f"<｜DSML｜{word}>", styles.invoked) for word in ("function_calls", "tool_calls", " calls")),
        words=("｜DSML｜",),
    ),
    Family("minimax", (("<minimax:tool_call>",),), (("<minimax:tool_call>", styles.invoked),)),
    Family(
        "deepseek_v3",
        (("<｜tool▁calls▁begin｜>", "```json"),),
        (("<｜tool▁calls▁begin｜>", styles.deepseek),),
        words=tuple(f"<｜tool▁{word}｜>" for word in ("calls▁end", "call▁begin", "call▁end", "sep")),
    ),
    Family(
        "deepseek_v3_1",
        (("<｜tool▁calls▁begin｜>",),),
        (("<｜tool▁calls▁begin｜>", styles.deepseek),),
        words=tuple(f"<｜tool▁{word}｜>" for word in ("calls▁end", "call▁begin", "call▁end", "sep")),
    ),
    Family(
        "kimi_k2",
        (("<|tool_calls_section_begin|>",),),
        (("<|tool_calls_section_begin|>", styles.kimi),),
        words=(
            "<|tool_calls_section_end|>",
            "<|tool_call_begin|>",
            "<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ),
    Family(
        "mistral_v11",
        (("[TOOL_CALLS]", "[ARGS]"),),
        (("[TOOL_CALLS]", styles.mistral),),
        words=("[ARGS]", "[CALL_ID]"),
    ),
    Family(
        "mistral",
        (("[TOOL_CALLS]",),),
        (("[TOOL_CALLS]", styles.mistral),),
        words=("[ARGS]", "[CALL_ID]"),
    ),
    Family(
        "lfm2",
        (("<|tool_call_start|>",), ("<|tool_list_start|>",)),
        (("<|tool_call_start|>", styles.pythonic),),
        words=("<|tool_call_end|>",),
    ),
    Family("cohere", (("<|START_ACTION|>",),), (("<|START_ACTION|>", styles.json_list),), words=("<|END_ACTION|>",)),
    Family(
        "llama4_pythonic",
        (("<|python_start|>",), ("[func_name1(",)),
        (("<|python_start|>", styles.pythonic),),
        bare=styles.bare_pythonic,
        words=("<|python_end|>",),
    ),
    Family(
        "phi4",
        (("<|tool|>",), ("functools",)),
        (("<|tool_call|>", styles.json_list), ("functools", styles.json_list)),
        words=("<|/tool_call|>",),
    ),
    Family("qwen3_xml", (("<function=",),), (*_TAG, ("<function=", styles.function_tag)), words=("</tool_call>",)),
    Family(
        "glm4",
        (("<arg_key>",),),
        _TAG,
        words=("</tool_call>", "<arg_key>", "</arg_key>", "<arg_value>", "</arg_value>"),
    ),
    Family("granite", (("<|tool_call|>",),), (("<|tool_call|>", styles.json_list), *_TAG)),
    Family("hermes", (("<tool_call>",),), _TAG, words=("</tool_call>",)),
    Family(
        "llama3_json",
        (("<|python_tag|>",), ('{"name": function name, "parameters":',), ("<|eom_id|>",)),
        (("<|python_tag|>", styles.python_tag),),
        bare=styles.bare_json,
    ),
    Family("json", bare=styles.bare_json),  # for templates that show tools, and no format of calls that is known
)
_BY_NAME = {family.name: family for family in FAMILIES}
# By vLLM's names, too.
BY_NAME = _BY_NAME | {
    other: _BY_NAME[name]
    for other, name in {
        "openai": "harmony",
        "deepseek_v31": "deepseek_v3_1",
        "deepseek_v32": "deepseek_v3_2",
        "glm45": "glm4",
        "glm47": "glm4",
        "qwen3_coder": "qwen3_xml",
        "llama4_json": "llama3_json",
        "pythonic": "llama4_pythonic",
        "phi4_mini_json": "phi4",
    }.items()
}

THINKING = (
    Thinking("think", "<think>", "</think>"),
    Thinking("mistral", "[THINK]", "[/THINK]"),
    Thinking("gemma4", "<|channel>thought", "<channel|>"),
    Thinking("cohere", "<|START_THINKING|>", "<|END_THINKING|>"),
    Thinking("seed", "<seed:think>", "</seed:think>"),
)
_OTHERS = ("qwen3", "deepseek_r1", "deepseek_v3", "glm45", "nemotron_v3")  # vLLM's names of one
THINKING_BY_NAME = {thinking.name: thinking for thinking in THINKING} | dict.fromkeys(_OTHERS, THINKING[0])


def family_of(template: str) -> Family:
    """The family that a chat template shows; `json` where it shows none."""
    return next(
        (family for family in FAMILIES if any(all(word in template for word in sign) for sign in family.signs)),
        BY_NAME["json"],
    )


def thinking_of(template: str) -> Thinking | None:
    """The tags of reasoning that a chat template knows."""
    return next((thinking for thinking in THINKING if thinking.close in template), None)


class Parser:
    """Parts an answer's text into what is said, reasoning and calls, while it arrives.

    Example:
        `parser.feed("Hel")` gives what is new; `parser.feed("lo", ended=True)` the rest.
    """

    def __init__(
        self,
        family: Family | None,
        schemas: Mapping[str, Mapping[str, Any]] | None,
        thinking: Thinking | None = None,
        opened: bool = False,
    ) -> None:
        """Begin an answer.

        Args:
            family: how calls are written; None if they are not looked for.
            schemas: name of each tool on offer -> JSON schema of its arguments; None if none is.
            thinking: the tags of reasoning; None to leave it in the text.
            opened: the answer begins within the reasoning.
        """
        self._source = Source()
        offer = None if schemas is None else Offer(schemas)
        if family is not None and family.read is not None:
            reader = _whole(self._source, family.read, offer)
        else:
            reader = _read(self._source, family if offer else None, offer or Offer({}), thinking, opened)
        self._reader = reader
        self._over = False

    def feed(self, text: str, ended: bool = False) -> list[Event]:
        """What more of the text brings."""
        source = self._source
        source.text += text
        source.ended |= ended
        if not self._over:
            try:
                next(self._reader)
            except StopIteration:
                self._over = True
        return source.take_events()


def _whole(source: Source, read: Callable[[Source, Offer | None], Reader], offer: Offer | None) -> Reader:
    yield from read(source, offer)
    source.close()


def _read(source: Source, family: Family | None, offer: Offer, thinking: Thinking | None, opened: bool) -> Reader:
    if thinking is not None:
        yield from _reasoning(source, thinking, opened)
    if family is not None and family.bare is not None:
        start = source.at
        yield from source.space()
        if not (yield from family.bare(source, offer)):
            source.at = start
    markers = () if family is None else family.markers
    reads = {} if family is None else dict(family.styles)
    while (marker := (yield from source.bring_until(markers))) is not None:
        start = source.at
        if not (yield from reads[marker](source, offer)):
            source.at = start
            source.say(marker)
    source.close()


def _reasoning(source: Source, thinking: Thinking, opened: bool) -> Reader:
    start = source.at
    if not opened:
        yield from source.space()
    if (yield from source.literal(thinking.open)) is None and not opened:
        source.at = start
        return
    source.trim()
    marker = yield from source.bring_until((thinking.close,), source.think)
    source.trim()
    if marker is None:
        source.at = len(source.text)


class ParsedCall(NamedTuple):
    """A call, or what came new of one."""

    name: str | None
    """None where the call of before goes on."""
    arguments: str = ""
    """JSON, when they are whole."""
    id: str | None = None
    """Where the format has one."""


@dataclass
class Parsed:
    """An answer, or what came new of one."""

    content: str = ""
    reasoning: str = ""
    calls: list[ParsedCall] = field(default_factory=list[ParsedCall])


def gather(events: Sequence[Event]) -> Parsed:
    """Events together."""
    parsed = Parsed()
    for event in events:
        match event:
            case Text(text):
                parsed.content += text
            case Reasoning(text):
                parsed.reasoning += text
            case Call(name, id):
                parsed.calls.append(ParsedCall(name, id=id))
            case Arguments(text):
                last = parsed.calls.pop() if parsed.calls else ParsedCall(None)
                parsed.calls.append(last._replace(arguments=last.arguments + text))
    return parsed
