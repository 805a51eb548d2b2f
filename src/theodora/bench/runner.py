"""Variants in processes of their own that take turns, so that what slows the machine down slows all of them.

A ratio is taken within a round. All variants stay in memory while they fit; where they do not (a GPU, large models),
they are measured in groups, each of which alternates with the floor. What does not fit beside the floor is measured
alone, last.
"""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any

from theodora.bench.variants import Job
from theodora.bench.worker import Failure, Loaded, Memory, Turn, work
from theodora.locks import temporary_folder

Progress = Callable[[str], None]

# What a process holds on a GPU beside PyTorch's own allocations: the context, the libraries' workspaces.
_CONTEXT = 2**30
_USABLE = 0.97


@dataclass
class Measured:
    """A variant's turns, or why there are none."""

    job: Job
    failure: Failure | None = None
    loaded: Loaded | None = None
    rounds: dict[int, list[float]] = field(default_factory=dict[int, list[float]])
    """Number of the round → seconds of its steps. Variants that alternate share numbers."""
    memory: Memory | None = None
    """The largest over the turns."""
    why_no_graph: str | None = None
    """Why its steps are not the CUDA graph that the variant asks for."""


class Runner:
    """Measures jobs.

    Example:
        `measured = Runner(jobs, rounds=5).run()`

    Args:
        jobs: what to measure, in the order of the table.
        floor: name of the job that all others alternate with. Default: there is none.
        rounds: turns of each variant.
        warm_up: untimed steps at the start of each turn.
        steps: timed steps in each turn.
        seconds: after so many, no further variant is begun.
        progress: is told, in words, what has happened.
    """

    def __init__(
        self,
        jobs: Sequence[Job],
        *,
        floor: str | None = None,
        rounds: int = 5,
        warm_up: int = 0,
        steps: int = 1,
        seconds: float = math.inf,
        progress: Progress = lambda message: None,
    ) -> None:
        self.jobs = {job.name: job for job in jobs}
        self.rounds, self.warm_up, self.steps, self.progress = rounds, warm_up, steps, progress
        self.until = time.monotonic() + seconds
        self.measured = {name: Measured(job) for name, job in self.jobs.items()}
        self.floor = floor if floor in self.jobs else None
        self.workers: dict[str, _Worker] = {}
        self.round = 0

    def run(self) -> dict[str, Measured]:
        """Name → what was measured. A variant that fails says so there, and stops no other."""
        with temporary_folder("bench") as logs:
            self.logs = logs
            try:
                for name in self.jobs:  # all at once: their imports take seconds and no device
                    self._spawn(name)
                self._run_all()
            finally:
                for worker in self.workers.values():
                    worker.stop()
        return self.measured

    def _run_all(self) -> None:
        if self.floor is not None and not self._load(self.floor):
            self.floor = None
        group: list[str] = []
        alone: list[str] = []
        for name in [name for name in self.jobs if name != self.floor and self.measured[name].failure is None]:
            if group and not self._has_room():
                group = self._finish(group, alone)
            if not self._load(name) and self._ran_out_of_memory(name):
                group = self._finish(group, alone)
                if not self._load_again(name) and self._ran_out_of_memory(name):
                    alone.append(name)
            if name in self.workers:
                group.append(name)
        self._finish(group, alone)
        if self.floor is not None:
            if not self.measured[self.floor].rounds:
                self._take_turns([self.floor])
            self._stop(self.floor)
            self.floor = None
        for name in alone:
            if self._load_again(name):
                self._finish([name], [])

    # Groups -----------------------------------------------------------------------------------------------------------

    def _finish(self, group: Iterable[str], alone: list[str]) -> list[str]:
        """Let a group take its turns and leave; those that ran out of memory beside the others go to `alone`."""
        group = [name for name in group if name in self.workers]
        if group:
            self._take_turns([self.floor, *group] if self.floor is not None else group)
        for name in group:
            self._stop(name)
        alone += [name for name in group if self._ran_out_of_memory(name) and (self.floor or len(group) > 1)]
        if self.floor is not None and self._ran_out_of_memory(self.floor) and not self._load_again(self.floor):
            self.floor = None
        return []

    def _take_turns(self, names: list[str]) -> None:
        for index in range(self.rounds):
            shift = index % len(names)  # nobody always follows the same neighbour
            for name in names[shift:] + names[:shift]:
                self._take_turn(name)
            self.progress(f"round {index + 1}/{self.rounds}: " + "  ".join(self._last(name) for name in names))
            self.round += 1

    def _take_turn(self, name: str) -> None:
        result = self.measured[name]
        turn = self._ask(name, "turn", self.warm_up, self.steps)
        if isinstance(turn, Turn):
            result.rounds[self.round] = turn.seconds
            result.memory = _largest(result.memory, turn.memory)
            result.why_no_graph = turn.why_no_graph

    def _last(self, name: str) -> str:
        seconds = self.measured[name].rounds.get(self.round)
        return f"{name} {median(seconds):.3f} s" if seconds else f"{name} -"

    def _has_room(self) -> bool:
        """Whether one more variant is likely to fit: one like those that are there."""
        held = [m.memory or m.loaded.memory for n in self.workers if (m := self.measured[n]).loaded is not None]
        if not held:
            return True
        idle = sum(memory.idle + _CONTEXT for memory in held) + max(memory.idle + _CONTEXT for memory in held)
        return idle + max(memory.reserved - memory.idle for memory in held) < _USABLE * held[0].capacity

    # Workers ----------------------------------------------------------------------------------------------------------

    def _spawn(self, name: str) -> None:
        self.workers[name] = _Worker(self.jobs[name], self.logs / f"{len(list(self.logs.iterdir()))}.log")

    def _load(self, name: str) -> bool:
        self.progress(f"{name}: loading")
        if time.monotonic() > self.until:
            self._fail(name, Failure("not measured: the time was up"))
            return False
        imported = self.workers[name].answer()
        loaded = self._ask(name, "load") if imported == "imported" else self._fail(name, imported)
        if isinstance(loaded, Loaded):
            self.measured[name].loaded = loaded
            self.progress(f"{name}: first step {loaded.first_step_seconds:.1f} s, loss {loaded.first_loss:.4f}")
        return isinstance(loaded, Loaded)

    def _load_again(self, name: str) -> bool:
        self.measured[name] = Measured(self.jobs[name])
        self._spawn(name)
        return self._load(name)

    def _ask(self, name: str, *command: Any) -> Any:
        """A worker's answer; a failure is noted, and ends the worker."""
        if name not in self.workers:
            return self.measured[name].failure
        answer = self.workers[name].ask(*command)
        return self._fail(name, answer) if isinstance(answer, Failure) else answer

    def _fail(self, name: str, failure: Failure) -> Failure:
        self.measured[name].failure = failure
        self.progress(f"{name}: {failure.reason}")
        self._stop(name)
        return failure

    def _stop(self, name: str) -> None:
        if name in self.workers:
            self.workers.pop(name).stop()

    def _ran_out_of_memory(self, name: str) -> bool:
        failure = self.measured[name].failure
        return failure is not None and failure.out_of_memory


