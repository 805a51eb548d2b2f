"""Answers as OpenAI's protocol writes them: whole, and as chunks of a stream."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Iterable
from typing import Any

from theodora.serve.answers import Answers, Choice, Piece
from theodora.serve.protocol import ChatRequest, Common
from theodora.serve.text import BROKEN, CONTEXT, token_bytes, token_text


class Replies:
    """The replies to one request."""

    def __init__(self, asked: Common, tokenizer: Any) -> None:
        self.asked, self.tokenizer = asked, tokenizer
        self.chat = isinstance(asked, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12)
        self.created = int(time.time())
        wanted = getattr(asked, "logprobs", None)
        self.logprobs = bool(wanted) if self.chat else wanted is not None

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The reply when everything has come."""
        choices = [self._whole_choice(choice) for choice in answers.choices]
        return {**self._head("chat.completion" if self.chat else "text_completion"), "choices": choices} | {
            "usage": usage(answers)
        }

    def opening(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        if self.chat:
            for choice in answers.choices:
                yield self._chunk([self._choice(choice.index, {"delta": {"role": "assistant", "content": ""}})])

    def chunk(self, pieces: list[Piece]) -> dict[str, Any] | None:
        """What came new, if there is anything to tell."""
        told = [piece for piece in pieces if piece.text or piece.choice.finish]  # no token goes out without its text
        return self._chunk([self._part(piece) for piece in told]) if told else None

    def last(self, answers: Answers) -> dict[str, Any]:
        """What a stream ends with, where the usage is asked for."""
        return self._chunk([]) | {"usage": usage(answers)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        options = self.asked.stream_options
        return {**head, "choices": choices} | ({"usage": None} if options and options.include_usage else {})

    def _choice(
        self, index: int, what: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, **what, "logprobs": logprobs, "finish_reason": finish}

    def _whole_choice(self, choice: Choice) -> dict[str, Any]:
        text = choice.writer.text
        what = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return self._choice(choice.index, what, self._logprobs(choice, 0, choice.told), choice.finish)

    def _part(self, piece: Piece) -> dict[str, Any]:
        what = {"delta": {"content": piece.text} if piece.text else {}} if self.chat else {"text": piece.text}
        logprobs = self._logprobs(piece.choice, piece.first, piece.stop)
        return self._choice(piece.choice.index, what, logprobs, piece.choice.finish)

    def _logprobs(self, choice: Choice, first: int, stop: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        values = choice.logprobs[first:stop]
        tops = [choice.request.tops.get(at, ([], [])) for at in range(first, stop)]
        if self.chat:
            content = [
                self._entry(choice, at, choice.tokens[at], value)
                | {"top_logprobs": [self._entry(choice, at, *other) for other in zip(*top, strict=True)]}
                for at, value, top in zip(range(first, stop), values, tops, strict=True)
            ]
            return {"content": content, "refusal": None}
        texts = [self._name(choice, at, choice.tokens[at]) for at in range(first, stop)]
        return {
            "tokens": texts,
            "token_logprobs": values,
            "top_logprobs": [
                {self._name(choice, at, other): its for other, its in zip(*top, strict=True)} | {text: value}
                for at, text, value, top in zip(range(first, stop), texts, values, tops, strict=True)
            ],
            "text_offset": choice.writer.offsets[first:stop],
        }

    def _entry(self, choice: Choice, at: int, token: int, logprob: float) -> dict[str, Any]:
        text = self._text(choice, at, token)
        found = token_bytes(self.tokenizer, token) if BROKEN in text else text.encode()
        return {"token": text, "logprob": logprob, "bytes": None if found is None else list(found)}

    def _name(self, choice: Choice, at: int, token: int) -> str:
        """As completions write tokens: parts of characters by their bytes, because each is a key of its own."""
        if getattr(self.asked, "return_tokens_as_token_ids", False):
            return f"token_id:{token}"
        text = self._text(choice, at, token)
        found = token_bytes(self.tokenizer, token) if BROKEN in text else None
        return text if found is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in found)

    def _text(self, choice: Choice, at: int, token: int) -> str:
        before = choice.tokens[max(0, at - CONTEXT) : at]
        if not self.chat and at < CONTEXT:
            before = [*choice.request.prompt[-CONTEXT:], *before]
        return token_text(self.tokenizer, token, before)


def usage(answers: Answers) -> dict[str, int]:
    """Counted tokens."""
    prompt, generated = answers.prompt_tokens, answers.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()
