"""`theodora compare --launcher ray`: cells run in workers on all GPUs of a cluster, each with the model in memory."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from theodora.compare.cells import Cell, Record
from theodora.compare.config import CompareConfig
from theodora.compare.pool import Outcome, Workers
from theodora.errors import TheodoraError
from theodora.launch.cluster import Share, beside, cluster, go_to, how_it_died, share_for_cells

_MOST_STARTS = 3  # replacements that may die while they load, one after the other, before the comparison ends


@contextmanager
def workers_on_ray(
    config: CompareConfig, *, workers: int | None = None, address: str | None = None
) -> Iterator[Callable[[CompareConfig], Workers]]:
    """What `compare` takes as `start`, while the cluster is connected.

    Args:
        config: the comparison. Each worker reads its model and data, which every machine has to have in the same place.
        workers: how many. Default: `workers_per_gpu` on every GPU, or one on every machine where there is no GPU.
        address: of a cluster that is there; see `cluster`.

    Raises:
        ConfigError: Ray is missing, there is no such cluster, or it has no room for so many.
    """
    with cluster(address) as (ray, there), beside(config.output) as mark:
        share = share_for_cells(there, config.workers_per_gpu, workers)
        yield lambda config: OnRay(ray, config, share, mark)


class CellWorker:
    """The actor: load, then a cell after the other."""

    def __init__(self, config: CompareConfig, threads: int, folder: str, mark: str) -> None:
        self._config, self._threads, self._folder, self._mark = config, threads, folder, mark
        self._bench: Any = None

    def load(self) -> str | None:
        """Load model and data; why this cannot be done, if it cannot."""
        try:
            go_to(self._folder, self._mark, self._config.output)
            import torch

            from theodora.adapters.models import best_device
            from theodora.compare.quiet import quiet
            from theodora.compare.worker import Bench

            torch.set_num_threads(self._threads)
            with quiet():
                self._bench = Bench(self._config, best_device())
        except TheodoraError as error:
            return str(error)
        except Exception:
            return f"A worker on {os.uname().nodename} failed:\n{traceback.format_exc()}"
        return None

    def run(self, cell: Cell) -> Record:
        """Run a cell."""
        from theodora.compare.quiet import quiet

        with quiet():
            return self._bench.run(cell)


@dataclass
class _Worker:
    actor: Any
    loading: Any
    """What `load` will answer; None once it has."""
    answer: Any = None
    """What `run` will answer, while a cell is under way."""
    cell: Cell | None = None
    starts: int = 0
    """How many workers in this place have died one after the other, each before it was ready."""
    replaces: bool = False


class OnRay:
    """Workers on a cluster; `compare` knows them as `Workers`.

    A worker for which there is no room yet gets none of the cells.
    """

    def __init__(self, ray: Any, config: CompareConfig, share: Share, mark: str) -> None:
        self._ray, self._config, self._share, self._mark = ray, config, share, mark
        self.count = share.count
        self._workers = [self._start() for _ in range(share.count)]

    def free(self) -> int:
        """Workers that are ready for a cell; with none at work, waits for the first."""
        if not self.running():
            while not any(worker.loading is None for worker in self._workers):
                self._look(None)
        return sum(worker.loading is None and worker.cell is None for worker in self._workers)

    def begin(self, cell: Cell) -> None:
        """Give a cell to a worker that is ready."""
        worker = next(w for w in self._workers if w.loading is None and w.cell is None)
        worker.cell, worker.answer = cell, worker.actor.run.remote(cell)

    def running(self) -> list[Cell]:
        """The cells under way."""
        return [worker.cell for worker in self._workers if worker.cell is not None]

    def done(self) -> Iterator[tuple[Cell, Outcome]]:
        """Wait for a second, or until a worker has something to say."""
        yield from self._look(1.0)

    def close(self) -> None:
        """End them all, whatever they do."""
        for worker in self._workers:
            self._ray.kill(worker.actor)

    def _start(self) -> _Worker:
        share = self._share
        actor = self._ray.remote(num_cpus=share.cpus, num_gpus=share.gpus, max_restarts=0)(CellWorker).remote(
            self._config, share.threads, os.getcwd(), self._mark
        )
        return _Worker(actor, actor.load.remote())

    def _look(self, seconds: float | None) -> list[tuple[Cell, Outcome]]:
        """What has come meanwhile; None waits until something does."""
        waiting = {
            ref: worker for worker in self._workers for ref in (worker.loading, worker.answer) if ref is not None
        }
        heard: list[tuple[Cell, Outcome]] = []
        for ref in self._ray.wait(list(waiting), timeout=seconds)[0]:
            heard += self._hear(waiting[ref], ref)
        return heard

    def _hear(self, worker: _Worker, ref: Any) -> list[tuple[Cell, Outcome]]:
        try:
            answer = self._ray.get(ref)
        except self._ray.exceptions.RayError as error:
            return self._replace(worker, error)
        if worker.loading is not None:
            worker.loading = None
            if answer is not None:  # it could not begin: no other could either
                raise TheodoraError(answer)
            worker.starts = 0
            return []
        cell, worker.cell, worker.answer = worker.cell, None, None
        return [] if cell is None else [(cell, answer)]

    def _replace(self, worker: _Worker, error: Exception) -> list[tuple[Cell, Outcome]]:
        how, starts = how_it_died(error), 0 if worker.loading is None else worker.starts + 1
        if starts and (not worker.replaces or starts >= _MOST_STARTS):
            raise TheodoraError(
                f"A worker died while it loaded the model ({how}). Is there memory for all of them? Lower "
                "--num-workers or workers_per_gpu."
            )
        another = self._start()
        another.starts, another.replaces = starts, True
        self._workers[self._workers.index(worker)] = another
        if worker.cell is None:
            return []
        return [(worker.cell, None if "node" in how else how)]  # a machine that goes away says nothing of the cell
