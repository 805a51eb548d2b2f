"""Heat maps of experts: one column for each layer, one row for each expert, colour for how far its rows moved."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Values = Mapping[int, Sequence[float | None]]
"""Layer → a value for each of its experts."""

_COLOURS, _NO_EXPERT = "viridis", "0.85"


def height_of(experts: int) -> float:
    """Of a panel, in inches: rows that can be told apart where experts are few, a picture where they are many."""
    return min(max(1.0, 0.16 * experts), 4.5)


def most_experts(*values: Values) -> int:
    """The rows of panels that stand side by side or below one another."""
    return max(len(experts) for each in values for experts in each.values())


def draw_experts(axes: Any, values: Values, title: str, layers: int, factor: float = 1.0) -> Any:
    """One panel; gives the image, for a colour bar.

    Args:
        axes: matplotlib's.
        values: a layer without experts is grey.
        title: of the panel.
        layers: columns.
        factor: by which values are shown: 100 for a share as a percentage.
    """
    rows = most_experts(values)
    grid = [[math.nan] * layers for _ in range(rows)]
    for layer, experts in values.items():
        for expert, value in enumerate(experts):
            grid[expert][layer] = math.nan if value is None else factor * value
    axes.set_facecolor(_NO_EXPERT)
    image = axes.imshow(grid, aspect="auto", cmap=_COLOURS, vmin=0, interpolation="nearest")
    axes.set_title(title, fontsize="small", loc="left")
    axes.set_xlabel("layer", fontsize="small")
    axes.set_ylabel("expert", fontsize="small")
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.tick_params(labelsize="small")
    return image


def by_layer(modules: Sequence[Any], name: str) -> dict[int, list[float | None]]:
    """Layer → the mean of each expert's values over the weights of the layer.

    Args:
        modules: reports of modules, with `layer` and `experts`.
        name: of the field of an expert.
    """
    found: dict[int, list[list[float | None]]] = {}
    for module in modules:
        if module.experts and module.layer is not None:
            found.setdefault(module.layer, []).append([getattr(expert, name) for expert in module.experts])
    return {layer: [_mean(values) for values in zip(*weights, strict=True)] for layer, weights in sorted(found.items())}


def _mean(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None and math.isfinite(value)]
    return math.fsum(known) / len(known) if known else None
