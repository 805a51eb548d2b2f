"""Chats with a model and its adapters: a `theodora serve` of the studio's own, on the loopback, with a key.

It ends with the studio. One that a killed studio left behind ends when the next one opens.
"""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import shlex
import socket
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from theodora.errors import TheodoraError, UsageError
from theodora.files.atomic import atomic_write
from theodora.studio.bodies import Mistyped
from theodora.studio.metrics import log_text
from theodora.studio.processes import begin, end, is_alive
from theodora.studio.sources import Source, source_of

_ASKED, _LOG, _KEY = "asked.json", "log", "key"
_BASE = "base"
_MOST_COLUMNS = 8
_GRACE = 2  # seconds that answers under way may take when it is stopped
_PATIENCE = 15.0  # seconds until a server that was told to end is ended
_LINE = 4 << 20  # bytes of an event, at most
_NO_TEMPLATE, _TOO_LONG = "no chat template", "together they may be at most"  # in what the server says


class NotServed(TheodoraError):
    """No server is there to ask."""


@dataclass
class Serving:
    """A server that was started, and by whose names its columns go."""

    model: str
    columns: list[dict[str, str]] = field(default_factory=list[dict[str, str]])
    """Of each its `name` in requests, the `folder` of the adapter (empty for the base), and what is `told` of it."""
    words: list[str] = field(default_factory=list[str])
    port: int = 0
    pid: int = 0
    started: str = ""
    told_to_stop: bool = False


