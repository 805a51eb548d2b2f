"""Do rows that turn more also change more in length? The correlation of ΔM and ΔD over layers and checkpoints."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass

_Z = 1.959964  # of a 95 % interval


@dataclass(frozen=True)
class Correlation:
    """How ΔD and ΔM of the modules of one kind go together. None where too few layers, or none that moved, can tell."""

    kind: str
    points: int
    """Layers times checkpoints."""
    pearson: float | None
    """Over all of them, as in the DoRA paper's figure 2. Checkpoints of one run resemble each other, so these points
    are not independent: an interval would claim too much."""
    spearman: float | None
    """The same of the ranks: one outlying layer does not decide it."""
    by_checkpoint: tuple[float | None, ...]
    """Pearson's, over the layers of each checkpoint alone."""
    last_interval: tuple[float, float] | None
    """Of the last checkpoint's: 95 %, by Fisher's transformation, as if layers were independent."""


def correlate(kind: str, checkpoints: list[list[tuple[float, float]]]) -> Correlation:
    """Correlate pairs of ΔD and ΔM, a list of layers for each checkpoint. Pairs with NaN are left out."""
    known = [[pair for pair in layers if all(map(math.isfinite, pair))] for layers in checkpoints]
    pooled = [pair for layers in known for pair in layers]
    each = tuple(pearson(layers) for layers in known)
    last = each[-1] if each else None
    return Correlation(
        kind=kind,
        points=len(pooled),
        pearson=pearson(pooled),
        spearman=pearson(list(zip(*(_ranks(list(axis)) for axis in zip(*pooled, strict=True)), strict=True))),
        by_checkpoint=each,
        last_interval=None if last is None else interval(last, len(known[-1])),
    )


def pearson(pairs: list[tuple[float, float]]) -> float | None:
    """Pearson's correlation; None for fewer than three pairs, or if one side is the same everywhere."""
    if len(pairs) < 3:
        return None
    x, y = zip(*pairs, strict=True)
    try:
        return max(-1.0, min(1.0, statistics.correlation(x, y)))
    except statistics.StatisticsError:  # a constant side
        return None


def interval(r: float, count: int) -> tuple[float, float] | None:
    """The 95 % interval of Pearson's r of `count` independent pairs; None below four."""
    if count < 4 or abs(r) >= 1:
        return None
    middle, half = math.atanh(r), _Z / math.sqrt(count - 3)
    return math.tanh(middle - half), math.tanh(middle + half)


def _ranks(values: list[float]) -> list[float]:
    """1 for the smallest; equal ones share the mean of their ranks."""
    ordered = sorted(values)
    first = {value: index for index, value in reversed(list(enumerate(ordered)))}
    return [first[value] + (ordered.count(value) + 1) / 2 for value in values]
