"""Where, in a conversation that a chat template has rendered, the words stand that the model is to learn.

TRL's `assistant_only_loss` needs templates with `{% generation %}` markers, which few models ship, and some of those
take in the header of a turn or leave out the token that ends it. Here the words of each turn are found by marks that
the template carries along (`marks`). A stretch begins behind what the generation prompt gives and ends behind the token
that ends the turn; both are read off renders of the turns before, of which only what follows the nearest words is
compared. So it does not matter if the template writes earlier turns differently once others follow (Qwen3 drops their
reasoning, DeepSeek-R1 every turn's). Markers, where there are any, can only leave out something of such a stretch.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

from theodora.data.hidden import Hidden
from theodora.data.marks import Kind, Marked, Part
from theodora.data.masks import Span, agreement
from theodora.data.messages import Message, user
from theodora.data.templates import Template, whole_tags

_HIDDEN_AS: Mapping[Kind, Hidden] = {
    "system": Hidden.SYSTEM,
    "user": Hidden.USER,
    "tool": Hidden.RESULTS,
    "text": Hidden.TEXT,
    "thought": Hidden.REASONING,
    "reasoning": Hidden.REASONING,
    "call": Hidden.CALLS,
    "argument": Hidden.CALLS,
    "name": Hidden.NAMES,
    "tools": Hidden.TOOLS,
}
_KEY_OF: Mapping[Kind, str] = {"reasoning": "reasoning_content", "call": "tool_calls"}


Compared = tuple[str, str, bool]
"""What was compared to find where a turn begins (False) or ends (True): what should follow, and what does."""


@dataclass(frozen=True)
class RenderedChat:
    """A conversation as text, and the stretches of characters to learn, in order."""

    text: str
    spans: tuple[Span, ...]
    ends_open: bool
    """The last turn is learned, but the template wrote no end-of-turn token behind it."""
    as_prompted: bool
    """The last learned turn follows what a model is given to answer (DeepSeek-R1 is given an opened <think>)."""
    earlier_as_prompted: bool
    """So do the learned turns before (where Qwen3.5 has left out even an empty <think>)."""
    hidden: Mapping[Hidden, int]
    """What the template does not show, and in how many turns (of any role)."""
    answered: Mapping[int, Span]
    """Where a model's words stand, without the token that ends its turn, by the number of its learned turn."""

    @property
    def answers(self) -> dict[int, str]:
        """What a model writes, by the number of the learned assistant turn."""
        return {turn: self.text[start:end] for turn, (start, end) in self.answered.items()}


def find_answers(
    template: Template,
    ends: re.Pattern[str],
    marked: Marked,
    marked_text: str,
    generation_spans: Sequence[Span],
    compared: list[Compared] | None = None,
) -> RenderedChat | None:
    """The rendered conversation, and what of it is to be learned.

    Args:
        template: rendered it.
        ends: matches the tokens that can end a turn.
        marked: the conversation with marks around its words.
        marked_text: what the template made of that.
        generation_spans: the stretches between the template's own `{% generation %}` markers; empty if it has none.
        compared: to this the stretches are added that were looked at to find where turns begin and end.

    Returns:
        None if a turn cannot be found in the text.
    """
    search = _Search(template, ends, marked, marked_text)
    found = search.chat(generation_spans)
    if compared is not None:
        compared += search.compared
    return found


@dataclass(frozen=True)
class _Run:
    """Parts of one assistant turn that follow each other in the text, with nothing of another turn between them."""

    message: int
    first: int
    last: int
    """Indices of parts."""
    before: int | None
    """The part in front, of whatever turn."""
    limit: int
    """Where the next turn's words begin."""