class Chats:
    """The server, if there is one.

    Args:
        folder: for its key and its log.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._serving: Serving | None = None
        self._ready = False

    def start(self, typed: Mapping[str, Any]) -> None:
        """Begin to serve a model and adapters; what was served before ends.

        Raises:
            Mistyped: naming every field that makes no sense.
        """
        model, adapters = _checked(typed)
        self.stop()
        self._folder.mkdir(parents=True, exist_ok=True)
        key = self._folder / _KEY
        key.unlink(missing_ok=True)
        with os.fdopen(os.open(key, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="ascii") as file:
            file.write(secrets.token_urlsafe(32) + "\n")
        (self._folder / _LOG).write_bytes(b"")
        names = _names(adapters)
        serving = Serving(model, port=_free_port())
        serving.columns = [{"name": _BASE, "folder": "", "told": model}]
        serving.columns += [
            {"name": name, "folder": each.name, "told": each.told} for name, each in zip(names, adapters, strict=True)
        ]
        serving.words = ["serve", model, "--served-name", _BASE]
        for name, each in zip(names, adapters, strict=True):
            serving.words += ["--adapter", f"{name}={each.name}"]
        serving.words += ["--port", str(serving.port), "--api-key-file", str(key), "--grace", str(_GRACE)]
        serving.pid, serving.started = begin(serving.words, self._folder / _LOG, os.getcwd())
        self._serving, self._ready = serving, False
        with atomic_write(self._folder / _ASKED) as file:
            file.write_text(json.dumps(asdict(serving), indent=1), encoding="utf-8")

    def stop(self) -> None:
        """End the server, and wait for its end: its memory is free then."""
        if self._serving is not None:
            self._serving.told_to_stop = True
            end(self._serving.pid, self._serving.started, _PATIENCE)

    def end_leftover(self) -> None:
        """End the server that a studio which was killed left behind."""
        try:
            given = json.loads((self._folder / _ASKED).read_bytes())
            pid, started = given["pid"], given["started"]
        except (OSError, ValueError, TypeError, KeyError, RecursionError):
            return
        if type(pid) is int and isinstance(started, str) and pid > 1:
            end(pid, started, _PATIENCE)

    async def state(self) -> dict[str, Any]:
        """How it stands: none, starting, ready, stopped or failed; and its columns, command and log."""
        serving = self._serving
        if serving is None:
            return {"state": "none", "columns": [], "model": "", "command": "", "log": ""}
        if not is_alive(serving.pid, serving.started):
            word = "stopped" if serving.told_to_stop else "failed"
        else:
            self._ready = self._ready or await self._answers(serving)
            word = "ready" if self._ready else "starting"
        return {
            "state": word,
            "columns": serving.columns,
            "model": serving.model,
            "command": shlex.join(["theodora", *serving.words]),
            "log": log_text(self._folder / _LOG),
        }

    async def _answers(self, serving: Serving) -> bool:
        with suppress(NotServed, TimeoutError):
            async with asyncio.timeout(2):
                async with aclosing(self._asked(serving, "GET", "/v1/models")) as lines:
                    async for _ in lines:
                        return True
        return False

    async def say(self, columns: Sequence[Mapping[str, Any]], settings: Mapping[str, Any]) -> AsyncIterator[bytes]:
        """What all columns answer, as it comes: a line of JSON for each piece, with the number of its column.

        Pieces hold `text` or `thought`; the last of a column `end` (why it ended) and `tokens`, or `error`; `note` says
        what is worth knowing. When nobody reads on, the answers end.

        Raises:
            NotServed: no server is ready.
        """
        serving = self._serving
        if serving is None or not is_alive(serving.pid, serving.started):
            raise NotServed("No model is loaded. Load one first.")
        pieces: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()

        async def follow(number: int, column: Mapping[str, Any]) -> None:
            try:
                async for piece in self._answer(serving, column, settings):
                    pieces.put_nowait({"column": number, **piece})
            except TheodoraError as error:
                pieces.put_nowait({"column": number, "error": str(error)})
            finally:
                pieces.put_nowait(None)

        return self._joined(pieces, [follow(number, column) for number, column in enumerate(columns)])

    async def _joined(self, pieces: asyncio.Queue[Any], work: Sequence[Any]) -> AsyncIterator[bytes]:
        tasks = [asyncio.create_task(each) for each in work]
        try:
            left = len(tasks)
            while left:
                piece = await pieces.get()
                if piece is None:
                    left -= 1
                else:
                    yield json.dumps(piece).encode() + b"\n"
        finally:
            for task in tasks:
                task.cancel()  # closes its connection, at which the server ends the answer

    async def _answer(
        self, serving: Serving, column: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> AsyncIterator[dict[str, Any]]:
        messages: list[dict[str, str]] = [*column["messages"]]
        first = int(messages[0]["role"] == "system")
        asked = {"model": column["name"], "stream": True, "stream_options": {"include_usage": True}, **settings}
        while True:
            try:
                async for piece in self._pieces(serving, "/v1/chat/completions", asked | {"messages": messages}):
                    yield piece
                return
            except NotServed as error:
                if _NO_TEMPLATE in str(error):
                    break
                if _TOO_LONG not in str(error) or len(messages) - first < 3:
                    raise
            del messages[first : first + 2]  # the oldest question and its answer, as in `theodora chat`
            yield {"note": "The beginning of the conversation no longer fits, and was left out."}
        yield {"note": "The model has no chat template: it goes on from each message alone."}
        async for piece in self._pieces(serving, "/v1/completions", asked | {"prompt": messages[-1]["content"]}):
            yield piece

    async def _pieces(self, serving: Serving, path: str, asked: Any) -> AsyncIterator[dict[str, Any]]:
        ended, tokens, begun = "", 0, time.perf_counter()
        async for line in self._asked(serving, "POST", path, asked):
            if not line.startswith(b"data: ") or line == b"data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise NotServed(_message(chunk))
            if usage := chunk.get("usage"):
                tokens = usage.get("completion_tokens", 0)
            for choice in chunk.get("choices", ()):
                delta = choice.get("delta") or choice
                if text := delta.get("content") or delta.get("text"):
                    yield {"text": text}
                if thought := delta.get("reasoning_content"):
                    yield {"thought": thought}
                ended = choice.get("finish_reason") or ended
        yield {"end": ended, "tokens": tokens, "seconds": time.perf_counter() - begun}

    async def _asked(self, serving: Serving, method: str, path: str, body: Any = None) -> AsyncGenerator[bytes, None]:
        """The lines of a reply, as they come.

        As HTTP/1.0, in which a reply has no chunks, and ends with its connection.

        Raises:
            NotServed: the server does not answer, or refuses; with what it says.
        """
        key = (self._folder / _KEY).read_text(encoding="ascii").strip()
        data = b"" if body is None else json.dumps(body).encode()
        head = [f"{method} {path} HTTP/1.0", f"host: 127.0.0.1:{serving.port}", f"authorization: Bearer {key}"]
        head += ["content-type: application/json", f"content-length: {len(data)}", "connection: close"]
        try:
            reader, writer = await asyncio.open_connection("127.0.0.1", serving.port, limit=_LINE)
        except OSError as error:
            raise NotServed("The server does not answer.") from error
        try:
            writer.write("\r\n".join([*head, "", ""]).encode() + data)
            status = (await reader.readline()).split()
            while (await reader.readline()).strip():
                pass
            if status[1:2] != [b"200"]:
                raise NotServed(_message(_parsed(await reader.read(_LINE))))
            while line := await reader.readline():
                yield line.strip()
        except (OSError, ValueError) as error:  # ValueError: a line without an end
            raise NotServed("The server broke off.") from error
        finally:
            writer.close()


def _checked(typed: Mapping[str, Any]) -> tuple[str, list[Source]]:
    """The model and the adapters that were typed."""
    problems: dict[str, str] = {}
    given = typed.get("adapters")
    adapters: list[Source] = []
    for at, text in enumerate(given if isinstance(given, list) else []):
        if not str(text).strip():
            continue
        try:
            found = source_of(str(text))
            if not found.is_adapter:
                raise UsageError(f"{found.name} is a model; expected an adapter, or name it as the model")
            adapters.append(found)
        except UsageError as error:
            problems[f"adapter-{at}"] = str(error)
    if len(adapters) >= _MOST_COLUMNS:
        problems["model"] = f"{len(adapters)} adapters; expected at most {_MOST_COLUMNS - 1}"
    model = str(typed.get("model") or "").strip()
    try:
        if model:
            found = source_of(model)
            model = found.name
            if found.is_adapter:  # it says which model, and is one of the columns
                model, adapters = found.base or "", [found, *adapters]
        elif not problems:
            model = next((each.base for each in adapters if each.base), "")
        if not model and not problems:
            raise UsageError("is empty; expected a model, a run, or an adapter")
    except UsageError as error:
        problems["model"] = str(error)
    if problems:
        raise Mistyped(problems)
    return model, [each for at, each in enumerate(adapters) if each not in adapters[:at]]


def _names(adapters: Sequence[Source]) -> list[str]:
    """Names for requests: those of the folders, each another one."""
    names: list[str] = []
    for each in adapters:
        stem = re.sub(r"[^\w.-]+", "-", Path(each.name).name).strip("-.") or "adapter"
        name, count = stem, 1
        while name in (_BASE, *names):
            count += 1
            name = f"{stem}-{count}"
        names.append(name)
    return names


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        return {}


def _message(answer: Any) -> str:
    found = answer.get("error") if isinstance(answer, dict) else None
    found = found.get("message") if isinstance(found, dict) else found
    return found if isinstance(found, str) and found else "The server refused without a reason."
