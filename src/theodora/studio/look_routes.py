"""The routes of the screen Look: before and after, and chats."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import StreamingResponse
from starlette.concurrency import run_in_threadpool

from theodora.errors import UsageError
from theodora.studio.answers import Answers
from theodora.studio.bodies import body_of, mapping
from theodora.studio.chats import Chats

_ROLES = ("system", "user", "assistant")


def look_routes(answers: Answers, chats: Chats) -> APIRouter:
    """The routes.

    Args:
        answers: comparisons on rows.
        chats: the server that chats are held with.
    """
    routes = APIRouter(prefix="/api/look")

    @routes.get("/answers")
    def listed() -> Any:
        return {"comparisons": answers.states()}

    @routes.post("/answers")
    async def start(request: Request) -> Any:
        return {"id": await run_in_threadpool(answers.start, await body_of(request))}

    @routes.get("/answers/{id}")
    def one(id: str) -> Any:
        return answers.one(id)

    @routes.post("/answers/{id}/stop")
    def stop(id: str) -> Any:
        answers.stop(id)
        return {}

    @routes.post("/answers/{id}/forget")
    def forget(id: str) -> Any:
        answers.forget(id)
        return {}

    @routes.get("/chat")
    async def chat() -> Any:
        return await chats.state()

    @routes.post("/chat")
    async def load(request: Request) -> Any:
        await run_in_threadpool(chats.start, await body_of(request))
        return {}

    @routes.post("/chat/stop")
    async def unload() -> Any:
        await run_in_threadpool(chats.stop)
        return {}

    @routes.post("/chat/say")
    async def say(request: Request) -> Any:
        asked = await body_of(request)
        pieces = await chats.say(_columns(asked.get("columns")), _settings(asked))
        return StreamingResponse(pieces, media_type="application/x-ndjson")

    return routes


def _columns(given: Any) -> list[dict[str, Any]]:
    """Of each column its name, and the conversation so far."""
    columns = [mapping(each) for each in given] if isinstance(given, list) else []
    found: list[dict[str, Any]] = []
    for column in columns:
        name, messages = column.get("name"), column.get("messages")
        turns = [mapping(each) for each in messages] if isinstance(messages, list) else []
        told = [{"role": turn.get("role"), "content": turn.get("content")} for turn in turns]
        right = all(turn["role"] in _ROLES and isinstance(turn["content"], str) for turn in told)
        if not isinstance(name, str) or not told or not right:
            raise UsageError("Expected columns, each with a name and messages (role, content).")
        found.append({"name": name, "messages": told})
    if not found:
        raise UsageError("Expected at least one column.")
    return found


def _settings(asked: dict[str, Any]) -> dict[str, Any]:
    """What the server checks by itself, by the names that it knows."""
    return {name: asked[name] for name in ("temperature", "max_tokens", "seed") if asked.get(name) is not None}
