"""The picture of train_step.py's table: step times against the floor, and memory.

python benchmarks/train_step_figure.py benchmarks/results/train_step.json docs/train_step.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

GIB = 2**30
INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
COLOURS = {"floor": "#9a9a9a", "peft": "#8fb3d9", "unsloth": "#e0a458", "ours": "#1f7a5c"}


def draw(report: dict[str, Any], path: Path) -> None:
    """Two panels of horizontal bars, one row for each variant that was measured."""
    from matplotlib.figure import Figure

    rows = [row for row in report["rows"] if row["failure"] is None]
    floor = next((row for row in rows if row["name"] == report["floor"]), None)
    if floor is None:
        raise SystemExit("The floor was not measured, so there is nothing to draw the others against.")
    figure = Figure(figsize=(11, 1.5 + 0.42 * len(rows)), dpi=160, layout="constrained", facecolor="white")
    times, memory = figure.subplots(1, 2, sharey=True, width_ratios=(3, 2))
    bars(times, rows, [1000 * row["step"] for row in rows], 1000 * floor["step"], "{:.0f}")
    bars(memory, rows, [row["peak"] / GIB for row in rows], floor["peak"] / GIB, "{:.1f}")
    times.set_title("time of a step, ms", loc="left", fontsize=10, color=INK)
    memory.set_title("peak memory, GiB", loc="left", fontsize=10, color=INK)
    times.set_yticks(range(len(rows)), [row["label"] for row in rows], fontsize=9, color=INK)
    times.invert_yaxis()
    for label, row in zip(times.get_yticklabels(), rows, strict=True):
        label.set_fontweight("bold" if kind(row["name"]) == "ours" else "normal")
    setting = report["title"].partition(", ")[2]
    heading = "What a training step costs: the frozen model, and adapters on it"
    figure.suptitle(heading, x=0.008, ha="left", fontsize=13, fontweight="bold", color=INK)
    note = f"Forward and backward on one {gpu(report)}: {setting}. Multiples are of the floor (dashed)."
    figure.supxlabel(note, x=0.008, ha="left", fontsize=8, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def bars(axes: Any, rows: list[dict[str, Any]], values: list[float], floor: float, shown: str) -> None:
    """One panel: bars with their values, a line at the floor."""
    axes.barh(range(len(rows)), values, height=0.68, color=[COLOURS[kind(row["name"])] for row in rows], zorder=2)
    axes.axvline(floor, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=3)
    halo = {"facecolor": "white", "edgecolor": "none", "pad": 1.0, "alpha": 0.85}  # over the grid and the dashed line
    for place, value in enumerate(values):
        text = f"{shown.format(value)}  ×{value / floor:.2f}"
        axes.annotate(
            text,
            (value, place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8.5,
            color=INK,
            bbox=halo,
        )
    axes.set_xlim(0, 1.3 * max(values))
    plain_axes(axes)


def plain_axes(axes: Any) -> None:
    """Horizontal bars over a faint grid, and no frame."""
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(axis="y", length=0)
    axes.tick_params(axis="x", colors=FAINT, labelsize=8)
    axes.grid(axis="x", color=GRID, linewidth=0.8, zorder=0)


def kind(name: str) -> str:
    """Whose variant it is."""
    first = name.split("-")[0]
    return first if first in COLOURS else "ours"


def gpu(report: dict[str, Any]) -> str:
    """Name of the GPU, or of the processor."""
    machine = report["machine"]
    return machine["gpus"][0].split(",")[0] if machine["gpus"] else machine["cpu"]


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))["table"], Path(sys.argv[2]))
