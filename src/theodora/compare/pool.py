"""Workers that run cells: this process itself, or one process for each place on a GPU.

A worker answers each cell with its record. One that dies (the system kills what takes too much memory) is replaced.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import traceback
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from typing import Any, Protocol

import torch

from theodora.adapters.models import best_device
from theodora.compare.cells import Cell, Record
from theodora.compare.config import CompareConfig
from theodora.errors import TheodoraError

Outcome = Record | str | None
"""A cell's record; or how its worker died, in words; or None, if the worker died before the cell began."""
_MOST_STARTS = 3  # replacements that may die while they load, one after the other, before the comparison ends


class Workers(Protocol):
    """Takes cells, and gives back their records in the order in which they are done."""

    count: int

    def free(self) -> int:
        """How many cells can be begun now."""
        ...

    def begin(self, cell: Cell) -> None:
        """Begin a cell; some worker is free."""
        ...

    def running(self) -> list[Cell]:
        """The cells under way."""
        ...

    def done(self) -> Iterator[tuple[Cell, Outcome]]:
        """Wait for at least one cell, if any is under way."""
        ...

    def close(self) -> None:
        """End all workers."""
        ...


def places(config: CompareConfig) -> list[str]:
    """Where workers are to run: each GPU as often as asked for, or the one other device."""
    device = best_device()
    if device.type != "cuda":
        return [str(device)]
    return [f"cuda:{i}" for _ in range(config.workers_per_gpu) for i in range(torch.cuda.device_count())]


def start_workers(config: CompareConfig) -> Workers:
    """Start what this machine has room for.

    Raises:
        TheodoraError: the model or data cannot be used.
    """
    devices = places(config)
    return Processes(config, devices) if len(devices) > 1 else Here(config, devices[0])


class Here:
    """This process, where it is the only one."""

    count = 1

    def __init__(self, config: CompareConfig, place: str) -> None:
        from theodora.compare.worker import Bench

        self._bench = Bench(config, torch.device(place))
        self._waiting: list[Cell] = []

    def free(self) -> int:
        """One, unless a cell waits."""
        return 1 - len(self._waiting)

    def begin(self, cell: Cell) -> None:
        """Take a cell; it runs in `done`."""
        self._waiting.append(cell)

    def running(self) -> list[Cell]:
        """The cell taken."""
        return list(self._waiting)

    def done(self) -> Iterator[tuple[Cell, Outcome]]:
        """Run it."""
        while self._waiting:
            record = self._bench.run(self._waiting[0])
            yield self._waiting.pop(0), record

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class _Worker:
    place: str
    process: Any
    pipe: Connection
    ready: bool = False
    cell: Cell | None = None
    served: int = 0
    starts: int = 0
    """How many workers on this place have died one after the other, each before it was ready."""
    replaces: bool = False
    """Whether another one was ready on this place before."""


@dataclass
class Processes:
    """One process for each place."""

    config: CompareConfig
    where: list[str]
    count: int = 0
    _workers: list[_Worker] = field(default_factory=list[_Worker])

    def __post_init__(self) -> None:
        self.count = len(self.where)
        self._workers = [self._start(place) for place in self.where]

    def free(self) -> int:
        """Workers without a cell; one that still loads its model takes a cell, too."""
        return sum(worker.cell is None for worker in self._workers)

    def begin(self, cell: Cell) -> None:
        """Send a cell to a free worker, to one that is ready if there is one."""
        worker = min((w for w in self._workers if w.cell is None), key=lambda w: not w.ready)
        worker.cell = cell
        with suppress(OSError):  # it has just died, which `done` hears
            worker.pipe.send(cell)

    def running(self) -> list[Cell]:
        """The cells sent."""
        return [worker.cell for worker in self._workers if worker.cell is not None]

    def done(self) -> Iterator[tuple[Cell, Outcome]]:
        """Wait for a message of any worker."""
        heard = False
        while self.running() and not heard:
            for pipe in wait([worker.pipe for worker in self._workers], timeout=1.0):
                worker = next(w for w in self._workers if w.pipe is pipe)
                for outcome in self._hear(worker):
                    heard = True
                    yield outcome

    def close(self) -> None:
        """End them all, whatever they do."""
        for worker in self._workers:
            worker.process.terminate()
        for worker in self._workers:
            worker.process.join(timeout=5)
            if worker.process.is_alive():
                worker.process.kill()
            worker.pipe.close()

    def _hear(self, worker: _Worker) -> Iterator[tuple[Cell, Outcome]]:
        try:
            message = worker.pipe.recv()
        except (EOFError, OSError):
            yield from self._replace(worker)
            return
        if message == "ready":
            worker.ready = True
        elif isinstance(message, Record):
            cell, worker.cell = worker.cell, None
            worker.served += 1
            if cell is not None:
                yield cell, message
        else:  # it could not begin: no other could either
            raise TheodoraError(str(message))

    def _replace(self, worker: _Worker) -> Iterator[tuple[Cell, Outcome]]:
        worker.process.join(timeout=5)
        how, starts = how_it_ended(worker.process.exitcode), 0 if worker.ready else worker.starts + 1
        if not worker.ready and (not worker.replaces or starts >= _MOST_STARTS):
            raise TheodoraError(
                f"A worker on {worker.place} died while it loaded the model ({how}). Is there memory for all of them? "
                "Lower workers_per_gpu."
            )
        cell = worker.cell
        worker.pipe.close()
        another = self._start(worker.place)
        another.starts, another.replaces = starts, True
        self._workers[self._workers.index(worker)] = another
        if cell is not None:
            yield cell, how if worker.ready else None

    def _start(self, place: str) -> _Worker:
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self.config, place, len(self.where)), daemon=True)
        process.start()
        theirs.close()
        return _Worker(place, process, ours)


def how_it_ended(exit_code: int | None) -> str:
    """`killed by signal 9 (SIGKILL)` or `ended with exit code 1`."""
    if exit_code is None:
        return "it does not answer"
    if exit_code >= 0:
        return f"ended with exit code {exit_code}"
    names = {int(number): number.name for number in signal.Signals}
    return f"killed by signal {-exit_code} ({names.get(-exit_code, 'unknown')})"


def _serve(pipe: Connection, config: CompareConfig, place: str, count: int) -> None:
    """A worker's life: load, then a cell after the other, until the parent is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
    from theodora.compare.quiet import quiet
    from theodora.compare.worker import Bench

    torch.set_num_threads(max(1, (os.cpu_count() or 1) // count))
    device = torch.device(place)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with quiet():
        try:
            bench = Bench(config, device)
            pipe.send("ready")
            while True:
                pipe.send(bench.run(pipe.recv()))
        except (EOFError, BrokenPipeError):
            return
        except TheodoraError as error:
            pipe.send(str(error))
        except Exception:
            pipe.send(f"A worker on {place} failed:\n{traceback.format_exc()}")
