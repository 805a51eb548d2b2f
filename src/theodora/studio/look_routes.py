"""The routes of the screen Look."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import Response, StreamingResponse
from starlette.concurrency import run_in_threadpool

from theodora.errors import UsageError
from theodora.studio.answers import Answers
from theodora.studio.bodies import body_of, mapping
from theodora.studio.chats import Chats
from theodora.studio.jobs import Jobs
from theodora.studio.reports import Reports
from theodora.studio.works import Works

_ROLES = ("system", "user", "assistant")


def look_routes(answers: Answers, chats: Chats, jobs: Jobs, reports: Reports) -> APIRouter:
    """The routes.

    Args:
        answers: comparisons on rows.
        chats: the server that chats are held with.
        jobs: commands with a result.
        reports: of comparisons of methods.
    """
    routes = APIRouter(prefix="/api/look")

    @routes.post("/answers")
    async def start(request: Request) -> Any:
        return {"id": await run_in_threadpool(answers.start, await body_of(request))}

    @routes.get("/answers/{id}")
    def one(id: str) -> Any:
        return answers.one(id)

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

    _of_jobs(routes, jobs)
    _of_works(routes, "/answers", answers.works)
    _of_works(routes, "/jobs", jobs.works)

    @routes.get("/reports")
    def known_reports() -> Any:
        return {"reports": reports.found()}

    @routes.get("/reports/{id}")
    def report(id: str) -> Any:
        return reports.one(id)

    @routes.get("/reports/{id}/figure/{number}")
    def figure_of_report(id: str, number: int) -> Response:
        return _picture(reports.figure(id, number), "image/svg+xml")

    return routes


def _of_jobs(routes: APIRouter, jobs: Jobs) -> None:
    @routes.post("/jobs")
    async def begin(request: Request) -> Any:
        asked = await body_of(request)
        return {"id": await run_in_threadpool(jobs.start, str(asked.pop("kind", "")), asked)}

    @routes.get("/jobs/{id}")
    def job(id: str) -> Any:
        return jobs.one(id)

    @routes.get("/jobs/{id}/figure/{name}")
    def figure_of_job(id: str, name: str) -> Response:
        return _picture(jobs.figure(id, name), "image/png")


def _of_works(routes: APIRouter, prefix: str, works: Works[Any]) -> None:
    @routes.get(prefix)
    def listed() -> Any:
        return {"works": works.states()}

    @routes.post(f"{prefix}/{{id}}/stop")
    def stop(id: str) -> Any:
        works.stop(id)
        return {}

    @routes.post(f"{prefix}/{{id}}/forget")
    def forget(id: str) -> Any:
        works.forget(id)
        return {}


def _picture(data: bytes, kind: str) -> Response:
    """An image for an `img`; opened by itself it is a download, and no page of this studio."""
    if not data:
        raise HTTPException(404)
    return Response(data, media_type=kind, headers={"content-disposition": "attachment"})


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
