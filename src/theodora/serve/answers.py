"""From requests of the protocol to requests of the engine, and from the engine's updates to answers."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from theodora.errors import ConfigError
from theodora.serve.aside import LONG, Aside
from theodora.serve.calls.families import Parser
from theodora.serve.calls.source import Call, Event
from theodora.serve.chats import chat_text
from theodora.serve.echo import Echo, echo_of
from theodora.serve.engine import Busy, Engine, Unavailable, UnknownModel
from theodora.serve.forms import Form, Forms
from theodora.serve.grammar import Grammars
from theodora.serve.manners import Manner, manner_of, tell_unknown_tokens
from theodora.serve.protocol import ChatRequest, Common, CompletionRequest
from theodora.serve.requests import Mailbox, Request, Sampling
from theodora.serve.stamp import Changed
from theodora.serve.text import BROKEN, Writer
from theodora.serve.watch import NotFinite

_FEW = 16  # prompts, or words, that are not worth a thread whatever they are
_NEW = 500  # tokens that are
_PIECE, _SEAM = 65_536, 16  # characters of a text that are tried at a time, and tokens that one piece more may make
_MOST_READ = 65_536
_MOST_SCORES = 1 << 18  # log-probabilities of a request's prompts
_HALF = re.compile("[\ud800-\udfff]")


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
    told: int = 0
    """Tokens whose log-probabilities were given out."""
    generated: int = 0
    opened: bool = False
    """Whether anything of it has come."""
    finish: str | None = None
    """Why it ended: stop or length."""
    stop_reason: int | str | None = None
    """Which of the request's stop tokens or texts ended it."""
    parser: Parser | None = None
    """Tells its text apart; None where it is one text."""
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
    """What the text brings, where it is told apart."""


