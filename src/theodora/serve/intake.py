"""Takes requests of the protocol in for one engine: text to tokens, defaults, names of models, and the queue."""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from theodora.errors import ConfigError
from theodora.serve.answers import Answers, Choice, score_count
from theodora.serve.chat_formats import ChatFormat, chat_format_of, warn_of_unknown_tokens
from theodora.serve.chats import chat_text
from theodora.serve.daemon_threads import LONG, DaemonThreads
from theodora.serve.echo import Echo, echo_of
from theodora.serve.engine import Engine
from theodora.serve.errors import Busy, UnknownModel
from theodora.serve.forms import Form, Forms
from theodora.serve.grammar import Grammars
from theodora.serve.protocol import ChatRequest, Common, CompletionRequest
from theodora.serve.requests import Mailbox, Sampling
from theodora.serve.text import BROKEN, Writer

_FEW = 16  # prompts, or words, that are not worth a thread whatever they are
_PIECE, _SEAM = 65_536, 16  # characters of a text that are tried at a time, and tokens that one piece more may make
_MOST_READ = 65_536  # tokens of a text that is cut before it is run: it is read whole, whatever the model's window
_MOST_SCORES = 1 << 18  # log-probabilities of a request's prompts, which the reply holds as text all at once
_HALF = re.compile("[\ud800-\udfff]")


@dataclass(frozen=True)
class _Asked:
    """What a request comes to once it has been read."""

    body: Common
    prompts: Sequence[list[int]]
    echoes: Sequence[Echo | None]
    """What is told in front of the answers to each prompt."""
    most_tokens: int
    """Of one answer."""
    form: Form

    @property
    def answers(self) -> int:
        """How many there will be."""
        return len(self.prompts) * self.body.draws


