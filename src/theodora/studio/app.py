"""The routes. Whatever is long is asked of the worker or of a run's own process; whoever asks has passed the guard."""

from __future__ import annotations

import asyncio
import filecmp
import os
import re
import shlex
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import asdict
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.responses import JSONResponse, Response
from starlette.concurrency import run_in_threadpool

import theodora
from theodora.cli.merge import ONTO
from theodora.errors import TheodoraError, UsageError
from theodora.files.run_files import CARD_FILE, CHECKPOINTS, CONFIG_FILE, FIGURE_FILE, METRICS_FILE
from theodora.studio.answers import Answers
from theodora.studio.bodies import Mistyped, body_of, mapping
from theodora.studio.chats import Chats
from theodora.studio.form import check, form, typed_of
from theodora.studio.guard import Guard
from theodora.studio.jobs import COMBINATIONS, DTYPES, Jobs
from theodora.studio.known import NotKnown
from theodora.studio.look_routes import look_routes
from theodora.studio.metrics import log_text, paces, read, read_on, tail
from theodora.studio.reports import Reports
from theodora.studio.runs import LOG_FILE, RECIPE_FILE, Runs, asked_of, command_of, text_of
from theodora.studio.worker import Failed, Worker

_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript", "svg": "image/svg+xml"}
_SECONDS_BETWEEN_LOOKS = 1.0  # at whether the next run of the queue may begin
_DATA_FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz")


def create_app(runs: Runs, worker: Worker, folder: Path, *, token: str, port: int) -> Any:
    """The application.

    Args:
        runs: that are shown.
        worker: that looks at data and plans.
        folder: the studio's own, for dropped files, works of Look and the key of chats.
        token: that the browser has to bring.
        port: that the server listens on.
    """

    chats = Chats(folder / "chat")

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await run_in_threadpool(chats.end_leftover)

        async def look_after_queue() -> None:
            while True:
                with suppress(TheodoraError, OSError):  # told by the run's state
                    await run_in_threadpool(runs.go_on)
                await asyncio.sleep(_SECONDS_BETWEEN_LOOKS)

        task = asyncio.create_task(look_after_queue())
        yield
        task.cancel()
        worker.stop()
        await run_in_threadpool(chats.stop)

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(TheodoraError)
    def refused(_: Request, error: TheodoraError) -> Response:
        if isinstance(error, Mistyped):
            return JSONResponse({"problems": error.problems}, 400)
        status = 404 if isinstance(error, NotKnown) else 422 if isinstance(error, Failed) else 400
        return JSONResponse({"error": str(error)}, status)

    @app.get("/")
    def page() -> Response:
        return _static("index.html")

    @app.get("/static/{name}")
    def static(name: str) -> Response:
        return _static(name)

    @app.get("/api/studio")
    def about() -> dict[str, Any]:
        return {
            "version": theodora.__version__,
            "working": os.getcwd(),
            "home": os.path.expanduser("~"),
            "folders": runs.memory.known.folders,
            "uploads": str(folder / "data"),
            "form": form(),
            "make": {"method": COMBINATIONS, "onto": tuple(ONTO), "dtype": DTYPES},
        }

    @app.post("/api/wake")
    def wake() -> dict[str, Any]:
        worker.wake()
        return {}

    @app.post("/api/check")
    async def checked(request: Request) -> Any:
        return await run_in_threadpool(check, await body_of(request))

    @app.post("/api/plan")
    async def planned(request: Request) -> Any:
        options = check(await body_of(request))["options"]
        return await run_in_threadpool(worker.ask, "plan", options=options)

    @app.post("/api/data")
    async def data(request: Request) -> Any:
        asked = await body_of(request)
        path = str(asked.pop("path", "")).strip()
        if not path:
            raise UsageError("data is empty; expected a file, a folder, or a name on the hub.")
        known = ("model", "eval_data", "objective", "max_length", "train_on")
        given = {name: asked[name] for name in known if asked.get(name) not in (None, "")}
        return await run_in_threadpool(worker.ask, "data", path=path, **given)

    @app.post("/api/upload")
    async def upload(request: Request, name: str) -> Any:
        return {"path": str(await _keep(request, folder / "data", name))}

    @app.get("/api/runs")
    def listed() -> Any:
        return {"runs": [asdict(state) for state in runs.states()], "folders": runs.memory.known.folders}

    @app.post("/api/runs")
    async def start(request: Request) -> Any:
        asked = await body_of(request)
        found = await run_in_threadpool(check, mapping(asked.get("options")))
        if found["problems"]:
            return JSONResponse({"problems": found["problems"]}, 400)
        return {"id": await run_in_threadpool(runs.start, found["options"], at_once=asked.get("at_once") is True)}

    @app.get("/api/runs/{id}")
    def one(id: str, cursor: str = "") -> Any:
        run = runs.folder_of(id)
        lines = read_on(run / METRICS_FILE, cursor)
        return {
            "state": asdict(runs.state(run)),
            "lines": lines.lines,
            "cursor": lines.cursor,
            "anew": lines.anew,
            "more": lines.more,
            "paces": paces(tail(run / LOG_FILE, 1 << 20)),
        }

    @app.get("/api/runs/{id}/texts")
    def texts(id: str) -> Any:
        run = runs.folder_of(id)
        config = text_of(run, CONFIG_FILE) or text_of(run, RECIPE_FILE)
        return {
            "log": log_text(run / LOG_FILE),
            "card": text_of(run, CARD_FILE),
            "config": config,
            "typed": typed_of(asked_of(run)),
            "command": shlex.join(["theodora", *command_of(run)]),
            "checkpoints": _names(run / CHECKPOINTS),
            "figure": (run / FIGURE_FILE).is_file(),
        }

    @app.get("/api/runs/{id}/loss.png")
    def figure(id: str) -> Response:
        if not (found := read(runs.folder_of(id) / FIGURE_FILE)):
            raise HTTPException(404)
        return Response(found, media_type="image/png")

    @app.post("/api/runs/{id}/stop")
    def stop(id: str) -> Any:
        runs.stop(runs.folder_of(id))
        return {}

    @app.post("/api/runs/{id}/resume")
    def resume(id: str) -> Any:
        runs.resume(runs.folder_of(id))
        return {}

    @app.post("/api/folders")
    async def name_folder(request: Request) -> Any:
        return {"path": await run_in_threadpool(runs.add, str((await body_of(request)).get("path", "")))}

    @app.post("/api/folders/forget")
    async def forget_folder(request: Request) -> Any:
        await run_in_threadpool(runs.forget, str((await body_of(request)).get("path", "")))
        return {}

    reports = Reports(lambda: runs.memory.known.folders)
    app.include_router(look_routes(Answers(folder / "answers"), chats, Jobs(folder / "jobs"), reports))
    return Guard(app, token, port)


