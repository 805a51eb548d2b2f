"""Measurements as rows, and rows as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import TYPE_CHECKING, Any

from theodora.bench.machine import bf16_peak
from theodora.bench.runner import Measured

if TYPE_CHECKING:
    from rich.table import Table

GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """Median, smallest and largest of the rounds' ratios."""

    median: float
    min: float
    max: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What the table says of one variant. Times in seconds, memory in bytes."""

    name: str
    label: str
    failure: str | None = None
    step: float = 0.0
    """Median of all timed steps."""
    step_min: float = 0.0
    tokens_per_second: float = 0.0
    flops_share: float | None = None
    """Of the GPU's bf16 peak, counting what the frozen model alone must compute."""
    peak: int = 0
    reserved: int = 0
    model: int = 0
    """Memory before the adapter came."""
    first_step: float = 0.0
    first_loss: float = 0.0
    trained_parameters: int = 0
    why_no_graph: str | None = None
    """Why its steps did not run as the CUDA graph that the variant asks for."""
    ratios: Mapping[str, Ratio] = field(default_factory=dict[str, Ratio])
    """Name of another variant → step time against it."""
    peak_ratios: Mapping[str, float] = field(default_factory=dict[str, float])


def make_rows(measured: Mapping[str, Measured], against: Sequence[str]) -> list[Row]:
    """Rows in the order of `measured`, with ratios to the variants named in `against`."""
    return [_row(name, measured, [a for a in against if _done(measured.get(a))]) for name in measured]


def plain_rows(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Rows as JSON takes them."""
    return [asdict(row) for row in rows]


def timings(measured: Mapping[str, Measured]) -> dict[str, Any]:
    """Name → number of the round → seconds of each timed step; variants that alternated share the numbers."""
    return {name: m.rounds for name, m in measured.items() if m.rounds}


def differing_losses(rows: Sequence[Row]) -> str | None:
    """Every adapter starts as the identity, so all first losses are one, up to the dtype's rounding; else a warning."""
    losses = {row.label: row.first_loss for row in rows if row.failure is None}
    if not losses or max(losses.values()) <= 1.01 * min(losses.values()):
        return None
    listed = ", ".join(f"{label} {loss:.4f}" for label, loss in losses.items())
    return f"First losses differ, so this compares different work: {listed}"


def step_table(rows: Sequence[Row], *, title: str, caption: str = "", floor: str = "floor") -> Table:
    """Milliseconds, ratios to the floor, memory, and so on, for a terminal."""
    from rich.table import Table

    share = any(row.flops_share for row in rows)
    notes = [caption, *(f"{row.label}: {row.failure}" for row in rows if row.failure)]
    notes += [f"{row.label}: no CUDA graph ({row.why_no_graph})" for row in rows if row.why_no_graph]
    table = Table(title=title, caption="\n".join(filter(None, notes)), caption_justify="left", caption_style="dim")
    table.add_column("", no_wrap=True)
    columns = ["ms", "× floor", "peak GiB", "× floor", "tokens/s", *["% of peak"] * share, "first step s"]
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(row.label, *_cells(row, floor, share))
    return table


def _cells(row: Row, floor: str, share: bool) -> list[str]:
    if row.failure is not None:
        return ["failed"]
    ratio = row.ratios.get(floor)
    cells = [
        f"{1000 * row.step:.1f}",
        f"{ratio.median:.3f}" if ratio else "",
        f"{row.peak / GIB:.2f}",
        f"{row.peak_ratios[floor]:.3f}" if floor in row.peak_ratios else "",
        f"{row.tokens_per_second:,.0f}",
    ]
    if share:
        cells.append(f"{100 * row.flops_share:.1f}" if row.flops_share else "")
    return [*cells, f"{row.first_step:.1f}"]


def _row(name: str, measured: Mapping[str, Measured], against: Sequence[str]) -> Row:
    m = measured[name]
    label = m.job.variant.label
    if m.loaded is None or m.memory is None or m.failure is not None:
        return Row(name=name, label=label, failure=m.failure.reason if m.failure else "not measured")
    step, peak = _step(m), bf16_peak(m.loaded.device)
    return Row(
        name=name,
        label=label,
        step=step,
        step_min=min(min(turn) for turn in m.rounds.values()),
        tokens_per_second=m.job.workload.tokens / step,
        flops_share=m.loaded.flops / step / peak if peak else None,
        peak=max(m.memory.peak, m.loaded.model_bytes),  # what the kernel says of a process lags some pages behind
        reserved=m.memory.reserved,
        model=m.loaded.model_bytes,
        first_step=m.loaded.first_step_seconds,
        first_loss=m.loaded.first_loss,
        trained_parameters=m.loaded.trained_parameters,
        why_no_graph=m.why_no_graph,
        ratios={other: _ratio(m, measured[other]) for other in against},
        peak_ratios={other: m.memory.peak / measured[other].memory.peak for other in against},  # pyright: ignore
    )


def _ratio(m: Measured, other: Measured) -> Ratio:
    """Within the rounds that both took part in; of the medians, if there are none."""
    shared = m.rounds.keys() & other.rounds.keys()
    ratios = [median(m.rounds[i]) / median(other.rounds[i]) for i in shared] or [_step(m) / _step(other)]
    return Ratio(median=median(ratios), min=min(ratios), max=max(ratios))


def _step(m: Measured) -> float:
    return median(second for turn in m.rounds.values() for second in turn)


def _done(m: Measured | None) -> bool:
    return m is not None and m.failure is None and bool(m.rounds)
