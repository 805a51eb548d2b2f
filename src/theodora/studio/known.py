"""What the studio remembers beside the runs' own folders: which folders they are, who runs them, and who waits.

And what all that it shows by folder has in common: ids, and their not being known.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from theodora.errors import TheodoraError
from theodora.files.atomic import atomic_write
from theodora.kept import cache_folder


class NotKnown(TheodoraError):
    """No run, work or report of that id is known."""


def studio_folder() -> Path:
    """Where the studio keeps its list of folders, and the files that were dropped on its page."""
    return cache_folder() / "studio"


def id_of(folder: Path) -> str:
    """What addresses call a folder of a run or of a report."""
    return hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]


def folders_in(folder: Path) -> list[Path]:
    """Those right in it, without hidden ones, by name; none where it cannot be read."""
    try:
        with os.scandir(folder) as entries:
            return sorted(Path(entry.path) for entry in entries if entry.is_dir() and not entry.name.startswith("."))
    except OSError:
        return []


@dataclass
class Begun:
    """A run that was started here."""

    folder: str
    """The folder that its command works in: paths in a recipe are relative to it."""
    pid: int = 0
    """0: it waits for its turn."""
    started: str = ""
    at: float = 0.0
    """Seconds since the epoch."""
    told_to_stop: bool = False


@dataclass
class Known:
    """The list, which is one small JSON file."""

    folders: list[str] = field(default_factory=list[str])
    """Runs, and folders that hold some."""
    begun: dict[str, Begun] = field(default_factory=dict[str, Begun])
    """Folder of a run -> who runs it."""
    waiting: list[str] = field(default_factory=list[str])
    """Folders of runs that begin one after another."""


class Memory:
    """The file, read once, and written whenever something in it changes. One studio at a time has it.

    Args:
        folder: the studio's.
    """

    def __init__(self, folder: Path) -> None:
        self.file, self._lock = folder / "known.json", threading.RLock()
        self.known = _read(self.file)

    @contextmanager
    def changing(self) -> Iterator[Known]:
        """What is known, to be changed within the block; no other thread changes it meanwhile."""
        with self._lock:
            before = json.dumps(asdict(self.known))
            yield self.known
            if json.dumps(asdict(self.known)) != before:
                with atomic_write(self.file) as file:
                    file.write_text(json.dumps(asdict(self.known), indent=1), encoding="utf-8")


def _read(file: Path) -> Known:
    """What the file says; what of it is of another form is forgotten, for nothing depends on it."""
    try:
        given = json.loads(file.read_bytes())
    except (OSError, ValueError, RecursionError):
        return Known()
    if not isinstance(given, dict):
        return Known()
    begun = given.get("begun")
    return Known(
        _texts(given.get("folders")),
        {os.fspath(key): _begun(each) for key, each in begun.items()} if isinstance(begun, dict) else {},
        _texts(given.get("waiting")),
    )


def _texts(given: Any) -> list[str]:
    return [each for each in given if isinstance(each, str)] if isinstance(given, list) else []


def _begun(given: Any) -> Begun:
    found, given = Begun(folder=os.getcwd()), given if isinstance(given, dict) else {}
    for name, value in vars(found).items():
        if type(given.get(name)) is type(value) or (isinstance(value, float) and type(given.get(name)) is int):
            setattr(found, name, given[name])
    return found
