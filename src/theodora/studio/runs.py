"""The runs: found in folders, started, stopped, resumed, and in a queue; their state is what their folders say."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from theodora.errors import UsageError
from theodora.files.alone import LOCK
from theodora.files.run_files import CARD_FILE, CHECKPOINTS, CONFIG_FILE, METRICS_FILE, RECORD_HEAD, RUN_FILES
from theodora.parse import parse_yaml, to_yaml
from theodora.safe_text import plain_lines, quoted
from theodora.studio.known import Begun, Memory, NotKnown, folders_in, id_of
from theodora.studio.metrics import last_step, paces, parsed, read, steps_of, tail, time_left
from theodora.studio.processes import ask_to_end, begin, holder_of, is_alive
from theodora.trust import grant_flags

RECIPE_FILE, LOG_FILE = "studio.yaml", "studio.log"
"""What a run that was started here has beside its own files: what was asked for, and what its process says."""
_TELLING = (METRICS_FILE, LOG_FILE, CONFIG_FILE, RECIPE_FILE, CARD_FILE)
_MOST_RUNS = 500
_LARGEST_TEXT = 1 << 20
_ENDED_BY_HAND = (b"Interrupted", b"Stopped before training began", b"SIGTERM: no checkpoint")


@dataclass(frozen=True)
class State:
    """How a run stands."""

    id: str
    name: str
    folder: str
    state: str
    """waiting, starting, training, stopping, finished, stopped or failed."""
    model: str
    method: str
    step: int | None
    steps: int | None
    loss: float | None
    """The last one of its metrics; None for a run that learns from rewards, whose loss tells nothing."""
    reward: float | None
    left: str | None
    changed: float
    """When its metrics were last written to, in seconds since the epoch."""
    can_stop: bool
    can_resume: bool


class Runs:
    """All runs that are known.

    Args:
        memory: what the studio remembers.
        named: folders that were named when it was started: runs, and folders that hold some.
    """

    def __init__(self, memory: Memory, named: Sequence[str] = ()) -> None:
        self.memory = memory
        self._looked_at: dict[Path, tuple[Any, State]] = {}
        with memory.changing() as known:
            for folder in named:
                if (path := os.path.abspath(os.path.expanduser(folder))) not in known.folders:
                    known.folders.append(path)

    def folders(self) -> list[Path]:
        """Of every run, in no order."""
        found: dict[Path, None] = {}
        for name in [*self.memory.known.begun, *self.memory.known.folders]:
            found.update(dict.fromkeys(_runs_in(Path(name))))
        return list(found)[:_MOST_RUNS]

    def folder_of(self, id: str) -> Path:
        """The folder of a run.

        Raises:
            NotKnown: none has that id.
        """
        for folder in self.folders():
            if id_of(folder) == id:
                return folder
        raise NotKnown("There is no such run here. Name its folder, and it appears.")

    def states(self) -> list[State]:
        """How every run stands; those at work first, then the newest."""
        busy = ("training", "starting", "stopping", "waiting")
        found = [self.state(folder) for folder in self.folders()]
        return sorted(found, key=lambda run: (run.state not in busy, -run.changed, run.folder))

    def state(self, folder: Path) -> State:
        """How a run stands, as its folder and its process say."""
        begun, process = self.memory.known.begun.get(str(folder)), self._process(folder)
        word = self._word(folder, begun, process)
        # Pages ask every second or two, and most runs have ended long ago.
        stamp = (word, *(_stamp(folder / name) for name in _TELLING))
        known = self._looked_at.get(folder)
        if known is None or known[0] != stamp:
            known = self._looked_at[folder] = (stamp, self._look(folder, word, begun, process is not None))
        return known[1]

    def _look(self, folder: Path, word: str, begun: Begun | None, alive: bool) -> State:
        metrics, log, options = folder / METRICS_FILE, tail(folder / LOG_FILE), options_of(folder)
        reward = _last(metrics, "reward")
        pace: Mapping[str, Any] = (paces(log) or [{}])[-1]
        steps = pace.get("steps") or steps_of(folder / CHECKPOINTS) or options.get("max_steps")
        return State(
            id=id_of(folder),
            name=folder.name,
            folder=str(folder),
            state=word,
            model=str(options.get("model") or options.get("from_adapter") or ""),
            method=_method(options),
            step=last_step(metrics),
            steps=steps if isinstance(steps, int) else None,
            loss=_last(metrics, "loss") if reward is None else None,
            reward=reward,
            left=(time_left(metrics) or pace.get("left")) if word == "training" else None,
            changed=_changed(metrics) or (begun.at if begun else _changed(folder)),
            can_stop=alive or word == "waiting",
            can_resume=word in ("stopped", "failed") and (_is_record(folder) or begun is not None),
        )

    def _word(self, folder: Path, begun: Begun | None, process: tuple[int, str] | None) -> str:
        if str(folder) in self.memory.known.waiting:
            return "waiting"
        written = _changed(folder / METRICS_FILE)
        if process is not None:
            ours = begun is not None and process == (begun.pid, begun.started)
            if begun is not None and ours and begun.told_to_stop:
                return "stopping"
            return "training" if written > (begun.at if begun is not None and ours else 0) else "starting"
        # The card is the last thing that a run writes.
        if written and _changed(folder / CARD_FILE) >= written and not (begun and begun.at > written):
            return "finished"
        log = tail(folder / LOG_FILE, 2000)
        if begun is None or begun.told_to_stop or any(word in log for word in _ENDED_BY_HAND):
            return "stopped"
        return "failed"

    def _process(self, folder: Path) -> tuple[int, str] | None:
        """Pid and start of the process that is at work in a folder, if one is; also of those started elsewhere."""
        begun = self.memory.known.begun.get(str(folder))
        if begun is not None and begun.pid and is_alive(begun.pid, begun.started):
            return begun.pid, begun.started
        return holder_of(folder / LOCK)

    def start(self, options: Mapping[str, Any], *, at_once: bool = False) -> str:
        """Begin a run, or have it wait until those at work have ended.

        Args:
            options: as in a YAML file, checked already; `output` says where.
            at_once: whether it waits for nobody.

        Returns:
            the id of the run.

        Raises:
            UsageError: the folder holds something already.
        """
        folder = Path(os.path.abspath(os.path.expanduser(str(options["output"]))))
        self._check_free(folder, overwrite=bool(options.get("overwrite")))
        folder.mkdir(parents=True, exist_ok=True)
        (folder / RECIPE_FILE).write_text(to_yaml(dict(options)), encoding="utf-8")
        (folder / LOG_FILE).write_bytes(b"")
        with self.memory.changing() as known:
            known.begun[str(folder)] = Begun(folder=os.getcwd(), at=time.time())
            known.waiting = [each for each in known.waiting if each != str(folder)] + [str(folder)]
            if at_once:
                self._begin(str(folder))
            else:
                self.go_on()
        return id_of(folder)

    def _check_free(self, folder: Path, *, overwrite: bool) -> None:
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"output: {folder} is a file; expected a folder, or a name that is free.")
        if str(folder) in self.memory.known.waiting or self._process(folder) is not None:
            raise UsageError(f"output: a run is at work in {folder}, or waits for its turn. Choose another folder.")
        there = [name for name in RUN_FILES if os.path.lexists(folder / name)]
        if there and not overwrite:
            raise UsageError(
                f"output: {folder} already holds {', '.join(there[:4])}. Choose another folder, or say overwrite."
            )
        ours = str(folder) in self.memory.known.begun
        theirs = [name for name in (RECIPE_FILE, LOG_FILE) if os.path.lexists(folder / name)]
        if theirs and not ours:
            raise UsageError(f"output: {folder} holds a {theirs[0]} that is not of this studio. Choose another folder.")

    def go_on(self) -> None:
        """Begin the next run that waits, if none that was started here is at work."""
        with self.memory.changing() as known:
            if not known.waiting or any(is_alive(each.pid, each.started) for each in known.begun.values() if each.pid):
                return
            self._begin(known.waiting[0])

    def _begin(self, folder: str) -> None:
        with self.memory.changing() as known:
            known.waiting.remove(folder)
            begun = known.begun.setdefault(folder, Begun(folder=os.getcwd()))
            words = command_of(Path(folder))
            try:
                begun.pid, begun.started = begin(words, Path(folder) / LOG_FILE, begun.folder)
            except OSError as error:  # the folder is gone, or the disk is full
                raise UsageError(f"The run could not begin in {folder}: {error.strerror}") from error
            begun.at, begun.told_to_stop = time.time(), False

    def stop(self, folder: Path) -> None:
        """Have a run save a checkpoint and end; one that waits no longer does."""
        with self.memory.changing() as known:
            if str(folder) in known.waiting:
                known.waiting.remove(str(folder))
                known.begun.setdefault(str(folder), Begun(folder=os.getcwd())).told_to_stop = True
                return
            process = self._process(folder)
            if process is None or not ask_to_end(*process):
                raise UsageError(f"No process of this machine is at work in {folder}.")
            begun = known.begun.setdefault(str(folder), Begun(folder=os.getcwd()))
            begun.pid, begun.started = process
            begun.told_to_stop = True

    def resume(self, folder: Path) -> None:
        """Have a run go on from its newest checkpoint, or begin again where there is none.

        Raises:
            UsageError: it is at work, or waits for its turn; or its record asks for what only its user can grant, in a
                terminal.
        """
        if self._process(folder) is not None:
            raise UsageError(f"A process is at work in {folder} already.")
        if str(folder) in self.memory.known.waiting:
            raise UsageError(f"{folder} waits for its turn already.")
        record = folder / CONFIG_FILE
        if _is_record(folder) and (flags := grant_flags(options_of(folder))):
            raise UsageError(
                f"The record of this run asks for what only you can grant, in a terminal: theodora train --config "
                f"{quoted(record)} --resume{flags}"
            )
        with self.memory.changing() as known:
            begun = known.begun.setdefault(str(folder), Begun(folder=os.getcwd()))
            begun.told_to_stop, begun.at = False, time.time()
            known.waiting.append(str(folder))
            self.go_on()

    def add(self, folder: str) -> str:
        """Look into another folder from now on; its path.

        Raises:
            UsageError: it is no folder.
        """
        path = os.path.abspath(os.path.expanduser(folder))
        if not folder.strip() or not os.path.isdir(path):
            raise UsageError(f"{path if folder.strip() else 'Nothing'} is no folder of this machine.")
        with self.memory.changing() as known:
            if path not in known.folders:
                known.folders.append(path)
        return path

    def forget(self, folder: str) -> None:
        """Look into a folder no longer. Nothing in it changes."""
        with self.memory.changing() as known:
            known.folders = [each for each in known.folders if each != folder]
            if folder not in known.waiting and self._process(Path(folder)) is None:
                known.begun.pop(folder, None)


def command_of(folder: Path) -> list[str]:
    """The words that start a run, or go on with one that has a record."""
    if _is_record(folder):
        asked = _options(folder / RECIPE_FILE)
        if not asked.get("overwrite") or _changed(folder / CONFIG_FILE) > _changed(folder / RECIPE_FILE):
            return ["train", "--config", str(folder / CONFIG_FILE), "--resume", "auto"]
    return ["train", "--config", str(folder / RECIPE_FILE)]


def options_of(folder: Path) -> dict[str, Any]:
    """What a run was asked for: its record, or what will be its record."""
    return _options(folder / CONFIG_FILE) or _options(folder / RECIPE_FILE)


def asked_of(folder: Path) -> dict[str, Any]:
    """What a run was asked for, without what it found out by itself where that is known."""
    return _options(folder / RECIPE_FILE) or _options(folder / CONFIG_FILE)


def text_of(folder: Path, name: str) -> str:
    """A small text file of a run, fit to be shown; empty where there is none."""
    return plain_lines(read(folder / name, _LARGEST_TEXT).decode("utf-8", errors="replace"))


def _options(file: Path) -> dict[str, Any]:
    try:
        found = parse_yaml(read(file, _LARGEST_TEXT).decode("utf-8"))
    except ValueError:
        return {}
    return {str(key): value for key, value in found.items()} if isinstance(found, dict) else {}


def _is_record(folder: Path) -> bool:
    """Whether a run has written down all that it was begun with."""
    head = read(folder / CONFIG_FILE, _LARGEST_TEXT)[: len(RECORD_HEAD) + 40].decode("utf-8", errors="replace")
    return head.startswith(RECORD_HEAD) and "only begun" not in head and "being deleted" not in head


def _runs_in(folder: Path) -> list[Path]:
    """The folder, if it is a run; else the runs right in it."""
    if _is_run(folder):
        return [folder]
    return [path for path in folders_in(folder) if _is_run(path)]


def _is_run(folder: Path) -> bool:
    return (folder / METRICS_FILE).is_file() or (folder / RECIPE_FILE).is_file() or _is_record(folder)


def _stamp(path: Path) -> tuple[int, int]:
    try:
        status = path.stat()
    except OSError:
        return 0, 0
    return status.st_mtime_ns, status.st_size


def _changed(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return 0.0


def _method(options: Mapping[str, Any]) -> str:
    method = str(options.get("method") or "dora")
    return method if method == "full" else f"{method} {options.get('rank') or 8}"


def _last(metrics: Path, name: str) -> float | None:
    """The last figure of that name, if one stands near the end."""
    lines = parsed(tail(metrics, 16_384))
    return next((line[name] for line in reversed(lines) if line.get(name) is not None), None)