class Answers:
    """The answers to one HTTP request, under way. `close` ends what still runs."""

    def __init__(
        self,
        engine: Engine,
        choices: list[Choice],
        mailbox: Mailbox,
        ends: frozenset[int],
        tell_ends: bool = False,
        aside: Aside | None = None,
    ) -> None:
        self.engine, self.choices, self.aside = engine, choices, aside or Aside(2)
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
    def weight(self) -> int:
        """Log-probabilities that can be asked for."""
        return sum(
            _scores(len(one.request.prompt), one.request.sampling.prompt_logprobs)
            + _scores(len(one.tokens), one.request.sampling.top_logprobs)
            for one in self.choices
        )

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What comes, as it comes.

        Raises:
            Unavailable: the worker failed, or the adapter cannot be read now.
            Changed: the adapter cannot be read again at all.
            NotFinite: what was computed is no finite number.
        """
        while self._open:
            updates = await self._mailbox.get()
            known = {id: len(choice.tokens) for id, choice in self._open.items()}
            new = sum(len(updates[id].generated_tokens) - known[id] for id in updates.keys() & known.keys())
            pieces = await self.aside(self._taken, updates) if new > _NEW else self._taken(updates)
            if self.first_token is None:
                self.first_token = self.seconds
            if pieces:
                yield pieces

    def close(self) -> None:
        """End what still runs."""
        for choice in list(self._open.values()):
            self.engine.cancel(choice.request)
        self._open.clear()

    def _taken(self, updates: dict[str, Any]) -> list[Piece]:
        found = [(self._open.get(id), update) for id, update in updates.items()]
        return [self._take(choice, update) for choice, update in found if choice is not None]

    def _take(self, choice: Choice, update: Any) -> Piece:
        if update.error is not None:
            problem = choice.request.problem
            if isinstance(problem, Changed | NotFinite):
                raise problem
            raise Unavailable(str(problem or self.engine.why_failed()))
        sampling = choice.request.sampling
        if choice.request.shaper is not None and choice.request.shaper.problem is not None:
            raise ConfigError(f"The form of the answer could not be kept to: {choice.request.shaper.problem}")
        tokens, finished = update.generated_tokens[: sampling.max_tokens], update.is_finished()
        choice.generated = len(tokens)
        ended = finished and bool(tokens) and tokens[-1] in sampling.stop_ids
        if ended:
            choice.stop_reason = None if tokens[-1] in self._ends else tokens[-1]
        cut = ended and not self._tell_ends
        choice.tokens, choice.end = (tokens[:-1], tokens[-1]) if cut else (tokens, None)
        choice.logprobs = update.logprobs[: len(tokens)]
        first = choice.told
        text = choice.writer.write(choice.tokens, finished)
        if choice.writer.stopped:  # what the engine went on with before it is told is nobody's
            choice.tokens = choice.tokens[: len(choice.writer.offsets)]
            choice.generated = len(choice.tokens)
            choice.end, choice.stop_reason = None, choice.writer.stop
        stop, over = len(choice.tokens), False
        if not finished or choice.writer.stopped:  # tokens go out with their text, however many come at once
            while stop > first and choice.writer.offsets[stop - 1] >= len(choice.writer.text):
                stop -= 1
        if finished or choice.writer.stopped:
            choice.finish = "stop" if ended or choice.writer.stopped else "length"
            over = True
            self._open.pop(choice.request.id, None)  # it may have been closed meanwhile
            if not finished:
                self.engine.cancel(choice.request)
        choice.told = stop
        opens, choice.opened = not choice.opened, True
        events = [] if choice.parser is None else choice.parser.feed(text, over)
        choice.events += events
        if choice.finish == "stop" and any(isinstance(event, Call) for event in choice.events):
            choice.finish = "tool_calls"
        return Piece(choice, text, first, stop, opens, events)


class Desk:
    """Takes requests in for one engine: text to tokens, defaults, names of models."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._base = manner_of(None, tokenizer, engine.model.generation_config)
        self._manners: dict[int, Manner] = {}
        self.reading, self.telling = Aside(4), Aside(2)
        self.forms = Forms(tokenizer, engine.config, Grammars(tokenizer, engine.vocabulary, self._base.ends))

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's `model` names; None for the base model."""
        return None if model == self.engine.config.name else model

    def knows(self, model: str) -> bool:
        """Whether there is such a model or adapter."""
        return model == self.engine.config.name or self.engine.adapters.get(model) is not None

    def manner(self, model: str) -> Manner:
        """How `model` is asked, and where its answers end; found out the first time."""
        served = None if (name := self.adapter_of(model)) is None else self.engine.adapters.get(name)
        if served is None:
            return self._base
        found = self._manners.get(served.serial)
        if found is None:
            found = manner_of(served.told, self.tokenizer, self.engine.model.generation_config)
            # What is no token of the model is no place to end at, and nothing to look for among its scores.
            found = replace(found, ends=frozenset(end for end in found.ends if end < self.engine.vocabulary))
            if served.stamp is not None:
                tell_unknown_tokens(served.stamp.place, self.tokenizer)
            loaded = {adapter.serial for adapter in self.engine.adapters.adapters()}
            known = {serial: manner for serial, manner in self._manners.items() if serial in loaded}
            self._manners = {**known, served.serial: found}
        return found

    async def manner_of(self, model: str) -> Manner:
        """The same as `manner`, read beside the event loop."""
        name = self.adapter_of(model)
        served = None if name is None else self.engine.adapters.get(name)
        if served is None or served.serial in self._manners:
            return self.manner(model)
        return await self.reading(self.manner, model)

    async def completion(self, asked: CompletionRequest, loop: Any) -> Answers:
        """Put a completion in the queue."""
        prompts = asked.prompts()
        if not prompts:
            raise ConfigError("prompt is empty; expected a text, or token ids.")
        self._check(len(prompts), asked)
        manner = await self.manner_of(asked.model)
        most = 16 if asked.max_tokens is None else asked.max_tokens
        size = sum(map(len, prompts))
        long = size > LONG or len(prompts) > _FEW

        def read() -> tuple[list[list[int]], list[Echo | None]]:
            read = [self._prompt(asked, prompt, most) for prompt in prompts]
            return [ids for ids, _ in read], [echo for _, echo in read]

        tokens, echoes = await self.reading(read) if long or asked.echo else read()
        form = await self.forms.of_completion(asked, manner)
        return await self._put(asked, tokens, echoes, most, form, loop)

    async def chat(self, asked: ChatRequest, loop: Any) -> Answers:
        """Put a chat in the queue."""
        self._check(1, asked)
        manner = await self.manner_of(asked.model)

        def read() -> tuple[str, list[str], list[int]]:
            text, notes = chat_text(self.tokenizer, asked, manner.template_of(bool(asked.shown_tools)))
            ids = self.ids(text, asked.add_special_tokens, self._room(asked, asked.most_tokens or 1))
            return text, notes, self._truncated(asked, ids, asked.most_tokens or 1)

        text, notes, prompt = await self.reading(read)
        most = asked.most_tokens
        if most is None:
            most = max(1, self.engine.window - len(prompt))
        last = asked.messages[-1]
        echo = Echo(_HALF.sub(BROKEN, last.text)) if asked.echo and last.role == "assistant" else None
        form = await self.forms.of_chat(asked, text, manner)
        answers = await self._put(asked, [prompt], [echo], most, form, loop)
        answers.notes = notes
        return answers

    def ids(self, text: str, special: bool, room: int) -> list[int]:
        """The tokens of a text.

        Args:
            text: the text.
            special: add the tokenizer's special tokens.
            room: tokens that it may have.

        Raises:
            ConfigError: it holds half a character, or has more tokens.
        """
        if half := _HALF.search(text):  # a character cut in two by JavaScript, say, which tokenizers do not take
            raise ConfigError(f"The text holds half a character, \\u{ord(half[0]):04x}; expected whole ones.")

        def encode(text: str) -> list[int]:
            return list(self.tokenizer(text, add_special_tokens=special)["input_ids"])

        # A text that is too long is not read whole to know it. Where it is cut, a few tokens may become others.
        count = 0
        for end in range(_PIECE, len(text), _PIECE):
            count += len(encode(text[end - _PIECE : end])) - _SEAM
            if count > room:
                raise ConfigError(
                    f"The text is too long: the first {end} of its {len(text)} characters have more than {count} "
                    f"tokens; expected at most {room}."
                )
        return encode(text)

    def _prompt(self, asked: CompletionRequest, prompt: str | list[int], most: int) -> tuple[list[int], Echo | None]:
        special = asked.add_special_tokens
        ids = self.ids(prompt, special, self._room(asked, most)) if isinstance(prompt, str) else prompt
        kept = self._truncated(asked, ids, most)
        self.engine.check_length(len(kept), most)
        given = prompt if len(kept) == len(ids) else kept
        return kept, echo_of(self.tokenizer, given, kept, special) if asked.echo and kept else None

    def _room(self, asked: Common, most: int) -> int:
        """Tokens that a prompt may have, as it is given."""
        if asked.truncate_prompt_tokens is not None:
            return self.most_read
        window = self.engine.window
        return window - most if most < window else window

    @property
    def most_read(self) -> int:
        """Tokens of a text that is only looked at, or cut."""
        return max(_MOST_READ, self.engine.window)

    def _truncated(self, asked: Common, ids: list[int], most: int) -> list[int]:
        limit = asked.truncate_prompt_tokens
        if limit is None:
            return ids
        limit = self.engine.window - most if limit < 0 else limit
        return ids[:limit] if asked.truncation_side == "right" else ids[max(0, len(ids) - limit) :]

    def _check(self, prompts: int, asked: Common) -> None:
        """Refuse, before any work, what would be refused after it."""
        if not self.knows(asked.model):
            raise UnknownModel(f"There is no model {asked.model!r}.")
        most = self.engine.config.max_batch + self.engine.config.max_queue
        if (count := prompts * asked.draws) > most:
            raise ConfigError(
                f"{prompts} prompts with n = {asked.draws} are {count} requests; expected at most {most}."
            )
        if (under_way := self.engine.under_way()) >= most:
            raise Busy(f"{under_way} requests are under way; try again soon.")

    async def _put(
        self,
        asked: Common,
        prompts: Sequence[list[int]],
        echoes: Sequence[Echo | None],
        most: int,
        form: Form,
        loop: Any,
    ) -> Answers:
        arguments = (asked, prompts, echoes, most, form, loop)
        words = len(asked.bad_words) + len(prompts) * asked.draws
        if words <= _FEW and asked.draws * sum(map(len, prompts)) <= LONG:
            return self._submit(*arguments)
        putting = asyncio.ensure_future(self.reading(self._submit, *arguments))
        try:
            return await asyncio.shield(putting)
        except asyncio.CancelledError:  # it goes on, and nobody waits for the answers
            putting.add_done_callback(_close)
            raise

    def _check_rows(self, prompts: Sequence[list[int]]) -> None:
        """Name the tokens that the model has no row for: the tokenizer may have more than the model."""
        rows = self.engine.vocabulary
        beyond = sorted({token for prompt in prompts for token in prompt if rows <= token < len(self.tokenizer)})
        if beyond:
            names = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in beyond[:8])
            raise ConfigError(
                f"The prompt holds tokens that the model has no row for (it has {rows}): {names}. Leave them out."
            )

    def _submit(
        self,
        asked: Common,
        prompts: Sequence[list[int]],
        echoes: Sequence[Echo | None],
        most: int,
        form: Form,
        loop: Any,
    ) -> Answers:
        if asked.min_tokens > most:  # which may be the default
            raise ConfigError(f"min_tokens is {asked.min_tokens}; expected at most max_tokens, which is {most}.")
        self._check_rows(prompts)
        if (told := asked.draws * sum(_scores(len(prompt), asked.prompt_tops) for prompt in prompts)) > _MOST_SCORES:
            raise ConfigError(f"{told} log-probabilities of prompts are asked for; expected at most {_MOST_SCORES}.")
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        # What ends a grammar ends its answer.
        ends = frozenset() if asked.ignore_eos and form.grammar is None else self.manner(asked.model).ends
        sampling = replace(sampling_of(asked, ends, most, self.tokenizer), grammar=form.grammar)
        mailbox = Mailbox()
        choices: list[Choice] = []
        every_token = asked.stream or bool(asked.stop)
        try:
            for prompt, echo in zip(prompts, echoes, strict=True):
                for _ in range(asked.draws):
                    index = len(choices)
                    request = self.engine.submit(
                        prompt,
                        replace(sampling, seed=seed + index),
                        self.adapter_of(asked.model),
                        every_token=every_token,
                        loop=loop,
                        updates=mailbox,
                    )
                    # A chat's answer is a text of its own; a completion goes on from its prompt.
                    before = () if isinstance(asked, ChatRequest) else prompt
                    writer = self._writer(asked, before, form.tokenizer)
                    choices.append(Choice(index, request, writer, echo, parser=form.parser()))
        except BaseException:
            for choice in choices:
                self.engine.cancel(choice.request)
            raise
        return Answers(self.engine, choices, mailbox, ends, asked.include_stop_str_in_output, self.telling)

    def _writer(self, asked: Common, before: Sequence[int], tokenizer: Any) -> Writer:
        return Writer(
            tokenizer or self.tokenizer,
            asked.stop,
            before,
            skip_special=asked.skip_special_tokens,
            keep_stop=asked.include_stop_str_in_output,
            least=asked.min_tokens,
        )