class Intake:
    """Takes requests in for one engine."""

    def __init__(self, engine: Engine, tokenizer: Any) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self._base = chat_format_of(None, tokenizer, engine.model.generation_config)
        self._formats: dict[int, ChatFormat] = {}  # by the adapter's serial number
        self.reading, self._answering = DaemonThreads(4), DaemonThreads(2)
        self.forms = Forms(tokenizer, engine.config, Grammars(tokenizer, engine.vocabulary, self._base.ends))

    def adapter_of(self, model: str) -> str | None:
        """The adapter that a request's `model` names; None for the base model."""
        return None if model == self.engine.config.name else model

    def knows(self, model: str) -> bool:
        """Whether there is such a model or adapter."""
        return model == self.engine.config.name or self.engine.adapters.get(model) is not None

    def chat_format(self, model: str) -> ChatFormat:
        """How `model` is asked, and where its answers end; read from the adapter's files the first time."""
        served = None if (name := self.adapter_of(model)) is None else self.engine.adapters.get(name)
        if served is None:
            return self._base
        if (known := self._formats.get(served.serial)) is not None:
            return known
        own = chat_format_of(served.format_files, self.tokenizer, self.engine.model.generation_config)
        # What is no token of the model is no place to end at, and nothing to look for among its scores.
        own = replace(own, ends=frozenset(end for end in own.ends if end < self.engine.vocabulary))
        if served.stamp is not None:
            warn_of_unknown_tokens(served.stamp.place, self.tokenizer)
        loaded = {adapter.serial for adapter in self.engine.adapters.adapters()}
        others = {serial: format for serial, format in self._formats.items() if serial in loaded}
        self._formats = {**others, served.serial: own}
        return own

    async def read_chat_format(self, model: str) -> ChatFormat:
        """The same, read beside the event loop."""
        name = self.adapter_of(model)
        served = None if name is None else self.engine.adapters.get(name)
        if served is None or served.serial in self._formats:
            return self.chat_format(model)
        return await self.reading(self.chat_format, model)

    async def completion(self, asked: CompletionRequest, loop: Any) -> Answers:
        """Put a completion in the queue."""
        prompts = asked.prompts()
        if not prompts:
            raise ConfigError("prompt is empty; expected a text, or token ids.")
        self._check(len(prompts), asked)
        chat_format = await self.read_chat_format(asked.model)
        most = 16 if asked.max_tokens is None else asked.max_tokens
        size = sum(map(len, prompts))
        long = size > LONG or len(prompts) > _FEW

        def read() -> tuple[list[list[int]], list[Echo | None]]:
            read = [self._prompt(asked, prompt, most) for prompt in prompts]
            return [ids for ids, _ in read], [echo for _, echo in read]

        tokens, echoes = await self.reading(read) if long or asked.echo else read()
        form = await self.forms.of_completion(asked, chat_format)
        return await self._put(_Asked(asked, tokens, echoes, most, form), loop)

    async def chat(self, asked: ChatRequest, loop: Any) -> Answers:
        """Put a chat in the queue."""
        self._check(1, asked)
        chat_format = await self.read_chat_format(asked.model)

        def read() -> tuple[str, list[str], list[int]]:
            text, notes = chat_text(self.tokenizer, asked, chat_format.template_of(bool(asked.shown_tools)))
            ids = self.ids(text, asked.add_special_tokens, self._room(asked, asked.most_tokens or 1))
            return text, notes, self._truncated(asked, ids, asked.most_tokens or 1)

        text, notes, prompt = await self.reading(read)
        most = asked.most_tokens
        if most is None:
            most = max(1, self.engine.window - len(prompt))
        last = asked.messages[-1]
        echo = Echo(_HALF.sub(BROKEN, last.text)) if asked.echo and last.role == "assistant" else None
        form = await self.forms.of_chat(asked, text, chat_format)
        answers = await self._put(_Asked(asked, [prompt], [echo], most, form), loop)
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
        whole, ids = len(ids), self._truncated(asked, ids, most)
        self.engine.check_length(len(ids), most)
        given = prompt if len(ids) == whole else ids
        return ids, echo_of(self.tokenizer, given, ids, special) if asked.echo and ids else None

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

    async def _put(self, asked: _Asked, loop: Any) -> Answers:
        words = len(asked.body.bad_words) + asked.answers
        if words <= _FEW and asked.body.draws * sum(map(len, asked.prompts)) <= LONG:
            return self._submit(asked, loop)
        putting = asyncio.ensure_future(self.reading(self._submit, asked, loop))
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

    def _submit(self, asked: _Asked, loop: Any) -> Answers:
        body, most = asked.body, asked.most_tokens
        if body.min_tokens > most:  # which may be the default
            raise ConfigError(f"min_tokens is {body.min_tokens}; expected at most max_tokens, which is {most}.")
        self._check_rows(asked.prompts)
        scores = body.draws * sum(score_count(len(prompt), body.prompt_tops) for prompt in asked.prompts)
        if scores > _MOST_SCORES:
            raise ConfigError(f"{scores} log-probabilities of prompts are asked for; expected at most {_MOST_SCORES}.")
        # What ends a grammar ends its answer.
        ends = frozenset() if body.ignore_eos and asked.form.grammar is None else self.chat_format(body.model).ends
        sampling = replace(sampling_of(body, ends, most, self.tokenizer), grammar=asked.form.grammar)
        mailbox = Mailbox()
        choices: list[Choice] = []
        try:
            self._submit_each(asked, sampling, mailbox, loop, choices)
        except BaseException:
            for choice in choices:
                self.engine.cancel(choice.request)
            raise
        return Answers(self.engine, choices, mailbox, ends, body.include_stop_str_in_output, self._answering)

    def _submit_each(
        self, asked: _Asked, sampling: Sampling, mailbox: Mailbox, loop: Any, choices: list[Choice]
    ) -> None:
        """Submit the requests one by one; those that were taken are in `choices`, also if one is refused."""
        body = asked.body
        seed = secrets.randbits(62) if body.seed is None else body.seed
        for prompt, echo in zip(asked.prompts, asked.echoes, strict=True):
            for _ in range(body.draws):
                index = len(choices)
                request = self.engine.submit(
                    prompt,
                    replace(sampling, seed=seed + index),
                    self.adapter_of(body.model),
                    every_token=body.stream or bool(body.stop),
                    loop=loop,
                    updates=mailbox,
                )
                # A chat's answer is a text of its own; a completion goes on from its prompt.
                before = () if isinstance(body, ChatRequest) else prompt
                writer = self._writer(body, before, asked.form.tokenizer)
                choices.append(
                    Choice(index, request, writer, echo, parser=asked.form.new_parser and asked.form.new_parser())
                )

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
        spellings = {
            tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in (word, f" {word.lstrip()}")
        }
        yield from sorted(ids for ids in spellings if ids)