class _Worker:
    """A variant's process, seen from outside."""

    def __init__(self, job: Job, log: Path) -> None:
        # Spawned, not forked: a fork would start with the parent's memory and torch's threads in an unknown state.
        context = multiprocessing.get_context("spawn")
        self.log, self.heard = log, False
        log.touch()
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, job, str(log)), daemon=True)
        self.process.start()
        theirs.close()

    def ask(self, *command: Any) -> Any:
        try:
            self.pipe.send(command)
        except OSError:
            return self._death()
        return self.answer()

    def answer(self) -> Any:
        pipe: Connection = self.pipe
        self.heard = True  # one that is not asked anything may still be importing
        try:
            return pipe.recv()
        except (EOFError, OSError):
            return self._death()

    def stop(self) -> None:
        if self.heard:
            with suppress(OSError):
                self.pipe.send(("stop",))
            self.process.join(timeout=20)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.pipe.close()

    def _death(self) -> Failure:
        self.process.join(timeout=20)
        lines = self.log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "without a word")
        code = self.process.exitcode
        # The kernel's out-of-memory killer leaves no other trace.
        return Failure(f"its process ended with exit code {code}: {last}"[:500], out_of_memory=code == -9)


def _largest(before: Memory | None, now: Memory) -> Memory:
    if before is None:
        return now
    return Memory(
        idle=max(before.idle, now.idle),
        peak=max(before.peak, now.peak),
        reserved=max(before.reserved, now.reserved),
        capacity=now.capacity,
    )
