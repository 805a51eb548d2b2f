"""Answers as /v1/responses writes them: items of several kinds, whole, and as events of a stream."""

from __future__ import annotations

import secrets
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from theodora.serve.answers import Answers, Piece
from theodora.serve.calls.source import Arguments, Call, Event, Reasoning, Text
from theodora.serve.replies import usage
from theodora.serve.responses import ResponsesRequest

_TEXT, _THOUGHT, _ARGUMENTS = "response.output_text", "response.reasoning_text", "response.function_call_arguments"


class ResponseReplies:
    """The reply to one request."""

    def __init__(self, asked: ResponsesRequest) -> None:
        self.asked = asked
        self.id = "resp_" + secrets.token_hex(16)
        self.created = int(time.time())
        self._items: list[dict[str, Any]] = []
        self._told = 0  # events

    def whole(self, answers: Answers) -> dict[str, Any]:
        """The reply when everything has come."""
        (choice,) = answers.choices
        for _ in self._take(choice.events if choice.parser else [Text(choice.writer.text)]):
            pass
        for _ in self._end(answers):
            pass
        return self._response(answers)

    def opening(self, answers: Answers) -> Iterator[dict[str, Any]]:
        """What a stream begins with."""
        for kind in ("response.created", "response.in_progress"):
            yield self._event(kind, response=self._response(None))

    def chunks(self, pieces: Iterable[Piece], answers: Answers) -> Iterator[dict[str, Any]]:
        """What came new."""
        for piece in pieces:
            yield from self._take(piece.events if piece.choice.parser else [Text(piece.text)] if piece.text else [])
            if piece.choice.finish:
                yield from self._end(answers)
                response = self._response(answers)
                yield self._event(f"response.{response['status']}", response=response)

    def _take(self, events: Sequence[Event]) -> Iterator[dict[str, Any]]:
        for event in events:
            match event:
                case Text(text):
                    item, new = yield from self._open("message")
                    if new:
                        item["content"].append({"type": "output_text", "text": "", "annotations": [], "logprobs": []})
                        yield self._of_part("response.content_part.added", item, part=dict(item["content"][0]))
                    item["content"][0]["text"] += text
                    yield self._of_part(f"{_TEXT}.delta", item, delta=text, logprobs=[])
                case Reasoning(text):
                    item, new = yield from self._open("reasoning")
                    if new:
                        item["content"].append({"type": "reasoning_text", "text": ""})
                    item["content"][0]["text"] += text
                    yield self._of_part(f"{_THOUGHT}.delta", item, delta=text)
                case Call(name, id):
                    yield from self._close("completed")
                    call = {"call_id": id or f"call_{secrets.token_hex(12)}", "name": name, "arguments": ""}
                    yield self._begin("function_call", "fc", **call)
                case Arguments(text):
                    item = self._items[-1]
                    item["arguments"] += text
                    yield self._of_item(f"{_ARGUMENTS}.delta", item, delta=text)

    def _open(self, kind: str) -> Generator[dict[str, Any], None, tuple[dict[str, Any], bool]]:
        """The item that text of a kind goes to, and whether it is new."""
        if self._items and self._items[-1]["type"] == kind:
            return self._items[-1], False
        yield from self._close("completed")
        if kind == "message":
            yield self._begin(kind, "msg", role="assistant", content=[])
        else:
            yield self._begin(kind, "rs", summary=[], content=[])
        return self._items[-1], True

    def _begin(self, kind: str, prefix: str, **more: Any) -> dict[str, Any]:
        item = {"id": f"{prefix}_{secrets.token_hex(16)}", "type": kind, "status": "in_progress", **more}
        self._items.append(item)
        shown = {**item, "content": []} if "content" in item else dict(item)
        return self._event("response.output_item.added", output_index=len(self._items) - 1, item=shown)

    def _close(self, status: str) -> Iterator[dict[str, Any]]:
        if not self._items or self._items[-1]["status"] != "in_progress":
            return
        item = self._items[-1]
        item["status"] = status
        if item["type"] == "message":
            part = item["content"][0]
            yield self._of_part(f"{_TEXT}.done", item, text=part["text"], logprobs=[])
            yield self._of_part("response.content_part.done", item, part=part)
        elif item["type"] == "reasoning":
            yield self._of_part(f"{_THOUGHT}.done", item, text=item["content"][0]["text"])
        else:
            yield self._of_item(f"{_ARGUMENTS}.done", item, name=item["name"], arguments=item["arguments"])
        yield self._event("response.output_item.done", output_index=len(self._items) - 1, item=item)

    def _end(self, answers: Answers) -> Iterator[dict[str, Any]]:
        if not self._items:
            yield from self._take([Text("")])
        cut = answers.choices[0].finish == "length"
        yield from self._close("incomplete" if cut else "completed")

    def _event(self, kind: str, **what: Any) -> dict[str, Any]:
        self._told += 1
        return {"type": kind, "sequence_number": self._told - 1, **what}

    def _of_item(self, kind: str, item: dict[str, Any], **what: Any) -> dict[str, Any]:
        return self._event(kind, item_id=item["id"], output_index=len(self._items) - 1, **what)

    def _of_part(self, kind: str, item: dict[str, Any], **what: Any) -> dict[str, Any]:
        return self._of_item(kind, item, content_index=0, **what)

    def _response(self, answers: Answers | None) -> dict[str, Any]:
        """The response as it stands; without answers it has just begun."""
        asked = self.asked
        cut = answers is not None and answers.choices[0].finish == "length"
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "status": "in_progress" if answers is None else "incomplete" if cut else "completed",
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "metadata": asked.metadata or {},
            "model": asked.model,
            "output": [] if answers is None else self._items,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning.effort, "summary": None},
            "service_tier": "default",
            "store": False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "text": {"format": asked.text.format},
            "tool_choice": asked.tool_choice or "auto",
            "tools": asked.tools,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "truncation": "disabled",
            "usage": None if answers is None else _usage(answers),
            "user": asked.user,
        }


def _usage(answers: Answers) -> dict[str, Any]:
    counted = usage(answers)
    return {
        "input_tokens": counted["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": 0},
        "output_tokens": counted["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": counted["total_tokens"],
    }
