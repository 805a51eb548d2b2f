"""Rows as tables: a matrix of what held, the worst error of each operation, and every kind of failure."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from theodora.conformance.cases import DTYPES, KIND_TITLES, VARIANTS
from theodora.conformance.operations import OPERATIONS
from theodora.conformance.suite import Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

TITLES = {"theodora": "Theodora", "peft": "PEFT"}
METHODS = ("lora", "dora")


@dataclass(frozen=True)
class Tally:
    """What became of some rows."""

    total: int
    held: int
    failed: int
    refused: int
    raised: int
    not_offered: int
    worst: Row | None
    """The row nearest to its bound, or farthest beyond it."""


def tally(rows: Iterable[Row]) -> Tally:
    """Count rows by what became of them."""
    rows = list(rows)
    counts = Counter(row.status for row in rows)
    judged = [row for row in rows if row.error is not None]
    return Tally(
        total=len(rows),
        held=counts["held"],
        failed=counts["failed"],
        refused=counts["refused"],
        raised=counts["raised"],
        not_offered=counts["not offered"],
        worst=max(judged, key=_badness) if judged else None,
    )


def report(rows: Sequence[Row], versions: dict[str, str], full: bool = False) -> Iterable[RenderableType]:
    """The tables, one after the other."""
    libraries = [library for library in TITLES if any(row.library == library for row in rows)]
    titles = {library: f"{TITLES[library]} {versions.get(library, '')}".strip() for library in libraries}
    yield matrix(rows, titles)
    yield worst_errors(rows, titles)
    if failures := failure_table(rows, titles):
        yield failures
    if full:
        yield every_row(rows, titles)


def matrix(rows: Sequence[Row], titles: dict[str, str]) -> Table:
    """Operation × method × library: how many rows held."""
    table = _table("Conformance to the float64 formula: rows that kept their bound")
    table.add_column("")
    for title in titles.values():
        for method in METHODS:
            table.add_column(f"{title}\n{VARIANTS[method].title}", justify="right", no_wrap=True)
    for _, group in groupby(_present(rows), key=lambda key: OPERATIONS[key].group):
        keys = list(group)
        table.add_section()
        table.add_row(f"[bold]{OPERATIONS[keys[0]].group}[/]")
        for key in keys:
            cells = [_count(tally(_select(rows, key, library, method))) for library in titles for method in METHODS]
            table.add_row(f"  {OPERATIONS[key].title}", *cells)
    table.add_section()
    totals = [
        _count(tally(row for row in rows if row.library == library and _method(row) == method))
        for library in titles
        for method in METHODS
    ]
    table.add_row("[bold]all[/]", *totals)
    return table


def worst_errors(rows: Sequence[Row], titles: dict[str, str]) -> Table:
    """Operation × library: the row nearest to its bound, or farthest beyond it."""
    table = _table("The worst of each operation: relative error, and the bound it had to keep")
    table.add_column("")
    for title in titles.values():
        table.add_column(title, justify="right", no_wrap=True)
        table.add_column("bound", justify="right", no_wrap=True)
        table.add_column("where", style="dim", overflow="fold")
    for key in _present(rows):
        cells: list[str] = []
        for library in titles:
            worst = tally(row for row in rows if row.operation == key and row.library == library).worst
            cells += ["", "", ""] if worst is None else [_error(worst), _number(worst.bound), _where(worst)]
        table.add_row(OPERATIONS[key].title, *cells)
    return table


def failure_table(rows: Sequence[Row], titles: dict[str, str]) -> Table | None:
    """What did not hold, rows of the same kind together."""
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.status in ("failed", "refused", "raised"):
            said = row.what if row.status == "failed" else row.message
            groups.setdefault((row.library, row.operation, row.status, said, row.kind), []).append(row)
    if not groups:
        return None
    table = _table("What did not hold")
    for column in ("", "operation", "layers", "adapters", "dtypes"):
        table.add_column(column, overflow="fold")
    table.add_column("rows", justify="right")
    table.add_column("error", justify="right", no_wrap=True)
    table.add_column("what", overflow="fold")
    order = {library: i for i, library in enumerate(titles)}
    merged: dict[tuple[str, ...], list[Row]] = {}
    for (library, operation, status, said, _), members in groups.items():
        merged.setdefault((library, operation, status, said), []).extend(members)
    place = {key: i for i, key in enumerate(OPERATIONS)}
    for (library, operation, status, said), members in sorted(
        merged.items(), key=lambda item: (order[item[0][0]], place[item[0][1]], -len(item[1]))
    ):
        worst = max(members, key=_badness)
        table.add_row(
            TITLES[library],
            OPERATIONS[operation].title,
            _listed([KIND_TITLES[row.kind] for row in members], len(KIND_TITLES)),
            _listed([VARIANTS[row.variant].title for row in members], len(VARIANTS)),
            _listed([row.dtype for row in members], len(DTYPES)),
            str(len(members)),
            _error(worst) if status == "failed" else status,
            said,
        )
    return table


def every_row(rows: Sequence[Row], titles: dict[str, str]) -> Table:
    """All of them."""
    table = _table("Every row")
    for column in ("", "operation", "adapter", "layer", "dtype", "", "what"):
        table.add_column(column)
    for column in ("error", "bound"):
        table.add_column(column, justify="right", no_wrap=True)
    place = {key: i for i, key in enumerate(OPERATIONS)}
    for row in sorted(rows, key=lambda r: (place[r.operation], list(titles).index(r.library))):
        table.add_row(
            TITLES[row.library],
            OPERATIONS[row.operation].title,
            VARIANTS[row.variant].title,
            KIND_TITLES[row.kind],
            row.dtype,
            row.status if row.status == "held" else f"[red]{row.status}[/]",
            row.message or row.what,
            _error(row),
            _number(row.bound),
        )
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


def _select(rows: Sequence[Row], operation: str, library: str, method: str) -> Iterable[Row]:
    return (r for r in rows if r.operation == operation and r.library == library and _method(r) == method)


def _method(row: Row) -> str:
    return VARIANTS[row.variant].method


def _present(rows: Sequence[Row]) -> list[str]:
    there = {row.operation for row in rows}
    return [key for key in OPERATIONS if key in there]


def _count(t: Tally) -> str:
    """`448`, or `12 of 448` with what became of the others; a dash where the library has no such operation."""
    offered = t.total - t.not_offered
    if not offered:
        return "[dim]–[/]"
    if t.held == offered:
        return f"[green]{t.held}[/]"
    silent = t.failed
    return f"[{'red' if silent else 'yellow'}]{t.held} of {offered}[/]"


def _badness(row: Row) -> float:
    if row.error is None:
        return -1.0
    if row.bound:
        return row.error / row.bound
    return 0.0 if row.error == 0 else float("inf")


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    return "NaN or absent" if row.error == float("inf") else _number(row.error)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    return f"{100 * value:.2g} %" if value >= 1e-4 else f"{value:.1e}"


def _where(row: Row) -> str:
    return f"{row.what}, {VARIANTS[row.variant].title}, {KIND_TITLES[row.kind]}, {row.dtype}"


def _listed(names: list[str], everything: int) -> str:
    distinct = list(dict.fromkeys(names))
    if len(distinct) == everything:
        return "all"
    return ", ".join(distinct) if len(distinct) <= 3 else f"{', '.join(distinct[:2])} and {len(distinct) - 2} more"
