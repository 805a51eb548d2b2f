"""A table of experts for `theodora info` and `theodora inspect`: of each layer the least, the median and the most."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table

Shown = tuple[str, Mapping[int, Sequence["float | None"]], Callable[[float], str]]
"""What is shown: its name, layer → a value for each expert, and how one is written."""


def experts_table(measures: Sequence[Shown]) -> Table | None:
    """The table; None where no experts are adapted."""
    from rich import box
    from rich.table import Table

    layers = dict.fromkeys(layer for _, values, _ in measures for layer in values)
    if not layers:
        return None
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True, caption_justify="left")
    table.add_column("layer", justify="right", no_wrap=True)
    for name, _, _ in measures:
        table.add_column(name, justify="right", no_wrap=True)
        table.add_column("least", justify="right", no_wrap=True)
        table.add_column("most", justify="right", no_wrap=True)
    for layer in layers:
        cells = [cell for _, values, show in measures for cell in _cells(values.get(layer, ()), show)]
        table.add_row(str(layer), *cells)
    counts = sorted({len(experts) for _, values, _ in measures for experts in values.values()})
    table.caption = (
        f"of each layer's {' or '.join(map(str, counts))} experts the median one,\n"
        "and (in brackets) those that moved least and most"
    )
    return table


def _cells(values: Sequence[float | None], show: Callable[[float], str]) -> list[str]:
    known = [(value, expert) for expert, value in enumerate(values) if value is not None and math.isfinite(value)]
    if not known:
        return ["-"] * 3
    (least, of_least), (most, of_most) = min(known), max(known)
    median = statistics.median(value for value, _ in known)
    return [show(median), f"{show(least)} ({of_least})", f"{show(most)} ({of_most})"]