def _close(putting: asyncio.Future[Answers]) -> None:
    if not putting.cancelled() and putting.exception() is None:
        putting.result().close()


def _scores(tokens: int, tops: int | None) -> int:
    """Log-probabilities of so many tokens and the likeliest at their places."""
    return 0 if tops is None else tokens * (tops + 1)


def sampling_of(asked: Common, ends: Collection[int], most: int, tokenizer: Any) -> Sampling:
    """How the tokens of a request's answers are picked.

    Args:
        asked: the request.
        ends: tokens that end an answer whatever is asked.
        most: tokens that an answer may have.
        tokenizer: for words that are not to come.
    """
    return Sampling(
        max_tokens=most,
        temperature=asked.temperature,
        top_p=asked.top_p,
        top_k=max(0, asked.top_k),
        min_p=asked.min_p,
        top_logprobs=asked.tops or 0,
        stop_ids=tuple({*ends, *asked.stop_token_ids}),
        min_tokens=asked.min_tokens,
        prompt_logprobs=asked.prompt_tops,
        presence_penalty=asked.presence_penalty,
        frequency_penalty=asked.frequency_penalty,
        repetition_penalty=asked.repetition_penalty,
        bias=tuple((token, bias) for token, bias in asked.logit_bias.items() if bias),
        allowed=None if asked.allowed_token_ids is None else tuple(dict.fromkeys(asked.allowed_token_ids)),
        banned=tuple(_spellings(asked.bad_words, tokenizer)),
    )


def _spellings(words: Sequence[str], tokenizer: Any) -> Iterator[tuple[int, ...]]:
    """Each word as tokens at the beginning of a text, and after a space."""
    for word in words:
        found = {tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word.lstrip()}")}
        yield from sorted(ids for ids in found if ids)
