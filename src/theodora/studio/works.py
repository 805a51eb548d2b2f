"""Commands that the studio has begun, in processes that outlive it: each has a folder of the studio's own.

The folder holds what was asked, what the process says, and what is the studio's of the result.
"""

from __future__ import annotations

import json
import os
import secrets
import shlex
import shutil
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar, get_origin

from theodora.coerce import type_hints
from theodora.errors import UsageError
from theodora.files.atomic import atomic_write
from theodora.studio.known import NotKnown
from theodora.studio.processes import ask_to_end, begin, is_alive

LOG = "log"
"""What the process says, in the work's folder."""
_ASKED = "asked.json"


@dataclass(kw_only=True)
class Work(ABC):
    """A command, and who is at it; kinds of work add what was asked for."""

    words: list[str] = field(default_factory=list[str])
    """Of the command."""
    at: float = 0.0
    """When it was begun, in seconds since the epoch."""
    pid: int = 0
    started: str = ""
    told_to_stop: bool = False

    @abstractmethod
    def has_result(self, folder: Path) -> bool:
        """Whether what it was begun for is there."""

    def at_work(self, folder: Path) -> bool:
        """Whether its process is still at it."""
        return is_alive(self.pid, self.started)


W = TypeVar("W", bound=Work)


class Works(Generic[W]):
    """All works of one kind that are kept, the newest first.

    Args:
        folder: for their folders.
        kind: of work.
        most: that are kept; older ones go, and nothing that they made elsewhere.
        word: what people call one.
    """

    def __init__(self, folder: Path, kind: type[W], most: int, word: str) -> None:
        self._folder, self._kind, self._most, self._word = folder, kind, most, word

    def __iter__(self) -> Iterator[tuple[Path, W]]:
        try:
            names = sorted(os.listdir(self._folder), reverse=True)
        except OSError:
            return
        for name in names:
            if (work := self._asked(self._folder / name)) is not None:
                yield self._folder / name, work

    def of(self, id: str) -> tuple[Path, W]:
        """The folder of one, and what was asked.

        Raises:
            NotKnown: there is none of that id.
        """
        for folder, work in self:
            if folder.name == id:
                return folder, work
        raise NotKnown(f"There is no such {self._word} here.")

    def place(self) -> Path:
        """A folder for another one, which `begin` makes; its name is the id."""
        return self._folder / f"{time.time_ns():x}-{secrets.token_hex(4)}"

    def begin(self, folder: Path, work: W) -> None:
        """Start the process, and keep what was asked."""
        folder.mkdir(parents=True)
        work.pid, work.started = begin(work.words, folder / LOG, os.getcwd())
        work.at = time.time()
        _keep(folder, work)
        for old, each in [*self][self._most :]:
            if not each.at_work(old):
                shutil.rmtree(old, ignore_errors=True)

    def stop(self, id: str) -> None:
        """End one that is at work; what it has not finished is lost."""
        folder, work = self.of(id)
        if not work.at_work(folder):  # one that has failed has not been stopped
            raise UsageError("It has ended already.")
        work.told_to_stop = True
        _keep(folder, work)
        if not ask_to_end(work.pid, work.started):  # it has just ended
            raise UsageError("It has ended already.")

    def forget(self, id: str) -> None:
        """Delete the folder of one that has ended; what it made elsewhere stays."""
        folder, work = self.of(id)
        if work.at_work(folder):
            raise UsageError("It is at work. Stop it first.")
        shutil.rmtree(folder)

    def states(self) -> list[dict[str, Any]]:
        """How all of them stand."""
        return [self.state(folder, work) for folder, work in self]

    def state(self, folder: Path, work: W) -> dict[str, Any]:
        """What was asked, the command, and how it stands: running, finished, stopped or failed."""
        if alive := work.at_work(folder):
            word = "running"
        else:
            word = "finished" if work.has_result(folder) else "stopped" if work.told_to_stop else "failed"
        found = {name: value for name, value in asdict(work).items() if name not in ("words", "pid", "started")}
        command = shlex.join(["theodora", *work.words])
        seconds = time.time() - work.at if alive else None
        return found | {"id": folder.name, "state": word, "command": command, "seconds": seconds}

    def _asked(self, folder: Path) -> W | None:
        """What the file says; None where it is none of ours."""
        try:
            found = self._kind(**json.loads((folder / _ASKED).read_bytes()))
        except (OSError, ValueError, TypeError, RecursionError):
            return None
        hints = type_hints(self._kind)
        right = all(type(value) is (get_origin(hints[name]) or hints[name]) for name, value in vars(found).items())
        return found if right else None


def _keep(folder: Path, work: Work) -> None:
    with atomic_write(folder / _ASKED) as file:
        file.write_text(json.dumps(asdict(work), indent=1), encoding="utf-8")
