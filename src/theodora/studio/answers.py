"""Before and after: `theodora evaluate` on rows with and without an adapter; the rows come into the work's folder."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from theodora.errors import UsageError
from theodora.files.run_files import HELD_OUT_FILE
from theodora.studio.bodies import Mistyped
from theodora.studio.metrics import log_text, read, tail
from theodora.studio.sources import source_of
from theodora.studio.works import LOG, Work, Works

_ROWS = "rows.jsonl"
_PROGRESS = re.compile(r"^(?:base|model): ([a-z ]+) (\d{1,12})/(\d{1,12})$", re.MULTILINE)
_MOST_ROWS = 5000
_KEPT = 50  # comparisons


@dataclass
class Comparison(Work):
    """What was asked."""

    model: str
    """A run, an adapter, or a model."""
    base: str
    """The model to compare with; empty: the adapter switched off."""
    data: str
    limit: int = 200
    max_new_tokens: int = 64
    answers: bool = True
    """Whether answers are written; losses alone are quicker."""

    def has_result(self, folder: Path) -> bool:
        """Whether its rows are there."""
        return (folder / _ROWS).is_file()

    def at_work(self, folder: Path) -> bool:
        """Whether rows are still to come: a process that has written them needs a moment more to end."""
        return not self.has_result(folder) and super().at_work(folder)


class Answers:
    """All comparisons that are kept.

    Args:
        folder: for them.
    """

    def __init__(self, folder: Path) -> None:
        self.works = Works(folder, Comparison, _KEPT, "comparison")

    def start(self, typed: Mapping[str, Any]) -> str:
        """Begin a comparison; its id.

        Raises:
            Mistyped: naming every field that makes no sense.
            UsageError: another one is at work.
        """
        asked = _checked(typed)
        if any(each.at_work(folder) for folder, each in self.works):
            raise UsageError("Another comparison is at work. Stop it, or wait for its end.")
        folder = self.works.place()
        asked.words = [*_words(asked), "--rows", str(folder / _ROWS)]
        self.works.begin(folder, asked)
        return folder.name

    def one(self, id: str) -> dict[str, Any]:
        """How one stands, how far it has come while it is at work, its rows, and what its process says.

        Raises:
            NotKnown: there is none of that id.
        """
        folder, asked = self.works.of(id)
        state = self.works.state(folder, asked)
        return {
            "state": state,
            "progress": _progress(folder, asked) if state["state"] == "running" else None,
            "rows": list(_rows(folder)),
            "log": log_text(folder / LOG),
        }


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


def _progress(folder: Path, asked: Comparison) -> dict[str, Any]:
    """The share that is done, 0 to 1, as the passes through the rows tell it, and what is being done."""
    said = _PROGRESS.findall(tail(folder / LOG, 8192).decode("utf-8", errors="replace"))
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
