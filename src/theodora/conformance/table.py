"""Rows as tables: a matrix of what held, the worst error of each operation, and every kind of failure."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING, Any

from rich.text import Text

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
    for library in libraries:
        if failed := failures([row for row in rows if row.library == library]):
            yield failure_table(failed, titles[library])
    if full:
        yield every_row(rows, titles)


def matrix(rows: Sequence[Row], titles: dict[str, str]) -> Table:
    """Operation × method × library: how many rows held."""
    table = _table("Rows that kept their bound to the float64 formula")
    table.add_column("", no_wrap=True)
    for title in titles.values():
        for method in METHODS:
            table.add_column(f"{title}\n{VARIANTS[method].title}", justify="right", no_wrap=True)

    def counts(operation: str | None) -> list[Text]:
        return [
            _count(tally(row for row in rows if _is(row, library, operation) and _method(row) == method))
            for library in titles
            for method in METHODS
        ]

    for _, group in groupby(_present(rows), key=lambda key: OPERATIONS[key].group):
        keys = list(group)
        table.add_section()
        table.add_row(Text(OPERATIONS[keys[0]].group, style="bold"))
        for key in keys:
            table.add_row(f"  {OPERATIONS[key].title}", *counts(key))
    table.add_section()
    table.add_row(Text("all", style="bold"), *counts(None))
    if any(row.status in ("failed", "refused", "raised") for row in rows):
        table.caption = "Red: wrong results among them. Yellow: only errors that were raised."
    return table


def worst_errors(rows: Sequence[Row], titles: dict[str, str]) -> Table:
    """Ours: the row nearest to its bound. A peer's: the largest errors, without what is wrong in every operation."""
    table = _table("The worst of each operation: relative error, and the bound it had to keep")
    table.add_column("", no_wrap=True)
    peers = [library for library in titles if library != "theodora"]
    if "theodora" in titles:
        for column in ("Theodora", "bound", "share"):
            table.add_column(column, justify="right", no_wrap=True)
        table.add_column("where", style="dim")
    for library in peers:
        for method in METHODS:
            table.add_column(f"{TITLES[library]}\n{VARIANTS[method].title}", justify="right", no_wrap=True)
    for key in _present(rows):
        cells: list[RenderableType] = []
        if "theodora" in titles:
            worst = tally(row for row in rows if _is(row, "theodora", key)).worst
            cells += (
                ["", "", "", ""]
                if worst is None
                else [_error(worst), _number(worst.bound), _share(worst), _where(worst) if worst.error else ""]
            )
        for library in peers:
            for method in METHODS:
                cells.append(_largest(r for r in rows if _is(r, library, key) and _method(r) == method and _usual(r)))
        table.add_row(OPERATIONS[key].title, *cells)
    if peers:
        table.caption = (
            "Peers: the largest error, leaving out rows of zeros, and PiSSA and OLoRA, which change their base."
        )
    return table


@dataclass(frozen=True)
class Failure:
    """Rows that did not hold in the same way."""

    operations: tuple[str, ...]
    said: str
    kinds: tuple[str, ...]
    variants: tuple[str, ...]
    dtypes: tuple[str, ...]
    rows: tuple[Row, ...]


def failures(rows: Iterable[Row]) -> list[Failure]:
    """What did not hold: NaN, exceptions and rows of zeros once for all operations, the rest for each operation."""
    alike: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        if row.status in ("failed", "refused", "raised"):
            alike.setdefault((row.operation, _reason(row)), []).append(row)
    merged: dict[tuple[Any, ...], list[Row]] = {}
    for (operation, said), members in alike.items():
        where = (_ordered(members, "kind", KIND_TITLES), _ordered(members, "variant", VARIANTS))
        together = said == _NAN or members[0].status != "failed" or where[0] == ("zero_rows",)
        own_operation = "" if together else operation
        merged.setdefault((own_operation, said, *where), []).extend(members)
    several = [
        Failure(
            _ordered(members, "operation", OPERATIONS),
            said,
            kinds,
            variants,
            _ordered(members, "dtype", DTYPES),
            tuple(members),
        )
        for (_, said, kinds, variants), members in merged.items()
    ]
    place = list(OPERATIONS)
    return sorted(several, key=lambda f: (-len(f.operations), place.index(f.operations[0]), -len(f.rows)))


