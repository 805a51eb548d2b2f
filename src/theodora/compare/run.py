"""`compare`: a configuration in, a folder with every run, a table and a report out."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console

from theodora.compare.cells import Cell, Record, all_cells
from theodora.compare.config import CompareConfig
from theodora.compare.material import left_out, read_splits
from theodora.compare.pool import Workers, start_workers
from theodora.compare.quiet import quiet
from theodora.compare.report import write_report
from theodora.compare.store import PARQUET, REPORT, Store
from theodora.compare.view import View
from theodora.errors import TheodoraError
from theodora.files.alone import alone_in
from theodora.terminal import Terminal


class ComparisonInterrupted(KeyboardInterrupt):
    """Ctrl-C during a comparison; the message says how to go on."""


def compare(
    config: CompareConfig,
    *,
    console: Console | None = None,
    seconds: float | None = None,
    start: Callable[[CompareConfig], Workers] | None = None,
) -> dict[str, Record]:
    """Run every cell of a comparison that has not run yet, and write results.parquet and report.html.

    Example:
        `compare(CompareConfig(model="gpt2", data={"mine": DataConfig(train="mine.jsonl")}, output="runs/methods"))`

    Args:
        config: the comparison. Its folder may hold a part of it: that part is not run again.
        console: where progress is shown. Default: standard output.
        seconds: begin no cell after this time; another call goes on.
        start: starts the workers. Default: on the GPUs of this machine, or in this process.

    Returns:
        The record of every cell, by key.

    Raises:
        ConfigError: the configuration makes no sense.
        DataError: data cannot be used. Nothing was run.
        UsageError: the folder holds another comparison; the message shows the difference. Or another process is at work
            in it.
        ComparisonInterrupted: Ctrl-C; the message says how to go on.
    """
    console = Terminal.over(console or Terminal())
    began = time.monotonic()
    with alone_in(Path(config.output)) as notes:
        for note in notes:
            console.print(f"Note: {note}", style="yellow", markup=False)
        store = Store(config)
        store.open()
        store.try_killed_again()
        with quiet():
            if any(all_cells(config, store.records)):
                with console.status("Reading the data ..."):
                    # What is wrong with it is said before a model is loaded, or anything written.
                    splits, general = read_splits(config)
                for line in left_out(splits, general):
                    console.print(f"Left out: {line}", style="yellow", markup=False)
                store.create()
                until = None if seconds is None else began + seconds
                with _workers(config, console, start or start_workers) as workers:
                    _run_cells(store, workers, View(console, store, workers), until)
            store.write_parquet()
            write_report(store)
    _say_what_there_is(console, store)
    return store.records


@contextmanager
def _workers(config: CompareConfig, console: Console, start: Callable[[CompareConfig], Workers]) -> Iterator[Workers]:
    with console.status("Loading the model ..."):
        workers = start(config)
    try:
        yield workers
    finally:
        workers.close()


def _run_cells(store: Store, workers: Workers, view: View, until: float | None) -> None:
    try:
        with view:
            while True:
                _begin_what_fits(store, workers, until)
                if not workers.running():
                    return
                view.show()
                for cell, outcome in workers.done():
                    if isinstance(outcome, Record):
                        store.add(outcome)
                        view.finished(outcome)
                    elif outcome is None:
                        store.not_its_fault(cell)
                    else:
                        store.died(cell, outcome)
    except BaseException as error:
        for cell in workers.running():
            store.not_its_fault(cell)
        if not isinstance(error, KeyboardInterrupt):
            raise
        raise ComparisonInterrupted(
            f"Interrupted. {len(store.records)} cells are kept in {store.folder}; the same command goes on from there."
        ) from None


def _begin_what_fits(store: Store, workers: Workers, until: float | None) -> None:
    if until is not None and time.monotonic() > until:
        return
    under_way = {cell.key for cell in workers.running()}
    ready = [cell for cell in all_cells(store.config, store.records)[0] if cell.key not in under_way]
    # What killed its process before comes last: it may kill this one, too.
    for cell in sorted(_in_order(ready), key=lambda cell: cell.key in store.again):
        if not workers.free():
            return
        given_up = store.begin(cell)
        if given_up is None:
            workers.begin(cell)
        else:
            store.add(given_up)


def _in_order(cells: list[Cell]) -> list[Cell]:
    """Learning rates first, so that all workers have something to do; seeds abreast, so that a first look is fair."""
    rounds = {"base": 0, "tune": 1, "final": 2}
    return sorted(cells, key=lambda cell: (rounds[cell.phase], cell.seed))


def _say_what_there_is(console: Console, store: Store) -> None:
    ready, later = all_cells(store.config, store.records)
    failed = [record for record in store.records.values() if record.status != "ok"]
    for record in failed[:5]:
        console.print(f"{record.key}: {record.status}: {record.message}", style="yellow", markup=False)
    if len(failed) > 5:
        console.print(f"… and {len(failed) - 5} more; the report lists them", style="yellow")
    if ready or later:
        console.print(f"{len(ready) + len(later)} cells are left; the same command goes on with them.")
    console.print(f"{store.folder / REPORT}  {store.folder / PARQUET}", markup=False, soft_wrap=True)


def report_only(config: CompareConfig) -> Path:
    """Write results.parquet and report.html from the cells there are, and run nothing.

    Raises:
        TheodoraError: there are none.
    """
    store = Store(config)
    store.open()
    if not store.records:
        raise TheodoraError(f"{store.folder} holds no finished cells")
    store.write_parquet()
    return write_report(store)