@cache
def _static(name: str) -> Response:
    """A file of the page. They are few, and all are named here: nothing else of the disk has an address."""
    found = {file.name: file for file in files("theodora.studio").joinpath("static").iterdir()}
    kind = _KINDS.get(name.rpartition(".")[2])
    if name not in found or kind is None:
        raise HTTPException(404)
    return Response(found[name].read_bytes(), media_type=kind)


def _names(folder: Path) -> list[str]:
    try:
        return sorted(
            (n for n in os.listdir(folder) if re.fullmatch(r"checkpoint-\d{1,12}", n)), key=lambda n: int(n[11:])
        )
    except OSError:
        return []


async def _keep(request: Request, folder: Path, name: str) -> Path:
    """Write a dropped file into the studio's folder, under its own name or one beside it; never over another.

    Raises:
        UsageError: it is no file of data, by its name.
    """
    plain = re.sub(r"[^\w.+-]", "_", name.replace("\\", "/").rpartition("/")[2]).lstrip(".")[-100:]
    if not plain.lower().endswith(_DATA_FILES):
        raise UsageError(f"{name[:100]} is no file of data; expected one of {', '.join(_DATA_FILES)}.")
    folder.mkdir(parents=True, exist_ok=True)
    number, aside = tempfile.mkstemp(dir=folder, prefix=".upload-")
    try:
        with os.fdopen(number, "wb") as file:
            async for part in request.stream():
                file.write(part)
        stem, dot, suffix = plain.partition(".")
        for count in range(1, 10_000):
            path = folder / (plain if count == 1 else f"{stem}-{count}{dot}{suffix}")
            try:
                os.link(aside, path)  # unlike a renaming, it takes no name that is taken
            except FileExistsError:
                if filecmp.cmp(path, aside, shallow=False):  # dropped again
                    return path
                continue
            return path
        raise UsageError(f"There are too many files called {plain} in {folder}.")
    finally:
        Path(aside).unlink(missing_ok=True)
