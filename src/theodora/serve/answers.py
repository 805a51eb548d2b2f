"""From requests of the protocol to requests of the engine, and from the engine's updates to answers."""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from theodora.errors import ConfigError
from theodora.serve.engine import Engine, Unavailable
from theodora.serve.manners import Manner, manner_of
from theodora.serve.protocol import ChatRequest, Common, CompletionRequest
from theodora.serve.requests import Mailbox, Request, Sampling
from theodora.serve.text import Writer
from theodora.serve.tiers import Changed

_LONG = 20_000  # characters of a text that is worth a thread
_HALF = re.compile("[\ud800-\udfff]")


@dataclass
class Choice:
    """One answer of a request."""

    index: int
    request: Request
    writer: Writer
    tokens: list[int] = field(default_factory=list)
    """So far, without the one that ended the answer."""
    logprobs: list[float] = field(default_factory=list)
    told: int = 0
    """Tokens whose log-probabilities were given out."""
    generated: int = 0
    finish: str | None = None
    """Why it ended: stop or length."""


@dataclass
class Piece:
    """What came new to one answer."""

    choice: Choice
    text: str
    first: int
    """Its first new token."""
    stop: int
    """Its last new token + 1."""


class Answers:
    """The answers to one HTTP request, under way. `close` ends what still runs."""

    def __init__(self, engine: Engine, choices: list[Choice], mailbox: Mailbox, ends: frozenset[int]) -> None:
        self.engine, self.choices = engine, choices
        self.first_token: float | None = None
        """Seconds until it came."""
        self._began = time.perf_counter()
        self._mailbox, self._ends = mailbox, ends
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

    async def pieces(self) -> AsyncIterator[list[Piece]]:
        """What comes, as it comes.

        Raises:
            Unavailable: the worker failed, or the adapter cannot be read now.
            Changed: the adapter cannot be read again at all.
        """
        while self._open:
            pieces: list[Piece] = []
            for id, update in (await self._mailbox.get()).items():
                if (choice := self._open.get(id)) is not None:
                    pieces.append(self._take(choice, update))
            if self.first_token is None:
                self.first_token = self.seconds
            if pieces:
                yield pieces

    def close(self) -> None:
        """End what still runs."""
        for choice in self._open.values():
            self.engine.cancel(choice.request)
        self._open.clear()

    def _take(self, choice: Choice, update: Any) -> Piece:
        if update.error is not None:
            problem = choice.request.problem
            if isinstance(problem, Changed):
                raise problem
            raise Unavailable(str(problem or self.engine.why_failed()))
        tokens, finished = update.generated_tokens, update.is_finished()
        choice.generated = len(tokens)
        ended = finished and bool(tokens) and tokens[-1] in self._ends
        choice.tokens = tokens[:-1] if ended else tokens
        choice.logprobs = update.logprobs
        first = choice.told
        text = choice.writer.write(choice.tokens, finished)
        if choice.writer.stopped:  # what the engine went on with before it is told is nobody's
            choice.tokens = choice.tokens[: len(choice.writer.offsets)]
            choice.generated = len(choice.tokens)
        stop = len(choice.tokens)
        if not finished or choice.writer.stopped:  # tokens go out with their text, however many come at once
            while stop > first and choice.writer.offsets[stop - 1] >= len(choice.writer.text):
                stop -= 1
        if finished or choice.writer.stopped:
            choice.finish = "stop" if ended or choice.writer.stopped else "length"
            del self._open[choice.request.id]
            if not finished:
                self.engine.cancel(choice.request)
        choice.told = stop
        return Piece(choice, text, first, stop)


