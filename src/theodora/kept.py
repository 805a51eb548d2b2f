"""What was found out once and holds until something that it depends on changes, kept in the user's folder for caches.

A second start then need not find it out again. What cannot be read, or was found under other conditions, is found anew,
and what cannot be written is not kept: nothing ever fails for want of this.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

_MOST = 64  # answers to one question


def cache_folder() -> Path:
    """Where Theodora keeps what can be made or fetched again: THEODORA_CACHE, or the platform's place for caches."""
    if chosen := os.environ.get("THEODORA_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "theodora"


def kept(
    question: str, conditions: Any, find: Callable[[], Any], holds: Callable[[Any], bool], most: int | None = None
) -> Any:
    """The answer to a question that was asked under the same conditions before, or what `find` finds.

    Args:
        question: what the answers are to; the name of their file.
        conditions: everything that the answer depends on, as JSON takes it.
        find: finds the answer, as JSON takes it.
        holds: whether an answer is of the form that is expected, and worth keeping.
        most: answers to the question that are kept, under as many conditions; the oldest goes.
    """
    stamp = hashlib.sha256(json.dumps(conditions, sort_keys=True).encode()).hexdigest()
    try:
        file = cache_folder() / "kept" / f"{question}.json"
        answers = _read(file)
    except (OSError, RuntimeError):  # no home, or no folder that can be read
        return find()
    if stamp in answers and holds(answers[stamp]):
        return answers[stamp]
    answer = find()
    if holds(answer):
        answers.pop(stamp, None)
        _write(file, {**dict(list(answers.items())[1 - (most or _MOST) :]), stamp: answer})
    return answer


def _read(file: Path) -> dict[str, Any]:
    try:
        answers = json.loads(file.read_bytes())
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    return answers if isinstance(answers, dict) else {}


def _write(file: Path, answers: dict[str, Any]) -> None:
    """Write it aside and rename it, so that another process reads the old file or the new one."""
    with suppress(OSError):
        file.parent.mkdir(parents=True, exist_ok=True)
        number, aside = tempfile.mkstemp(dir=file.parent, prefix=f".{file.name}.")
        try:
            with os.fdopen(number, "w", encoding="utf-8") as written:
                json.dump(answers, written)
            Path(aside).replace(file)
        except BaseException:
            Path(aside).unlink(missing_ok=True)
            raise
