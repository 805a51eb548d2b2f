"""Answers as OpenAI's protocol writes them: whole, and as chunks of a stream."""

from __future__ import annotations

import hashlib
import json
import secrets
import time
from collections.abc import Iterable, Iterator
from typing import Any

from theodora.serve.answers import Answers, Choice, Piece
from theodora.serve.calls.families import gather
from theodora.serve.calls.source import Call
from theodora.serve.protocol import ChatRequest, Common
from theodora.serve.requests import Score
from theodora.serve.text import BROKEN, CONTEXT, token_bytes, token_text

_BLOCK = 64  # bytes; with obfuscation every chunk's choices take up a multiple of them


class Replies:
    """The replies to one request."""

    def __init__(self, asked: Common, tokenizer: Any) -> None:
        self.asked, self.tokenizer = asked, tokenizer
        self.chat = isinstance(asked, ChatRequest)
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + (asked.request_id or secrets.token_hex(12))
        self.created = int(time.time())
        self.logprobs = asked.tops is not None

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The reply when everything has come."""
        best = self._best(answers.choices)
        choices = [self._whole_choice(index, choice) for index, choice in enumerate(best)]
        head = self._head("chat.completion" if self.chat else "text_completion")
        return {**head, "choices": choices, "usage": usage(answers)} | self._of_prompt(best[0], self.chat)

    def opening(self, answers: Answers) -> Iterable[dict[str, Any]]:
        """What a stream begins with."""
        for choice in answers.choices:
            if self.chat:
                echoed = choice.echo.text if choice.echo else ""
                part = self._choice(choice.index, {"delta": {"role": "assistant", "content": echoed}})
                yield self._chunk([part], answers) | self._of_prompt(choice, self.chat)

    def chunks(self, pieces: list[Piece], answers: Answers) -> Iterator[dict[str, Any]]:
        """What came new, if there is anything to tell: one chunk for each answer, because clients read one."""
        for piece in pieces:
            if not self.chat and piece.opens:
                choice = piece.choice
                what: dict[str, Any] = {"text": choice.echo.text if choice.echo else ""} | self._of_prompt(choice, True)
                if choice.echo or self.asked.return_token_ids:
                    prompt = self._prompt_logprobs(choice) if choice.echo and self.logprobs else None
                    yield self._chunk([self._choice(choice.index, what, prompt)], answers)
            has_content = bool(piece.text) if piece.choice.parser is None else bool(piece.events)
            # No token goes out without its text; the markup of calls is nobody's text, but its tokens are told, and so
            # are those of a text that is held back, because it may be the beginning of a call.
            counted = (self.logprobs or self.asked.return_token_ids) and piece.stop > piece.first
            if has_content or piece.choice.finish or counted:
                yield self._chunk([self._part(piece)], answers)

    def last(self, answers: Answers) -> dict[str, Any]:
        """What a stream ends with, where the usage is asked for."""
        return self._chunk([], answers) | {"usage": usage(answers)}

    def _best(self, choices: list[Choice]) -> list[Choice]:
        """The answers to tell, of those that were drawn for each prompt."""
        draws, n = self.asked.draws, self.asked.n
        if draws == n:
            return choices
        drawn = [choices[first : first + draws] for first in range(0, len(choices), draws)]
        return [choice for answers in drawn for choice in sorted(answers, key=lambda choice: -choice.mean_logprob)[:n]]

    def _head(self, kind: str) -> dict[str, Any]:
        head = {"id": self.id, "object": kind, "created": self.created, "model": self.asked.model}
        return head | ({"service_tier": "default"} if self.asked.service_tier else {})

    def _chunk(self, choices: list[dict[str, Any]], answers: Answers) -> dict[str, Any]:
        head = self._head("chat.completion.chunk" if self.chat else "text_completion")
        chunk = {**head, "choices": choices}
        options = self.asked.stream_options
        if options and (options.include_usage or options.continuous_usage_stats):
            chunk["usage"] = usage(answers) if options.continuous_usage_stats else None
        if options and options.include_obfuscation:
            size = sum(len(json.dumps(choice, ensure_ascii=False).encode()) for choice in choices)
            chunk["obfuscation"] = secrets.token_urlsafe(_BLOCK)[: _BLOCK - size % _BLOCK]
        return chunk

    def _choice(
        self, index: int, what: dict[str, Any], logprobs: Any = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": index, **what, "logprobs": logprobs, "finish_reason": finish}

    def _whole_choice(self, index: int, choice: Choice) -> dict[str, Any]:
        text = (choice.echo.text if choice.echo else "") + choice.writer.text
        what: dict[str, Any] = {"text": text} | ({} if self.chat else self._of_prompt(choice, True))
        if self.chat:
            what = {"message": self._message(choice, text)}
        logprobs = self._logprobs(choice, 0, choice.sent)
        if choice.echo and logprobs and not self.chat:
            before = self._prompt_logprobs(choice)
            logprobs = {name: [*before[name], *logprobs[name]] for name in logprobs}
        ids = self._ids(choice, 0, choice.sent, True)
        return self._choice(index, what, logprobs, choice.finish) | {"stop_reason": choice.stop_reason} | ids

    def _part(self, piece: Piece) -> dict[str, Any]:
        choice = piece.choice
        what = {"delta": self._delta(piece)} if self.chat else {"text": piece.text}
        part = self._choice(choice.index, what, self._logprobs(choice, piece.first, piece.stop), choice.finish)
        ids = self._ids(choice, piece.first, piece.stop, choice.finish is not None)
        return part | ({"stop_reason": choice.stop_reason} if choice.finish else {}) | ids

    def _message(self, choice: Choice, text: str) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if choice.parser is None:
            return message
        parsed = gather(choice.events)
        content = (choice.echo.text if choice.echo else "") + parsed.content
        message["content"] = content or (None if parsed.calls or parsed.reasoning else "")
        if parsed.reasoning:
            message |= {"reasoning_content": parsed.reasoning, "reasoning": parsed.reasoning}
        if parsed.calls:
            message["tool_calls"] = [
                {
                    "id": call.id or self._call_id(choice, index),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for index, call in enumerate(parsed.calls)
            ]
        return message

    def _delta(self, piece: Piece) -> dict[str, Any]:
        choice = piece.choice
        if choice.parser is None:
            return {"content": piece.text} if piece.text else {}
        new = gather(piece.events)
        before = sum(isinstance(event, Call) for event in choice.events) - sum(
            call.name is not None for call in new.calls
        )
        delta: dict[str, Any] = {"content": new.content} if new.content else {}
        if new.reasoning:
            delta |= {"reasoning_content": new.reasoning, "reasoning": new.reasoning}
        calls: list[dict[str, Any]] = []
        for call in new.calls:
            if call.name is None:  # the last of before goes on
                calls.append({"index": before - 1, "function": {"arguments": call.arguments}})
                continue
            head = {"id": call.id or self._call_id(choice, before), "type": "function"}
            calls.append({"index": before, **head, "function": {"name": call.name, "arguments": call.arguments}})
            before += 1
        return delta | ({"tool_calls": calls} if calls else {})

    def _call_id(self, choice: Choice, index: int) -> str:
        """Nine letters, as Mistral's templates want them; the same in a stream and in a whole reply."""
        return hashlib.sha256(f"{self.id}:{choice.index}:{index}".encode()).hexdigest()[:9]

    def _ids(self, choice: Choice, first: int, stop: int, ended: bool) -> dict[str, Any]:
        if not self.asked.return_token_ids:
            return {}
        end = [choice.end] if ended and choice.end is not None else []
        return {"token_ids": [*choice.tokens[first:stop], *end]}

    def _of_prompt(self, choice: Choice, here: bool) -> dict[str, Any]:
        """What is told of the prompt: beside a completion's text, and beside a chat's choices."""
        fields: dict[str, Any] = {}
        if here and self.asked.return_token_ids:
            fields["prompt_token_ids"] = choice.request.prompt
        if here and self.asked.prompt_logprobs is not None:
            fields["prompt_logprobs"] = self._scores(choice, self.asked.prompt_logprobs)
        return fields

    def _scores(self, choice: Choice, count: int) -> list[dict[str, Any] | None]:
        """vLLM's form: for each token of the prompt, by number, itself and the likeliest."""
        scored: list[dict[str, Any] | None] = []
        prompt = choice.request.prompt
        for at, (token, score) in enumerate(zip(prompt, _scores_of(choice), strict=True)):
            if score is None:
                scored.append(None)
                continue
            ranks = [(token, score.logprob, score.rank)]
            ranks += [(other, its, rank) for rank, (other, its) in enumerate(_tops(score.tops, count), start=1)]
            scored.append({})
            for other, logprob, rank in ranks:
                name = token_text(self.tokenizer, other, prompt[max(0, at - CONTEXT) : at])
                scored[-1].setdefault(str(other), {"logprob": _as_json(logprob), "rank": rank, "decoded_token": name})  # pyright: ignore[reportOptionalMemberAccess]
        return scored

    def _prompt_logprobs(self, choice: Choice) -> dict[str, Any]:
        """A completion's form, of the prompt that is told in front of it."""
        prompt, scores, count = choice.request.prompt, _scores_of(choice), self.asked.tops or 0
        assert choice.echo is not None
        befores = [prompt[max(0, at - CONTEXT) : at] for at in range(len(prompt))]
        return {
            "tokens": [self._name(token, before) for token, before in zip(prompt, befores, strict=True)],
            "token_logprobs": [None if score is None else _as_json(score.logprob) for score in scores],
            "top_logprobs": [
                None if score is None else self._named(token, score.logprob, _tops(score.tops, count), before)
                for token, score, before in zip(prompt, scores, befores, strict=True)
            ],
            "text_offset": list(choice.echo.offsets),
        }

    def _logprobs(self, choice: Choice, first: int, stop: int) -> dict[str, Any] | None:
        if not self.logprobs:
            return None
        tokens, offsets = choice.tokens, choice.writer.offsets
        if choice.end is not None and choice.finish and not self.chat:
            # A completion tells the token that ended it as well: who scores a text counts on every one.
            tokens, offsets, stop = [*tokens, choice.end], [*offsets, len(choice.writer.text)], stop + 1
        places = range(first, stop)
        values = choice.logprobs[first:stop]
        tops = [_tops(choice.request.tops.get(at, ([], [])), self.asked.tops or 0) for at in places]
        befores = [self._before(choice, at) for at in places]
        rows = list(zip(tokens[first:stop], values, tops, befores, strict=True))
        if self.chat:
            content = [
                self._entry(token, value, before) | {"top_logprobs": [self._entry(*other, before) for other in top]}
                for token, value, top, before in rows
            ]
            return {"content": content, "refusal": None}
        shift = len(choice.echo.text) if choice.echo else 0
        return {
            "tokens": [self._name(token, before) for token, _, _, before in rows],
            "token_logprobs": [_as_json(value) for value in values],
            "top_logprobs": [self._named(token, value, top, before) for token, value, top, before in rows],
            "text_offset": [shift + offset for offset in offsets[first:stop]],
        }

    def _named(self, token: int, logprob: float, tops: list[tuple[int, float]], before: list[int]) -> dict[str, float]:
        """The likeliest tokens and the one that came, by name; a name that is taken gives way to a number."""
        named = {self._name(token, before): _as_json(logprob)}
        others: dict[str, float] = {}
        for other, its in tops:
            if other != token:
                name = self._name(other, before)
                others[f"token_id:{other}" if name in others or name in named else name] = _as_json(its)
        return others | named

    def _entry(self, token: int, logprob: float, before: list[int]) -> dict[str, Any]:
        text = token_text(self.tokenizer, token, before)
        encoded = token_bytes(self.tokenizer, token) if BROKEN in text else text.encode()
        name = f"token_id:{token}" if self.asked.return_tokens_as_token_ids else text
        return {"token": name, "logprob": _as_json(logprob), "bytes": None if encoded is None else list(encoded)}

    def _name(self, token: int, before: list[int]) -> str:
        """As completions write tokens: parts of characters by their bytes, because each is a key of its own."""
        if self.asked.return_tokens_as_token_ids:
            return f"token_id:{token}"
        text = token_text(self.tokenizer, token, before)
        encoded = token_bytes(self.tokenizer, token) if BROKEN in text else None
        return text if encoded is None else "bytes:" + "".join(f"\\x{byte:02x}" for byte in encoded)

    def _before(self, choice: Choice, at: int) -> list[int]:
        before = choice.tokens[max(0, at - CONTEXT) : at]
        if not self.chat and at < CONTEXT:
            return [*choice.request.prompt[-CONTEXT:], *before]
        return before


def _scores_of(choice: Choice) -> list[Score | None]:
    return choice.request.scores or [None] * len(choice.request.prompt)  # of one token nothing is scored


def _tops(tops: tuple[list[int], list[float]], count: int) -> list[tuple[int, float]]:
    return list(zip(*tops, strict=True))[:count]


def _as_json(logprob: float) -> float:
    """A log-probability as JSON can write it; vLLM's number stands for minus infinity, and for what is no number."""
    return logprob if logprob > -9999.0 else -9999.0  # NaN is not more than anything


def usage(answers: Answers) -> dict[str, int]:
    """Counted tokens."""
    prompt, generated = answers.prompt_tokens, answers.generated_tokens
    return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def event(data: dict[str, Any] | str) -> bytes:
    """One server-sent event; those of /v1/responses have a name."""
    name = f"event: {data['type']}\n" if isinstance(data, dict) and "sequence_number" in data else ""
    return f"{name}data: {data if isinstance(data, str) else json.dumps(data, ensure_ascii=False)}\n\n".encode()
