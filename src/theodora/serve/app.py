"""The HTTP server: OpenAI's routes on an engine."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException

from theodora import __version__
from theodora.errors import CheckpointError, ConfigError, TheodoraError
from theodora.serve.adapters import ServedAdapter
from theodora.serve.answers import Answers, Piece
from theodora.serve.api_keys import read_keys
from theodora.serve.bodies import body_of
from theodora.serve.daemon_threads import DaemonThreads
from theodora.serve.engine import Engine
from theodora.serve.errors import Busy, ErrorReply, Unavailable, UnknownModel, error_reply
from theodora.serve.guards import LOOPBACK, Guards, inside
from theodora.serve.intake import Intake
from theodora.serve.metrics import Metrics
from theodora.serve.misses import cut
from theodora.serve.protocol import ChatRequest, Common, CompletionRequest, LoadRequest, UnloadRequest
from theodora.serve.replies import Replies, event
from theodora.serve.response_events import ResponseReplies
from theodora.serve.responses import ResponsesRequest, chat_of
from theodora.serve.stamp import Changed
from theodora.serve.tokens import token_routes
from theodora.serve.watch import OutputNotFinite

T = TypeVar("T")
_Replies = Replies | ResponseReplies
_GONE = 499  # nginx's number for a client that hung up; nobody reads it
_LONGEST_NOTE = 1000
_HEAVY = 1000  # log-probabilities from which on their tokens' texts are worth a thread

_Completion = Annotated[CompletionRequest, Depends(body_of(CompletionRequest))]
_Chat = Annotated[ChatRequest, Depends(body_of(ChatRequest))]
_Responses = Annotated[ResponsesRequest, Depends(body_of(ResponsesRequest))]
_Load = Annotated[LoadRequest, Depends(body_of(LoadRequest))]
_Unload = Annotated[UnloadRequest, Depends(body_of(UnloadRequest))]


def create_app(engine: Engine, tokenizer: Any) -> FastAPI:
    """The application; it starts and stops the engine."""
    config = engine.config

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        engine.start()
        try:
            yield
        finally:
            await DaemonThreads(1)(engine.stop)

    app = FastAPI(title="theodora", lifespan=lifespan, openapi_url=None)
    hosts = frozenset((*LOOPBACK, "testserver")) if config.host in LOOPBACK else None
    keys = read_keys(config.api_key_file)
    app.add_middleware(Guards, keys=keys, max_body=config.max_body, hosts=hosts, patience=config.client_timeout)
    intake, metrics = Intake(engine, tokenizer), Metrics(engine)
    app.state.engine, app.state.metrics = engine, metrics
    app.state.reading, loading = DaemonThreads(2), DaemonThreads(2)
    _add_errors(app)

    app.include_router(token_routes(intake))

    @app.get("/ping")  # as SageMaker asks
    @app.post("/ping")
    @app.get("/health")
    async def health() -> Response:
        ready = engine.ready()
        return JSONResponse({"status": "ok" if ready else "unavailable"}, 200 if ready else 503)

    @app.get("/version")
    async def version() -> dict[str, str]:
        return {"version": __version__}

    @app.get("/metrics")
    async def show_metrics() -> Response:
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": _models(engine)}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        entry = next((entry for entry in _models(engine) if entry["id"] == name), None)
        if entry is None:
            raise UnknownModel(f"There is no model {name!r}.")
        return entry

    @app.post("/v1/completions")
    async def completions(asked: _Completion, request: Request) -> Response:
        return await _serve(asked, request, intake, metrics, "completions")

    @app.post("/v1/chat/completions")
    async def chat(asked: _Chat, request: Request) -> Response:
        return await _serve(asked, request, intake, metrics, "chat")

    @app.post("/v1/responses")
    async def responses(asked: _Responses, request: Request) -> Response:
        return await _serve(
            await app.state.reading(chat_of, asked), request, intake, metrics, "responses", ResponseReplies(asked)
        )

    @app.post("/v1/load_lora_adapter")
    async def load(asked: _Load) -> dict[str, Any]:
        folder = _allowed(engine)

        def read() -> ServedAdapter:
            return engine.load(asked.lora_name, inside(folder, asked.lora_path), asked.load_inplace)

        adapter = await _within(config.timeout, loading(read))
        return {"status": "ok", "id": adapter.name, "method": adapter.method, "seconds": round(adapter.seconds, 4)}

    @app.post("/v1/unload_lora_adapter")
    async def unload(asked: _Unload) -> dict[str, Any]:
        _allowed(engine)
        if not engine.unload(asked.lora_name):
            raise UnknownModel(f"There is no adapter {asked.lora_name!r}.")
        return {"status": "ok", "id": asked.lora_name}

    return app


class _Forbidden(TheodoraError):
    """Not allowed on this server."""


class _Late(TheodoraError):
    """It took too long."""


_STATUS: dict[type[Exception], tuple[int, str]] = {
    UnknownModel: (404, "not_found_error"),
    Busy: (429, "rate_limit_error"),
    Unavailable: (503, "unavailable_error"),
    _Late: (504, "timeout_error"),
    _Forbidden: (403, "permission_error"),
    OutputNotFinite: (500, "server_error"),
    Changed: (409, "conflict_error"),  # before what it is a kind of
    ConfigError: (400, "invalid_request_error"),
    CheckpointError: (400, "invalid_request_error"),
}
# OpenAI's client tries again after 409 and 500, too, unless it is told.
_NEVER = {"x-should-retry": "false"}
_RETRY = {429: {"retry-after": "1"}, 503: {"retry-after": "1"}, 409: _NEVER, 500: _NEVER}


def _add_errors(app: FastAPI) -> None:
    async def tell(request: Request, error: Exception) -> Response:
        if isinstance(error, HTTPException) and error.status_code in (404, 405):
            error = HTTPException(error.status_code, f"There is no {request.method} {request.url.path} here.")
        return _reply(error)

    for kind in _STATUS:
        app.add_exception_handler(kind, tell)
    app.add_exception_handler(HTTPException, tell)
    app.add_exception_handler(Exception, tell)


def _reply(error: Exception) -> Response:
    if isinstance(error, HTTPException):  # no such page
        return _response(error_reply(error.status_code, str(error.detail), "invalid_request_error"))
    for kind, (status, name) in _STATUS.items():
        if isinstance(error, kind):
            return _response(error_reply(status, str(error), name, **_RETRY.get(status, {})))
    return _response(error_reply(500, "The server failed on this request.", "server_error"))


def _response(reply: ErrorReply) -> Response:
    return Response(reply.body, reply.status, reply.headers)


async def _serve(
    asked: Common,
    request: Request,
    intake: Intake,
    metrics: Metrics,
    endpoint: str,
    replies: ResponseReplies | None = None,
) -> Response:
    known = asked.model if intake.knows(asked.model) else "unknown"
    loop = asyncio.get_running_loop()
    timeout = intake.engine.config.timeout
    deadline = loop.time() + timeout

    def count(status: int) -> None:
        metrics.requests.labels(endpoint, known, status).inc()

    try:
        take = intake.chat if isinstance(asked, ChatRequest) else intake.completion
        answers = await _within(timeout, take(asked, loop))  # pyright: ignore[reportArgumentType]
    except TheodoraError as error:
        reply = _reply(error)
        count(reply.status_code)
        return reply

    def end(status: int) -> None:
        answers.close()
        count(status)
        metrics.prompt_tokens.labels(known).inc(answers.prompt_tokens)
        metrics.generated_tokens.labels(known).inc(answers.generated_tokens)
        metrics.duration.observe(answers.seconds)
        if answers.first_token is not None:
            metrics.first_token.observe(answers.first_token)

    teller = replies or Replies(asked, intake.tokenizer)
    if asked.stream:
        chunks = _stream(asked, answers, teller, deadline, end)
        return StreamingResponse(chunks, media_type="text/event-stream", headers=_notes(answers))
    return await _whole(request, answers, teller, deadline, end)


def _notes(answers: Answers) -> dict[str, str]:
    """A header that says what of a request had no effect."""
    notes = cut("; ".join(answers.notes), _LONGEST_NOTE).encode("ascii", "replace").decode()
    return {"x-theodora-note": re.sub(r"[^ -~]", " ", notes)} if notes else {}


async def _within(seconds: float, work: Awaitable[T]) -> T:
    """What the work gives.

    Raises:
        _Late: it gives nothing in so many seconds.
    """
    try:
        async with asyncio.timeout(max(0.0, seconds)):
            return await work
    except TimeoutError as error:
        raise _late(seconds) from error


async def _whole(request: Request, answers: Answers, replies: _Replies, deadline: float, end: Any) -> Response:
    status = _GONE
    loop = asyncio.get_running_loop()
    reading = asyncio.ensure_future(_read(answers, replies))
    gone = asyncio.ensure_future(_hung_up(request))
    try:
        left = max(0.0, deadline - loop.time())
        await asyncio.wait((reading, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if reading.done():
            reply = Response(reading.result(), media_type="application/json", headers=_notes(answers))
        elif gone.done():
            reply = Response(status_code=_GONE)
        else:
            raise _late(answers.engine.config.timeout)
        status = reply.status_code
        return reply
    except TheodoraError as error:
        reply = _reply(error)
        status = reply.status_code
        return reply
    finally:
        for task in (reading, gone):
            task.cancel()
            with suppress(asyncio.CancelledError, TheodoraError):
                await task
        end(status)


def _late(seconds: float) -> _Late:
    return _Late(f"The answer took more than {seconds:g} s.")


async def _read(answers: Answers, replies: _Replies) -> bytes:
    async for _ in answers.pieces():
        pass

    def write() -> bytes:
        return bytes(JSONResponse(replies.whole(answers)).body)

    # Thousands of tokens by name would hold up everybody else's answers.
    return await answers.threads(write) if answers.scores > _HEAVY else write()


async def _hung_up(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(
    asked: Common, answers: Answers, replies: _Replies, deadline: float, end: Any
) -> AsyncIterator[bytes]:
    status = _GONE
    loop = asyncio.get_running_loop()
    closing = loop.call_at(deadline, answers.close)  # also while a client does not take what it is sent
    try:
        for chunk in replies.opening(answers):
            yield event(chunk)
        arriving = answers.pieces()
        while (pieces := await _next(arriving, deadline, answers)) is not None:
            heavy = answers.scores > _HEAVY and any(piece.opens for piece in pieces)  # the prompt's
            chunks = replies.chunks(pieces, answers)
            for chunk in await answers.threads(list, chunks) if heavy else chunks:
                yield event(chunk)
        status = 200
        if isinstance(replies, Replies):
            if asked.stream_options and asked.stream_options.include_usage:
                yield event(replies.last(answers))
            yield event("[DONE]")
    except TheodoraError as error:
        # The status has been sent; the error stands in the stream, where clients look for it.
        reply = _reply(error)
        status = reply.status_code
        yield event(bytes(reply.body).decode())
    finally:
        closing.cancel()
        end(status)


async def _next(arriving: AsyncIterator[list[Piece]], deadline: float, answers: Answers) -> list[Piece] | None:
    """The next pieces of a stream; None where it has ended. (A limit around a stream's `yield` would end its task.)"""
    left = deadline - asyncio.get_running_loop().time()
    try:
        if left > 0:
            async with asyncio.timeout(left):
                return await anext(arriving, None)
    except TimeoutError:
        pass
    raise _late(answers.engine.config.timeout)


def _models(engine: Engine) -> list[dict[str, Any]]:
    config = engine.config
    # Where things lie on this machine is nobody's affair, unless it is the name that they are asked for by.
    root = config.model if config.served_name is None or not Path(config.model).is_dir() else Path(config.model).name
    entry = {"object": "model", "owned_by": "theodora", "max_model_len": engine.window}
    return [
        {"id": config.name, "created": engine.created, **entry, "parent": None, "root": root},
        *(
            {"id": adapter.name, "created": adapter.created, **entry, "parent": config.name, "root": adapter.path.name}
            for adapter in engine.adapters.adapters()
        ),
    ]


def _allowed(engine: Engine) -> str:
    folder = engine.config.adapter_folder
    if folder is None:
        raise _Forbidden("Adapters cannot be loaded at run time; start the server with --adapter-folder FOLDER.")
    return folder
