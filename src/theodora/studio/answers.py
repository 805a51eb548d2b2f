"""Before and after: `theodora evaluate` on rows with and without an adapter, in processes that outlive the studio.

Each comparison has a folder in the studio's own: what was asked, what the process says, and its rows.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shlex
import shutil
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from theodora.errors import TheodoraError, UsageError
from theodora.files.atomic import atomic_write
from theodora.files.run_files import HELD_OUT_FILE
from theodora.safe_text import plain_lines
from theodora.studio.bodies import Mistyped
from theodora.studio.metrics import read, tail
from theodora.studio.processes import ask_to_end, begin, is_alive
from theodora.studio.sources import source_of

_ASKED, _LOG, _ROWS = "asked.json", "log", "rows.jsonl"
_PROGRESS = re.compile(r"^(?:base|model): ([a-z ]+) (\d{1,12})/(\d{1,12})$", re.MULTILINE)
_MOST_ROWS = 5000
_KEPT = 50  # comparisons; older ones go


class NoSuchComparison(TheodoraError):
    """None of that name is known."""


@dataclass
class Comparison:
    """What was asked, and who is at it."""

    model: str
    """A run, an adapter, or a model."""
    base: str
    """The model to compare with; empty: the adapter switched off."""
    data: str
    limit: int = 200
    max_new_tokens: int = 64
    answers: bool = True
    """Whether answers are written; losses alone are quicker."""
    words: list[str] = field(default_factory=list[str])
    """Of the command."""
    at: float = 0.0
    """Seconds since the epoch."""
    pid: int = 0
    started: str = ""
    told_to_stop: bool = False


class Answers:
    """All comparisons that are kept.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def start(self, typed: Mapping[str, Any]) -> str:
        """Begin a comparison; its id.

        Raises:
            Mistyped: naming every field that makes no sense.
            UsageError: another one is at work.
        """
        asked = _checked(typed)
        if any(_at_work(folder, each) for folder, each in self._all()):
            raise UsageError("Another comparison is at work. Stop it, or wait for its end.")
        id = f"{time.time_ns():x}-{secrets.token_hex(4)}"
        folder = self._folder / id
        folder.mkdir(parents=True)
        asked.words = [*_words(asked), "--rows", str(folder / _ROWS)]
        asked.pid, asked.started = begin(asked.words, folder / _LOG, os.getcwd())
        asked.at = time.time()
        _keep(folder, asked)
        for old, _ in [*self._all()][_KEPT:]:
            shutil.rmtree(old, ignore_errors=True)
        return id

    def states(self) -> list[dict[str, Any]]:
        """How all of them stand, the newest first."""
        return [_state(folder, asked) for folder, asked in self._all()]

    def one(self, id: str) -> dict[str, Any]:
        """How one stands (its command, too), its rows, and what its process says.

        Raises:
            NoSuchComparison: there is none of that id.
        """
        folder, asked = self._of(id)
        return {
            "state": _state(folder, asked),
            "rows": list(_rows(folder)),
            "log": plain_lines(tail(folder / _LOG).decode("utf-8", errors="replace").replace("\r\n", "\n")),
        }

    def stop(self, id: str) -> None:
        """End a comparison that is at work; what it found is lost."""
        folder, asked = self._of(id)
        asked.told_to_stop = True
        _keep(folder, asked)
        if not ask_to_end(asked.pid, asked.started):
            raise UsageError("It has ended already.")

    def forget(self, id: str) -> None:
        """Delete a comparison that has ended."""
        folder, asked = self._of(id)
        if _at_work(folder, asked):
            raise UsageError("It is at work. Stop it first.")
        shutil.rmtree(folder)

    def _of(self, id: str) -> tuple[Path, Comparison]:
        for folder, asked in self._all():
            if folder.name == id:
                return folder, asked
        raise NoSuchComparison("There is no such comparison here.")

    def _all(self) -> Iterator[tuple[Path, Comparison]]:
        try:
            names = sorted(os.listdir(self._folder), reverse=True)
        except OSError:
            return
        for name in names:
            if (asked := _asked(self._folder / name)) is not None:
                yield self._folder / name, asked