class Desk:
    """Takes requests in for one engine: text to tokens, defaults, names of models."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._base = manner_of(None, tokenizer, engine.model.generation_config)
        self._manners: dict[int, Manner] = {}

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's `model` names; None for the base model."""
        return None if model == self.engine.config.name else model

    def knows(self, model: str) -> bool:
        """Whether there is such a model or adapter."""
        return model == self.engine.config.name or self.engine.adapters.get(model) is not None

    def manner(self, model: str) -> Manner:
        """How `model` is asked, and where its answers end; read from an adapter's folder the first time."""
        served = None if (name := self.adapter_of(model)) is None else self.engine.adapters.get(name)
        if served is None:
            return self._base
        if served.serial not in self._manners:
            found = manner_of(served.path, self.tokenizer, self.engine.model.generation_config)
            self._manners[served.serial] = found
        return self._manners[served.serial]

    async def completion(self, asked: CompletionRequest, loop: Any) -> Answers:
        """Put a completion in the queue."""
        prompts = asked.prompts()
        if not prompts:
            raise ConfigError("prompt is empty; expected a text, or token ids.")
        await asyncio.to_thread(self.manner, asked.model)
        ids = [await self._encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
        return self._submit(asked, ids, asked.max_tokens or 16, asked.logprobs or 0, loop)

    async def chat(self, asked: ChatRequest, loop: Any) -> Answers:
        """Put a chat in the queue."""
        template = (await asyncio.to_thread(self.manner, asked.model)).template
        if not (template or getattr(self.tokenizer, "chat_template", None)):
            raise ConfigError("This model's tokenizer has no chat template; use /v1/completions.")
        try:
            text = self.tokenizer.apply_chat_template(
                [message.plain() for message in asked.messages],
                chat_template=template,
                tokenize=False,
                add_generation_prompt=True,
            )
        except Exception as error:  # a template raises what it likes
            raise ConfigError(f"The chat template refuses these messages: {error}") from error
        prompt = await self._encode(text, special=False)
        most = asked.max_completion_tokens or asked.max_tokens or max(1, self.engine.window - len(prompt))
        return self._submit(asked, [prompt], most, asked.top_logprobs or 0, loop)

    async def _encode(self, text: str, special: bool = True) -> list[int]:
        if half := _HALF.search(text):  # a character cut in two by JavaScript, say, which tokenizers do not take
            raise ConfigError(f"The text holds half a character, \\u{ord(half[0]):04x}; expected whole ones.")

        def encode() -> list[int]:
            return self.tokenizer(text, add_special_tokens=special)["input_ids"]

        # A long text would hold up everybody else's answers. (In a thread a short one takes longer.)
        return await asyncio.to_thread(encode) if len(text) > _LONG else encode()

    def _check_rows(self, prompts: Sequence[list[int]]) -> None:
        """Name the tokens that the model has no row for: the tokenizer may have more than the model."""
        rows = self.engine.vocabulary
        beyond = sorted({token for prompt in prompts for token in prompt if rows <= token < len(self.tokenizer)})
        if beyond:
            names = ", ".join(f"{self.tokenizer.convert_ids_to_tokens(token)!r} ({token})" for token in beyond[:8])
            raise ConfigError(
                f"The prompt holds tokens that the model has no row for (it has {rows}): {names}. Leave them out."
            )

    def _submit(self, asked: Common, prompts: Sequence[list[int]], most: int, tops: int, loop: Any) -> Answers:
        most_at_once = self.engine.config.max_batch + self.engine.config.max_queue
        if (count := len(prompts) * asked.n) > most_at_once:
            raise ConfigError(
                f"{len(prompts)} prompts with n = {asked.n} are {count} requests; expected at most {most_at_once}."
            )
        self._check_rows(prompts)
        seed = secrets.randbits(62) if asked.seed is None else asked.seed
        ends = frozenset() if asked.ignore_eos else self.manner(asked.model).ends
        mailbox = Mailbox()
        choices: list[Choice] = []
        every_token = asked.stream or bool(asked.stops)
        try:
            for prompt in prompts:
                for _ in range(asked.n):
                    index = len(choices)
                    sampling = Sampling(
                        max_tokens=most,
                        temperature=asked.temperature,
                        top_p=asked.top_p,
                        top_k=max(0, asked.top_k),
                        seed=seed + index,
                        top_logprobs=tops,
                        stop_ids=tuple(ends),
                    )
                    request = self.engine.submit(
                        prompt,
                        sampling,
                        self.adapter_of(asked.model),
                        every_token=every_token,
                        loop=loop,
                        updates=mailbox,
                    )
                    # A chat's answer is a text of its own; a completion goes on from its prompt.
                    before = () if isinstance(asked, ChatRequest) else prompt
                    choices.append(Choice(index, request, Writer(self.tokenizer, asked.stops, before)))
        except BaseException:
            for choice in choices:
                self.engine.cancel(choice.request)
            raise
        return Answers(self.engine, choices, mailbox, ends)