class _Search:
    """One conversation as a template wrote it, and where its parts stand."""

    def __init__(self, template: Template, ends: re.Pattern[str], marked: Marked, marked_text: str) -> None:
        self.template, self.ends, self.marked, self.marked_text = template, ends, marked, marked_text
        self.text, self.extents = marked.read(marked_text)
        self.compared: list[Compared] = []
        self.learned = [i for i, m in enumerate(marked.messages) if m["role"] == "assistant" and m.get("weight") != 0]

    def chat(self, markers: Sequence[Span]) -> RenderedChat | None:
        """The conversation with its learned stretches; where the template has markers, only what lies between them."""
        runs = [run for run in self._runs() if run.message in self.learned]
        spans, as_prompted = list[Span](), list[bool]()
        for run in runs:
            start, follows = self._start(run)
            as_prompted.append(follows)
            if start is None:
                return None
            end = self._end(run)
            start = max(start, spans[-1][1]) if spans else start
            spans.append((start, end))
        hidden = self._hidden(runs, spans)
        if hidden is None:
            return None
        last = len(self.marked.messages) - 1
        within = [self._within(markers, span) for span in spans] if markers else [[span] for span in spans]
        if unmarked := sum(self._loses(span, pieces) for span, pieces in zip(spans, within, strict=True)):
            hidden[Hidden.UNMARKED] = unmarked
        return RenderedChat(
            text=self.text,
            spans=tuple(piece for pieces in within for piece in pieces),
            ends_open=bool(runs) and runs[-1].message == last and not self._is_ended(runs[-1], spans[-1]),
            as_prompted=all(as_prompted[-1:]),
            earlier_as_prompted=all(as_prompted[:-1]),
            hidden=hidden,
            answered=self._answered(runs, spans),
        )

    def _answered(self, runs: Sequence[_Run], spans: Sequence[Span]) -> dict[int, Span]:
        turns = [i for i, message in enumerate(self.marked.messages) if message["role"] == "assistant"]
        answers = dict[int, Span]()
        for run, (start, end) in zip(runs, spans, strict=True):
            closing = [token for token in self.ends.finditer(self.text, start, end) if token.end() == end]
            answers.setdefault(turns.index(run.message), (start, closing[0].start() if closing else end))
        return answers

    def _runs(self) -> list[_Run]:
        parts = self.marked.parts
        order = sorted(self.extents, key=lambda part: self.extents[part])
        groups = [list(group) for _, group in groupby(order, key=lambda part: parts[part].message)]
        places = [self.extents[group[0]][0] for group in groups[1:]] + [len(self.text)]
        runs, before = list[_Run](), None
        for group, limit in zip(groups, places, strict=True):
            index = parts[group[0]].message
            last = max(group, key=lambda part: self.extents[part][1])
            if index >= 0 and self.marked.messages[index]["role"] == "assistant":
                runs.append(_Run(index, group[0], last, before, limit))
            before = last
        return runs

    def _start(self, run: _Run) -> tuple[int | None, bool]:
        """Behind what the generation prompt gives, and whether the turn goes on exactly from there."""
        words, _ = self.extents[run.first]
        prompted = self._rendered(*self._turns_before(run), prompt=True)
        tail = self._behind(prompted, run.before)
        place = 0 if run.before is None else self.extents[run.before][1]
        self.compared.append((tail or "", self.text[place:words], False))
        if tail is None:
            return (words, run.message == 0) if self.marked.parts[run.first].kind == "text" else (None, False)
        shared = agreement(tail, self.text[place:words])
        if shared == len(tail):
            behind = self._behind_header(place + shared, words)
            return (place + shared, True) if behind is None else (behind, False)
        for header in self._headers(tail):
            if (inside := self.text.rfind(header, place, words)) >= 0:
                rest = tail[tail.rfind(header) + len(header) :] if header in tail else ""
                inside += len(header)
                return inside + agreement(rest, self.text[inside:words]), False
        shared = self._whole_tokens(place, place + shared)
        if tail[: shared - place].strip() and tail.rfind(self.template.header or tail) < shared - place:
            return shared, False
        if self.marked.parts[run.first].kind == "text":
            return words, False
        # No header at all: behind content that Gemma 4 writes after a result, at DeepSeek V3's second call.
        begin = self.ends.match(self.text[place:words].lstrip())
        bare = begin is not None and begin[0] not in tail + self.template.header
        return (place if bare else None), False

    def _headers(self, tail: str) -> list[str]:
        """What a turn may begin with: the header, and ends of a generation prompt from a control token on."""
        begins = [token.start() for token in self.ends.finditer(tail)]
        headers = (
            self.template.header,
            self.template.header.strip(),
            tail.strip(),
            *(tail[begin:].strip() for begin in begins),
        )
        return [header for header in headers if header]

    def _behind_header(self, start: int, words: int) -> int | None:
        """Behind a turn's header that the generation prompt did not give, as some do not after a tool's result."""
        header = self.template.header
        begin = words - len(self.text[start:words].lstrip())
        if not self.ends.search(header) or not self.text.startswith(header, begin, words):
            return None
        return begin + len(header)

    def _end(self, run: _Run) -> int:
        """Behind the token that ends a turn. A line break behind that is the template's: a model stops before it."""
        place = self.extents[run.last][1]
        turns = max(run.message, self._turns_before(run)[0] - 1) + 1
        tail = self._behind(self._rendered(turns, self._kinds_through(run), prompt=False), run.last) or ""
        if self.template.always_prompts:
            tail = self._without_prompt(tail, turns, run)
        self.compared.append((tail, self.text[place : run.limit], True))
        end = place + agreement(tail, self.text[place : run.limit])
        if end < place + len(tail):
            end = self._whole_tokens(place, end)
        closed = place + len(self.text[place:end].rstrip())
        if any(token.end() == closed for token in self.ends.finditer(self.text, place, closed)):
            return closed
        token = self.ends.search(self.text, end, run.limit)
        follows = token is not None and not self.text[end : token.start()].strip()
        # GLM's turns are ended by the token of the next role; one that begins any turn ends none.
        return token.end() if token and follows and not self.template.header.startswith(token[0]) else end

    def _without_prompt(self, tail: str, turns: int, run: _Run) -> str:
        """The end of a turn without the header of the next, which begins where a user's would differ from it."""
        messages = [*self.marked.messages[:turns], user("qxasked")]
        asked = self._behind(self.template.render_or_none(messages, self.marked.tools), run.last)
        if asked is None or asked.startswith(tail):
            return tail
        shared = tail[: whole_tags(tail, agreement(tail, asked))]
        tokens = list(self.ends.finditer(shared))
        if len(tokens) > 1 and tokens[-1].end() == len(shared):
            return shared[: tokens[-1].start()]  # the token that begins any turn
        return shared[: tokens[-1].end()] if tokens else shared[: shared.rfind("\n") + 1]

    def _is_ended(self, run: _Run, span: Span) -> bool:
        return self.ends.search(self.text, self.extents[run.last][1], span[1]) is not None

    def _whole_tokens(self, start: int, end: int) -> int:
        """`end`, or the beginning of the control token or tag that it would cut."""
        token = next((t for t in self.ends.finditer(self.text, start) if t.end() > end), None)
        end = token.start() if token and token.start() < end else end
        return start + whole_tags(self.text[start:end], end - start)

    def _turns_before(self, run: _Run) -> tuple[int, frozenset[Kind] | None]:
        """How many turns a model has seen when it writes this run, and what it has written of its own turn."""
        before = self.marked.parts[run.before].message if run.before is not None else -1
        if before <= run.message:
            return run.message, None
        earlier = frozenset[Kind](
            part.kind
            for i, part in enumerate(self.marked.parts)
            if part.message == run.message and i in self.extents and self.extents[i] < self.extents[run.first]
        )
        return before + 1, earlier

    def _kinds_through(self, run: _Run) -> frozenset[Kind] | None:
        """What a model has written of its turn after this run; None: all."""
        parts = [(i, part) for i, part in enumerate(self.marked.parts) if part.message == run.message]
        later = {p.kind for i, p in parts if i in self.extents and self.extents[i] > self.extents[run.last]}
        return frozenset(part.kind for _, part in parts if part.kind not in later) if later else None

    def _rendered(self, turns: int, kinds: frozenset[Kind] | None, *, prompt: bool) -> str | None:
        """The first turns as text with marks; the last assistant turn among them may be reduced to some kinds."""
        messages = self.marked.messages[:turns]
        if kinds is None and not prompt and len(messages) == len(self.marked.messages):
            return self.marked_text
        if kinds is not None:
            last = max(i for i, message in enumerate(messages) if message["role"] == "assistant")
            messages[last] = _reduced(messages[last], kinds)
        return self.template.render_or_none(messages, self.marked.tools, prompt)

    def _behind(self, rendered: str | None, part: int | None) -> str | None:
        """What follows a part (None: everything) in a text with marks."""
        if rendered is None:
            return None
        text, extents = self.marked.read(rendered)
        if part is None:
            return text
        return text[extents[part][1] :] if part in extents else None

    def _within(self, markers: Sequence[Span], span: Span) -> list[Span]:
        """What markers cover of a stretch, and the token that ends the turn, which some leave out."""
        start, end = span
        pieces = [(max(start, a), min(end, b)) for a, b in markers if a < end and b > start]
        if pieces and not self.ends.sub("", self.text[pieces[-1][1] : end]).strip():
            pieces[-1] = pieces[-1][0], end
        return pieces

    def _loses(self, span: Span, pieces: Sequence[Span]) -> bool:
        places = [span[0], *(place for piece in pieces for place in piece), span[1]]
        return any(self.text[a:b].strip() for a, b in zip(places[::2], places[1::2], strict=True))

    def _hidden(self, runs: Sequence[_Run], spans: Sequence[Span]) -> dict[Hidden, int] | None:
        """What the template does not show, and in how many turns; None: the words of a learned turn."""
        written = dict[int, str]()
        for run, (start, end) in zip(runs, spans, strict=True):
            written[run.message] = written.get(run.message, "") + self.text[start:end]
        parts = [part for i, part in enumerate(self.marked.parts) if i not in self.extents]
        # Kimi writes a call's name in its id.
        missing = [p for p in parts if p.kind != "call" or p.words not in written.get(p.message, "")]
        missing += [part for part in self.marked.bare if part.kind != "argument" and part.words not in self.text]
        if any(p.kind == "text" and p.message in self.learned and p.message not in written for p in missing):
            return None
        turns = {(self._name(part), part.message) for part in missing}
        turns |= {(Hidden.PART, p.message) for i, p in enumerate(self.marked.parts) if self._is_shortened(i, p)}
        turns |= {(Hidden.NOTHING, i) for i in self.learned if i not in written}
        return dict(Counter(name for name, _ in turns))

    def _name(self, part: Part) -> Hidden:
        forms = self.template.forms
        shown = {"thought": forms.shows_thoughts, "reasoning": forms.shows_reasoning}.get(part.kind, False)
        is_last = all(m["role"] != "assistant" for m in self.marked.messages[part.message + 1 :])
        return Hidden.EARLIER if shown and not is_last else _HIDDEN_AS[part.kind]

    def _is_shortened(self, index: int, part: Part) -> bool:
        if part.kind not in ("text", "thought", "reasoning") or index not in self.extents:
            return False
        start, end = self.extents[index]
        return part.words != self.text[start:end] and "".join(part.words.split()) not in "".join(
            self.text[start:end].split()
        )


def _reduced(message: Message, kinds: frozenset[Kind]) -> Message:
    """A turn with only some of what it holds."""
    dropped = {key for kind, key in _KEY_OF.items() if kind not in kinds}
    reduced = {key: value for key, value in message.items() if key not in dropped}
    return reduced if kinds & {"text", "thought"} else {**reduced, "content": ""}
