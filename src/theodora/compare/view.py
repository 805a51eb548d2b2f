"""The live table of a comparison: a line for each method on each data set, and the time left."""

from __future__ import annotations

import time
from typing import Any

from rich import box
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Table
from rich.text import Text

from theodora.compare.cells import Record, all_cells, chosen_rate, final_records, pairs, tuning_cells
from theodora.compare.pool import Workers
from theodora.compare.stats import estimate
from theodora.compare.store import Store
from theodora.errors import in_line
from theodora.train.progress import as_time

_SECONDS_BETWEEN_LINES = 30.0  # where the output is no terminal


class View:
    """Shows what is done, what runs, and how long the rest takes."""

    def __init__(self, console: Console, store: Store, workers: Workers) -> None:
        self._console, self._store, self._workers = console, store, workers
        self._began = self._last_line = time.monotonic()
        self._seconds: dict[str, list[float]] = {}
        self._bar = Progress(
            TextColumn("cells", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task("", total=None, left="")
        self._live = Live(console=console, refresh_per_second=2, get_renderable=self.render)

    def __enter__(self) -> View:
        if self._console.is_terminal:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._console.is_terminal:
            self._live.stop()

    def finished(self, record: Record) -> None:
        """A cell is done."""
        self._seconds.setdefault(record.phase, []).append(record.seconds)
        now = time.monotonic()
        if not self._console.is_terminal and now - self._last_line > _SECONDS_BETWEEN_LINES:
            self._last_line = now
            done, total = self._counts()
            self._console.print(f"{done}/{total} cells  {self._left()}", soft_wrap=True)

    def show(self) -> None:
        """Bring the table up to date."""
        if self._console.is_terminal:
            self._live.refresh()

    def render(self) -> Group:
        """The table as it stands."""
        done, total = self._counts()
        self._bar.update(self._task, total=total, completed=done, left=self._left())
        running = in_line([cell.key for cell in self._workers.running()], 3)
        return Group(self._table(), self._bar, Text(f"now {running}", style="dim", overflow="ellipsis", no_wrap=True))

    def _counts(self) -> tuple[int, int]:
        done = len(self._store.records)
        ready, later = all_cells(self._store.config, self._store.records)
        return done, done + len(ready) + len(later)

    def _left(self) -> str:
        """The time left, from the mean time of each kind of cell; of a kind not yet seen, that of all."""
        ready, later = all_cells(self._store.config, self._store.records)
        everything = [seconds for times in self._seconds.values() for seconds in times]
        if not everything:
            return ""
        means = {phase: sum(times) / len(times) for phase, times in self._seconds.items()}
        mean = sum(everything) / len(everything)
        seconds = sum(means.get(cell.phase, mean) for cell in [*ready, *later]) / self._workers.count
        return f"{as_time(seconds)} left"

    def _table(self) -> Table:
        config, records = self._store.config, self._store.records
        several = len(config.data) > 1
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in [*(["data"] if several else []), "method"]:
            table.add_column(name, no_wrap=True)
        for name in ("learning rate", "score", "loss", "general", "seeds"):
            table.add_column(name, justify="right", no_wrap=True)
        rows = list(pairs(config))
        most = max(5, (self._console.size.height or 24) - 8)
        shown = rows if len(rows) <= most else self._lively(rows)[:most]
        for data, variant in shown:
            choosing = tuning_cells(config, data, variant)
            tried = sum(cell.key in records for cell in choosing)
            rate = chosen_rate(config, records, data, variant)
            finals = final_records(config, records, data, variant) if tried == len(choosing) else []
            good = [record for record in finals if record.status == "ok"]
            bad = len(finals) - len(good)
            if tried < len(choosing):
                chosen = f"choosing {tried}/{len(choosing)}"
            else:
                chosen = "none works" if rate is None else f"{rate:g}"
            table.add_row(
                *([data] if several else []),
                variant.title,
                chosen,
                _mean([record.score for record in good], percent=True),
                _mean([record.loss for record in good]),
                _mean([record.general_loss for record in good]),
                Text.assemble(f"{len(good)}/{len(config.final_seeds)}", (f" {bad} failed" if bad else "", "red")),
            )
        if len(shown) < len(rows):
            table.caption = f"{len(shown)} of {len(rows)} lines; the others are done, or have not begun"
        return table

    def _lively(self, rows: list[Any]) -> list[Any]:
        """Lines under way first, then those with results."""
        now = {(cell.data, cell.variant) for cell in self._workers.running()}
        records = self._store.records.values()
        done = {(record.data, record.variant) for record in records if record.phase == "final"}

        def place(row: Any) -> int:
            key = (row[0], row[1].key)
            return 0 if key in now else 1 if key in done else 2

        return sorted(rows, key=place)


def _mean(values: list[float | None], *, percent: bool = False) -> str:
    known = [value for value in values if value is not None]
    if not known:
        return ""
    average = estimate(known)
    scale, digits, unit = (100, 1, " %") if percent else (1, 3, "")
    half = "" if average.half_width is None else f" ± {scale * average.half_width:.{digits}f}"
    return f"{scale * average.mean:.{digits}f}{half}{unit}"
