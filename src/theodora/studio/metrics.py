"""What a run has written so far, read on from where the last look ended."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import CheckpointError
from theodora.files.folder import OpenFile, Place
from theodora.parse import finite_values
from theodora.safe_text import plain_lines

_MOST_READ = 4 << 20  # bytes at a time; the page asks again while there are more
_LOG_TAIL = 32_000
_STEP = re.compile(rb"^step (\d+)/(\d+)  (.*)$", re.MULTILINE)
_SIZES = {"MB": 1e6, "GB": 1e9}


@dataclass(frozen=True)
class Lines:
    """Lines of metrics.jsonl that came since."""

    lines: list[dict[str, Any]]
    cursor: str
    """To go on from."""
    anew: bool
    """Whether they are the first ones, also of a file that was written anew: a resumed run cuts its own back."""
    more: bool
    """Whether there are others by now."""


def opened(path: Path) -> OpenFile | None:
    """A file of a run, out of whose folder no link leads; None if it is not there, or cannot be read."""
    within = path.parent if os.open in os.supports_dir_fd else None  # not on Windows
    try:
        with Place(path.parent, within=within).open() as folder:
            return folder.open(path.name)
    except (OSError, CheckpointError):
        return None


def read_on(path: Path, cursor: str = "") -> Lines:
    """Read whole lines of a metrics file from a cursor on.

    Args:
        path: of the file, which may not be there yet.
        cursor: of the last look; empty for the first.
    """
    file = opened(path)
    if file is None:
        return Lines([], "", anew=cursor != "", more=False)
    with file:
        name, _, place = cursor.partition(":")
        at = int(place) if place.isdigit() and len(place) < 18 else 0
        anew = name != str(file.seen.inode) or at > file.size or not at
        at = 0 if anew else at
        size = min(file.size - at, _MOST_READ)
        data = bytearray(size)
        try:
            file.fill(memoryview(data), at)
        except CheckpointError:  # it is being written anew: the next look begins with it
            return Lines([], "", anew=False, more=False)
        whole = data.rfind(b"\n") + 1  # the last line may be half written
        if not whole and size == _MOST_READ:
            whole = size  # no line of ours is that long
        return Lines(parsed(data[:whole]), f"{file.seen.inode}:{at + whole}", anew, more=size == _MOST_READ)


def parsed(text: bytes | bytearray) -> list[dict[str, Any]]:
    """The figures of each line that has a step; others are left out."""
    return [line for each in text.splitlines() if (line := _line(each)) is not None]


def _line(text: bytes | bytearray) -> dict[str, Any] | None:
    """A line as figures alone, whatever else somebody wrote there."""
    try:
        line = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return None
    numbers = {str(key)[:100]: value for key, value in line.items() if type(value) in (int, float)}
    return finite_values(numbers)


def tail(path: Path, most: int = _LOG_TAIL) -> bytes:
    """The end of a log, from the beginning of a line on; empty where there is none."""
    file = opened(path)
    if file is None:
        return b""
    with file:
        at = max(0, file.size - most)
        data = bytearray(file.size - at)
        try:
            file.fill(memoryview(data), at)
        except CheckpointError:  # it is being written anew
            return b""
    return bytes(data[data.find(b"\n") + 1 if at else 0 :])


def log_text(path: Path) -> str:
    """The end of a log, fit to be shown; empty where there is none."""
    return plain_lines(tail(path).decode("utf-8", errors="replace").replace("\r\n", "\n"))


def read(path: Path, most: int = 32 << 20) -> bytes:
    """All of a file; empty where there is none, or a larger one."""
    file = opened(path)
    if file is None:
        return b""
    with file:
        try:
            return file.read(most)
        except CheckpointError:
            return b""


def paces(log: bytes) -> list[dict[str, Any]]:
    """What the log says beside the metrics, at some steps: all steps, tokens/s, memory, time left."""
    return [_pace(int(step), int(steps), rest.decode(errors="replace")) for step, steps, rest in _STEP.findall(log)]


def _pace(step: int, steps: int, rest: str) -> dict[str, Any]:
    pace: dict[str, Any] = {"step": step, "steps": steps}
    for part in rest.split("  "):
        if match := re.fullmatch(r"tokens/s ([\d,]{1,20})", part):
            pace["tokens_per_second"] = int(match[1].replace(",", ""))
        elif match := re.fullmatch(r"memory (\d{1,9}(?:\.\d)?) (MB|GB)", part):
            pace["memory"] = float(match[1]) * _SIZES[match[2]]
        elif match := re.fullmatch(r"(\d{1,6}(?::\d\d){1,2}) left", part):
            pace["left"] = match[1]
    return pace


def last_step(path: Path) -> int | None:
    """The step of the last line of a metrics file; None where there is none."""
    lines = parsed(tail(path, 8192))
    return lines[-1]["step"] if lines else None


def time_left(path: Path) -> str | None:
    """What the last line that tells it says of the time left, as people write it; None where none does."""
    for line in reversed(parsed(tail(path, 8192))):
        if (left := line.get("seconds_left")) is not None and left >= 0:
            minutes, seconds = divmod(round(left), 60)
            hours, minutes = divmod(minutes, 60)
            return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
    return None


def steps_of(folder: Path) -> int | None:
    """How many steps a run will have, from the newest of its checkpoints; None where there is none yet."""
    try:
        names = [name for name in os.listdir(folder) if re.fullmatch(r"checkpoint-\d{1,12}", name)]
    except OSError:
        return None
    for name in sorted(names, key=lambda name: -int(name.rpartition("-")[2])):
        try:
            state = json.loads(read(folder / name / "trainer_state.json"))
        except (ValueError, RecursionError):
            continue
        steps = state.get("max_steps") if isinstance(state, dict) else None
        if type(steps) is int and steps > 0:
            return steps
    return None
