"""A conversation with the base model and one with the adapted model, held in step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.generation.streamers import BaseStreamer

from theodora.adapters import adapter_disabled
from theodora.adapters.state import find_state
from theodora.data import encode_prompt
from theodora.data.vocabulary import check_rows
from theodora.errors import ConfigError
from theodora.evaluate.decoding import decoding, end_tokens

Message = dict[str, str]


@dataclass
class Answer:
    """What one side says, as it grows."""

    text: str = ""
    tokens: int = 0
    seconds: float = 0.0
    finished: bool = False
    stopped: bool = False
    """Ctrl-C ended it."""
    forgot: bool = False
    """The beginning of the conversation no longer fits into the context window and was left out."""


class Conversation:
    """Two histories, one model.

    Args:
        model: carries an adapter or not; in evaluation mode.
        tokenizer: its tokenizer.
        system: system message; none if empty.
        max_new_tokens: tokens of the longest answer.
        temperature: 0 for greedy decoding.
        top_p: share of the probability that is sampled from.
        use_chat_template: None: if the tokenizer has one. Without a template each question stands alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        system: str = "",
        max_new_tokens: int = 512,
        temperature: float = 0.0,
        top_p: float = 1.0,
        use_chat_template: bool | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self._max_new_tokens = max_new_tokens
        self._temperature = temperature
        self._top_p = top_p
        self.has_template = bool(tokenizer.chat_template) and use_chat_template is not False
        self.has_adapter = find_state(model) is not None
        self.speakers: tuple[str, ...] = ("base", "adapted") if self.has_adapter else ("base",)
        self._system = system
        self.reset()

    def reset(self, system: str | None = None) -> None:
        """Forget both histories; a system message, if given, replaces the one before."""
        self._system = self._system if system is None else system
        self._histories: dict[str, list[Message]] = {"base": [], "adapted": []}

    def ask(self, speaker: str, question: str, show: Callable[[Answer], None]) -> Answer:
        """Let one side answer; `show` is called with the answer as it grows. Ctrl-C ends the answer, which is kept.

        Raises:
            ConfigError: the text has tokens that the model has no row for; it was not asked.
        """
        history = self._histories[speaker]
        history.append({"role": "user", "content": question})
        answer = Answer()
        ids, answer.forgot = self._prompt(history)
        try:
            check_rows([ids], self.model, self.tokenizer, "The text", "Write it without them.")
        except ConfigError:
            history.pop()
            raise
        stream = _Stream(self.tokenizer, answer, show, end_tokens(self.model, self.tokenizer))
        side = adapter_disabled(self.model) if self.has_adapter and speaker == "base" else nullcontext()
        try:
            with side, torch.inference_mode():
                self._generate(ids, stream)
        except KeyboardInterrupt:
            answer.stopped = True
        answer.finished = True
        history.append({"role": "assistant", "content": answer.text})
        show(answer)
        return answer

    def _generate(self, ids: list[int], stream: BaseStreamer) -> None:
        input_ids = torch.tensor([ids], device=self.model.device)
        room = max(1, self._window() - len(ids))
        self.model.generate(  # pyright: ignore[reportCallIssue] (typed as a Tensor, through nn.Module.__getattr__)
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=decoding(
                end_tokens(self.model, self.tokenizer),
                min(self._max_new_tokens, room),
                temperature=self._temperature,
                top_p=self._top_p,
            ),
            streamer=stream,
        )

    def _prompt(self, history: list[Message]) -> tuple[list[int], bool]:
        """Token ids of the conversation so far, without its oldest turns if they leave no room for an answer."""
        if not self.has_template:
            return encode_prompt({"prompt": history[-1]["content"], "completion": ""}, self.tokenizer, False), False
        system = [{"role": "system", "content": self._system}] if self._system else []
        enough = max(self._window() - self._max_new_tokens, self._window() // 2)
        start = 0
        while len(ids := self._encode([*system, *history[start:]])) > enough and start < len(history) - 1:
            start += 2
        return ids, start > 0

    def _encode(self, messages: list[Message]) -> list[int]:
        row: dict[str, Any] = {"prompt": messages, "completion": []}
        return encode_prompt(row, self.tokenizer, True)

    def _window(self) -> int:
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 1 << 30


class _Stream(BaseStreamer):
    """Collects tokens from `generate` into an `Answer`."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        answer: Answer,
        show: Callable[[Answer], None],
        ends: Collection[int] = (),
    ) -> None:
        self._ends = ends  # not all of them are tokens that decoding leaves out
        self._tokenizer = tokenizer
        self._answer = answer
        self._show = show
        self._tokens: list[int] | None = None
        self._start = time.perf_counter()

    def put(self, value: Tensor) -> None:
        """Take the next token, or, the first time, the prompt."""
        if self._tokens is None:
            self._tokens = []
            return
        self._tokens.extend(token for token in value.flatten().tolist() if token not in self._ends)
        text = self._tokenizer.decode(self._tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        self._answer.text = str(text).rstrip("\ufffd")  # half of a character waits for its other bytes
        self._answer.tokens = len(self._tokens)
        self._answer.seconds = time.perf_counter() - self._start
        self._show(self._answer)

    def end(self) -> None:
        """Nothing is held back that would have to be flushed."""
