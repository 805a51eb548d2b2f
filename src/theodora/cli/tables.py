"""Tables that lose no figure on a narrow terminal: what does not fit side by side comes below, under the same names."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

from rich.console import Console, RenderableType
from rich.measure import Measurement
from rich.table import Column, Table

_ANY_WIDTH = 10_000  # columns: more than any table has
_LEAST_NAME = 8  # columns in which a long name is still read, on several lines


def print_table(console: Console, table: Table) -> None:
    """Print a table whose first column names the rows, in as many pieces as the console's width asks for.

    Where it is too wide, headings (and long names, unless they must not wrap) take several lines; a figure never does.
    """
    for piece in _pieces(table, console):
        console.print(piece)


def _pieces(table: Table, console: Console) -> list[Table]:
    names, *others = table.columns
    if _measure(table, console).maximum <= console.width or not others:
        return [table]
    groups = list(_groups(others))
    least = _widest(names, console) if names.no_wrap else names.min_width or _LEAST_NAME
    if any(_fitted(table, [names, *group], least, console) is None for group in groups):
        least = _LEAST_NAME  # rather a name on several lines than a figure that is cut
    chosen: list[list[Column]] = []
    for group in groups:
        if chosen and _fitted(table, [names, *chosen[-1], *group], least, console) is not None:
            chosen[-1] += group
        else:
            chosen.append(list(group))
    pieces = [
        _fitted(table, [names, *columns], least, console) or _with_columns(table, [names, *columns])
        for columns in chosen
    ]
    for piece in pieces[1:]:
        piece.title = None
    for piece in pieces[:-1]:
        piece.caption = None
    return pieces


def _groups(columns: Sequence[Column]) -> Iterator[list[Column]]:
    """Columns that stay together: one without a heading belongs to the one before (a bar and its figure)."""
    group: list[Column] = []
    for column in columns:
        if group and str(column.header):
            yield group
            group = []
        group.append(column)
    yield group


def _fitted(table: Table, columns: Sequence[Column], least: int, console: Console) -> Table | None:
    """These columns, none wider than it must be, as a table; None if that leaves less than `least` for the names."""
    names, *figures = columns
    sized = [
        column if column.width is not None else replace(column, width=_needed(column, console)) for column in figures
    ]
    width = _widest(names, console)
    whole = _with_columns(table, [replace(names, width=width), *sized])
    if (excess := _measure(whole, console).maximum - console.width) <= 0:
        return whole
    if width - excess < least:
        return None
    return _with_columns(table, [replace(names, width=width - excess, no_wrap=False, overflow="fold"), *sized])


def _needed(column: Column, console: Console) -> int:
    """The width of a column of figures: its cells are whole, its heading may take a line for each word."""
    heading = _measure(column.header, console)
    cells = (_measure(cell, console).maximum for cell in column.cells)
    return max(heading.maximum if column.no_wrap else heading.minimum, *cells, 1)


def _widest(column: Column, console: Console) -> int:
    return max(_measure(cell, console).maximum for cell in (column.header, *column.cells))


def _measure(what: RenderableType, console: Console) -> Measurement:
    return Measurement.get(console, console.options.update_width(_ANY_WIDTH), what)


def _with_columns(table: Table, columns: Sequence[Column]) -> Table:
    other = copy.copy(table)
    other.columns = [replace(column, _index=index) for index, column in enumerate(columns)]
    return other
