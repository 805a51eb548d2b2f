"""The answers to one HTTP request, put together from the engine's updates while they come."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from theodora.errors import ConfigError
from theodora.serve.calls.families import Parser
from theodora.serve.calls.source import Call, Event
from theodora.serve.daemon_threads import DaemonThreads
from theodora.serve.echo import Echo
from theodora.serve.engine import Engine
from theodora.serve.errors import Unavailable
from theodora.serve.requests import Mailbox, Request
from theodora.serve.stamp import Changed
from theodora.serve.text import Writer
from theodora.serve.watch import OutputNotFinite

_NEW = 500  # tokens of one update from which on a thread reads them: others' answers would wait


@dataclass
class Choice:
    """One answer of a request."""

    index: int
    request: Request
    writer: Writer
    echo: Echo | None = None
    """What is told in front of it."""
    tokens: list[int] = field(default_factory=list)
    """So far, without the one that ended the answer, if that is not to be told."""
    end: int | None = None
    """The token that ended it and is not among `tokens`."""
    logprobs: list[float] = field(default_factory=list)
    sent: int = 0
    """Tokens that have gone out, with their text and log-probabilities."""
    generated: int = 0
    opened: bool = False
    """Whether anything of it has gone out."""
    finish: str | None = None
    """Why it ended: stop or length."""
    stop_reason: int | str | None = None
    """Which of the request's stop tokens or texts ended it."""
    parser: Parser | None = None
    """Parts its text from reasoning and calls; None where all is one text."""
    events: list[Event] = field(default_factory=list[Event])
    """What the parser has found."""

    @property
    def mean_logprob(self) -> float:
        """Of its tokens: what the best of several answers has most of."""
        return sum(self.logprobs) / max(1, len(self.logprobs))


@dataclass
class Piece:
    """What came new to one answer."""

    choice: Choice
    text: str
    first: int
    """Its first new token."""
    stop: int
    """Its last new token + 1."""
    opens: bool = False
    """Whether it is the answer's first."""
    events: list[Event] = field(default_factory=list[Event])
    """What the text brings, where it is parsed."""


class Answers:
    """The answers to one HTTP request, under way. `close` ends what still runs."""

    def __init__(
        self,
        engine: Engine,
        choices: list[Choice],
        mailbox: Mailbox,
        ends: frozenset[int],
        tell_ends: bool = False,
        threads: DaemonThreads | None = None,
    ) -> None:
        self.engine, self.choices, self.threads = engine, choices, threads or DaemonThreads(2)
        self.notes: list[str] = []
        """What of the request had no effect."""
        self.first_token: float | None = None
        """Seconds until it came."""
        self._began = time.perf_counter()
        self._mailbox, self._ends, self._tell_ends = mailbox, ends, tell_ends
        self._open = {choice.request.id: choice for choice in choices}

    @property
    def seconds(self) -> float:
        """Since the request came."""
        return time.perf_counter() - self._began

    @property
    def prompt_tokens(self) -> int:
        """Of all prompts, each counted once."""
        return sum({id(choice.request.prompt): len(choice.request.prompt) for choice in self.choices}.values())

    @property
    def generated_tokens(self) -> int:
        """Of all answers."""
        return sum(choice.generated for choice in self.choices)

    @property
    def scores(self) -> int:
        """Log-probabilities that there are to tell."""
        return sum(
            score_count(len(choice.request.prompt), choice.request.sampling.prompt_logprobs)
            + score_count(len(choice.tokens), choice.request.sampling.top_logprobs)
            for choice in self.choices
        )

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What comes, as it comes.

        Raises:
            Unavailable: the worker failed, or the adapter cannot be read now.
            Changed: the adapter cannot be read again at all.
            ConfigError: the form that the answer must have leaves it no token.
            OutputNotFinite: what was computed is no finite number.
        """
        while self._open:
            updates = await self._mailbox.get()
            known = {id: len(choice.tokens) for id, choice in self._open.items()}
            new = sum(len(updates[id].generated_tokens) - known[id] for id in updates.keys() & known.keys())
            pieces = await self.threads(self._take_all, updates) if new > _NEW else self._take_all(updates)
            if self.first_token is None:
                self.first_token = self.seconds
            if pieces:
                yield pieces

    def close(self) -> None:
        """End what still runs."""
        for choice in list(self._open.values()):
            self.engine.cancel(choice.request)
        self._open.clear()

    def _take_all(self, updates: dict[str, Any]) -> list[Piece]:
        open_choices = [(self._open.get(id), update) for id, update in updates.items()]
        return [self.take(choice, update) for choice, update in open_choices if choice is not None]

    def take(self, choice: Choice, update: Any) -> Piece:
        """What an update brings to one of the answers.

        Raises:
            what `pieces` does.
        """
        self._raise_problem(choice.request, update)
        finished, first, writer = update.is_finished(), choice.sent, choice.writer
        at_end_token = self._take_tokens(choice, update)
        text = writer.write(choice.tokens, finished)
        if writer.stopped:  # what the engine went on with before it is told is nobody's
            choice.tokens = choice.tokens[: len(writer.offsets)]
            choice.generated = len(choice.tokens)
            choice.end, choice.stop_reason = None, writer.stop
        stop, over = len(choice.tokens), finished or writer.stopped
        if not finished or writer.stopped:  # tokens go out with their text, however many come at once
            while stop > first and writer.offsets[stop - 1] >= len(writer.text):
                stop -= 1
        if over:
            choice.finish = "stop" if at_end_token or writer.stopped else "length"
            self._open.pop(choice.request.id, None)  # it may have been closed meanwhile
            if not finished:
                self.engine.cancel(choice.request)
        choice.sent = stop
        opens, choice.opened = not choice.opened, True
        events = [] if choice.parser is None else choice.parser.feed(text, over)
        choice.events += events
        if choice.finish == "stop" and any(isinstance(event, Call) for event in choice.events):
            choice.finish = "tool_calls"
        return Piece(choice, text, first, stop, opens, events)

    def _raise_problem(self, request: Request, update: Any) -> None:
        if update.error is not None:
            problem = request.problem
            if isinstance(problem, Changed | OutputNotFinite):
                raise problem
            raise Unavailable(str(problem or self.engine.worker.why_failed()))
        if request.shaper is not None and request.shaper.problem is not None:
            raise ConfigError(f"The form of the answer could not be kept to: {request.shaper.problem}")

    def _take_tokens(self, choice: Choice, update: Any) -> bool:
        """Take the tokens so far; whether a token ended the answer."""
        sampling = choice.request.sampling
        tokens = update.generated_tokens[: sampling.max_tokens]
        choice.generated = len(tokens)
        at_end_token = update.is_finished() and bool(tokens) and tokens[-1] in sampling.stop_ids
        if at_end_token:
            choice.stop_reason = None if tokens[-1] in self._ends else tokens[-1]
        hides_end = at_end_token and not self._tell_ends
        choice.tokens, choice.end = (tokens[:-1], tokens[-1]) if hides_end else (tokens, None)
        choice.logprobs = update.logprobs[: len(tokens)]
        return at_end_token


def score_count(tokens: int, tops: int | None) -> int:
    """Log-probabilities to tell of so many tokens: each, and the `tops` likeliest at its place; None: none at all."""
    return 0 if tops is None else tokens * (tops + 1)