def _checked(typed: Mapping[str, Any]) -> Comparison:
    """What was typed, as it is asked for."""
    problems: dict[str, str] = {}
    text = {name: str(typed.get(name) or "").strip() for name in ("model", "base", "data")}
    whole = {
        "limit": _number(typed.get("limit"), 200, _MOST_ROWS),
        "max_new_tokens": _number(typed.get("max_new_tokens"), 64, 1 << 20),
    }
    for name, most in (("limit", _MOST_ROWS), ("max_new_tokens", 1 << 20)):
        if whole[name] is None:
            problems[name] = f"expected a whole number from 1 to {most:,}"
    for name in ("model", "base"):
        if name == "base" and not text["base"]:
            continue
        try:
            found = source_of(text[name])
        except UsageError as error:
            problems[name] = str(error)
            continue
        text[name] = found.name
        if name == "base" and found.is_adapter:
            problems["base"] = f"{found.name} is an adapter; expected a model"
        elif name == "model" and not found.is_adapter and not text["base"]:
            problems["base"] = "is empty; a model without an adapter has nothing to switch off: name what it was before"
    if not text["data"]:
        held_out = Path(text["model"]) / HELD_OUT_FILE
        text["data"] = str(held_out) if held_out.is_file() else ""
    if not text["data"]:
        problems["data"] = f"is empty, and no run's {HELD_OUT_FILE} is there; expected a file, a folder, or a hub name"
    elif text["data"].startswith("-"):
        problems["data"] = f"{text['data']} would be taken for a flag; expected ./ before it"
    if problems:
        raise Mistyped(problems)
    asked = Comparison(text["model"], text["base"], text["data"], answers=typed.get("answers") is not False)
    return replace(asked, **{name: number for name, number in whole.items() if number})


def _number(given: Any, default: int, most: int) -> int | None:
    """The number that was typed, or None."""
    text = str(given if given is not None else "").strip()
    if not text:
        return default
    return int(text) if re.fullmatch(r"\d{1,9}", text) and 0 < int(text) <= most else None


def _words(asked: Comparison) -> list[str]:
    base = ["--base", asked.base] if asked.base else ["--base"]
    more = ["--max-new-tokens", str(asked.max_new_tokens)] if asked.answers else ["--no-exact-match"]
    return ["evaluate", "--model", asked.model, *base, "--data", asked.data, "--limit", str(asked.limit), *more]


def _state(folder: Path, asked: Comparison) -> dict[str, Any]:
    there, alive = (folder / _ROWS).is_file(), _at_work(folder, asked)
    word = "finished" if there else "running" if alive else "stopped" if asked.told_to_stop else "failed"
    found = {name: value for name, value in asdict(asked).items() if name not in ("words", "pid", "started")}
    progress = _progress(folder, asked) if alive else None
    return found | {"id": folder.name, "state": word, "progress": progress, "command": _command(asked)}


def _command(asked: Comparison) -> str:
    return shlex.join(["theodora", *asked.words])


def _at_work(folder: Path, asked: Comparison) -> bool:
    """Whether rows are still to come: a process that has written them needs a moment more to end."""
    return not (folder / _ROWS).is_file() and is_alive(asked.pid, asked.started)


def _progress(folder: Path, asked: Comparison) -> dict[str, Any]:
    """The share that is done, 0 to 1, as the passes through the rows tell it, and what is being done."""
    said = _PROGRESS.findall(tail(folder / _LOG, 8192).decode("utf-8", errors="replace"))
    passes = 4 if asked.answers else 2
    ended = sum(done == of for _, done, of in said)
    if not said:
        return {"share": 0.0, "what": "loading"}
    what, done, of = said[-1]
    begun = 0.0 if done == of else int(done) / max(int(of), 1)
    return {"share": min(1.0, (ended + begun) / passes), "what": what}


def _rows(folder: Path) -> Iterator[dict[str, Any]]:
    for line in read(folder / _ROWS, 256 << 20).splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _keep(folder: Path, asked: Comparison) -> None:
    with atomic_write(folder / _ASKED) as file:
        file.write_text(json.dumps(asdict(asked), indent=1), encoding="utf-8")


def _asked(folder: Path) -> Comparison | None:
    """What the file says; None where it is none of ours."""
    try:
        given = json.loads((folder / _ASKED).read_bytes())
        found = Comparison(**given)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    plain = Comparison("", "", "")
    right = all(type(value) is type(getattr(plain, name)) for name, value in vars(found).items())
    return found if right else None