def failure_table(failed: Sequence[Failure], title: str) -> Table:
    """One library's failures."""
    table = _table(f"{title}: what did not hold")
    table.add_column("operation")
    table.add_column("layers, adapters, dtypes", style="dim")
    table.add_column("rows", justify="right", no_wrap=True)
    table.add_column("largest\nerror", justify="right", no_wrap=True)
    table.add_column("what")
    for failure in failed:
        table.add_row(
            _listed([OPERATIONS[key].title for key in failure.operations], len(OPERATIONS)),
            f"{_listed([KIND_TITLES[kind] for kind in failure.kinds], len(KIND_TITLES))}; "
            f"{_listed([VARIANTS[variant].title for variant in failure.variants], len(VARIANTS))}; "
            f"{_listed(list(failure.dtypes), len(DTYPES))}",
            str(len(failure.rows)),
            "" if failure.said == _NAN else _error(max(failure.rows, key=_badness)),
            failure.said,
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
            Text(row.status, style="" if row.status == "held" else "red"),
            row.message or row.what,
            _error(row),
            _number(row.bound),
        )
    return table


def _table(title: str) -> Table:
    from rich import box
    from rich.table import Table

    return Table(title=title, title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)


_NAN = "NaN or absent"


def _is(row: Row, library: str, operation: str | None) -> bool:
    return row.library == library and operation in (None, row.operation)


def _usual(row: Row) -> bool:
    """Neither NaN in every operation nor about a base that the start has changed."""
    return row.kind != "zero_rows" and VARIANTS[row.variant].init not in ("pissa", "olora")


def _reason(row: Row) -> str:
    if row.status != "failed":
        return f"{row.status}: {re.sub(rf'.{row.kind}.', ' … ', row.message)}"
    return _NAN if row.error == float("inf") else row.what


def _ordered(rows: Sequence[Row], field: str, order: Iterable[str]) -> tuple[str, ...]:
    there = {getattr(row, field) for row in rows}
    return tuple(name for name in order if name in there)


def _largest(rows: Iterable[Row]) -> Text:
    """The largest error; in red if it is beyond its bound, and what came instead where nothing was computed."""
    rows = list(rows)
    t = tally(rows)
    if not t.total or t.not_offered == t.total:
        return Text("–", style="dim")
    judged = [row for row in rows if row.error is not None]
    if not judged:
        return Text("raised" if t.raised else "refused", style="yellow")
    worst = max(judged, key=lambda row: (row.status == "failed", row.error or 0.0))
    return Text(_error(worst), style="" if worst.status == "held" else "red")


def _share(row: Row) -> str:
    return f"{100 * row.error / row.bound:.0f} %" if row.error is not None and row.bound else ""


def _method(row: Row) -> str:
    return VARIANTS[row.variant].method


def _present(rows: Sequence[Row]) -> list[str]:
    there = {row.operation for row in rows}
    return [key for key in OPERATIONS if key in there]


def _count(t: Tally) -> Text:
    """`448`, or `12 of 448` with what became of the others; a dash where the library has no such operation."""
    offered = t.total - t.not_offered
    if not offered:
        return Text("–", style="dim")
    if t.held == offered:
        return Text(str(t.held), style="green")
    return Text(f"{t.held} of {offered}", style="red" if t.failed else "yellow")


def _badness(row: Row) -> float:
    if row.error is None:
        return -1.0
    if row.bound:
        return row.error / row.bound
    return 0.0 if row.error == 0 else float("inf")


def _error(row: Row) -> str:
    if row.error is None:
        return ""
    return "NaN" if row.error == float("inf") else _number(row.error)


def _number(value: float | None) -> str:
    if value is None:
        return ""
    if value == 0:
        return "0"
    if value < 1e-4:
        return f"{value:.1e}"
    return f"{100 * value:.0f} %" if value >= 0.1 else f"{100 * value:.2g} %"


def _where(row: Row) -> str:
    return f"{row.what}; {KIND_TITLES[row.kind]}; {VARIANTS[row.variant].title}; {row.dtype}"


def _listed(names: list[str], everything: int) -> str:
    distinct = list(dict.fromkeys(names))
    if len(distinct) == everything:
        return "all"
    return ", ".join(distinct) if len(distinct) <= 3 else f"{', '.join(distinct[:2])} and {len(distinct) - 2} more"
