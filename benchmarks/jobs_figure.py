"""The picture of jobs.py: where the time of each way goes, from the shell to the adapter.

python benchmarks/jobs_figure.py benchmarks/results/jobs.json docs/images/jobs.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from jobs_report import Found, name_of, value_of
from train_step_figure import FAINT, INK, gpu, plain_axes

TITLES = {
    "a": "SmolLM2-135M's shape, 16 rows of some 64 tokens a step",
    "b": "Llama-3.2-1B's shape, 16 rows of some 64 tokens a step",
    "c": "Llama-3-8B's shape, 8 layers, 4 rows of 64 to 1,024 tokens a step",
    "d": "evaluating {rows} rows: losses and generated answers",
}
HEADING = "From the shell to the adapter: where the seconds of a command go"
PARTS = ("before", "stepping", "rest")
OURS, OTHERS = ("#14583f", "#2f9c74", "#b9decf"), ("#6f6f6f", "#a8a8a8", "#d9d9d9")
OURS_TEXT, OTHERS_TEXT = ("white", "white", INK), ("white", INK, INK)
NARROW = 0.045  # of the axis: a part below it has no room for its number


def draw(report: dict[str, Any], path: Path) -> None:
    """One panel for each of the jobs a to d, and in it a bar for each way; what failed or was left out says so."""
    from matplotlib.figure import Figure

    jobs = {name: found for name, found in report["jobs"].items() if name in TITLES}
    if not jobs:
        raise SystemExit("None of the jobs a to d was measured, so there is nothing to draw.")
    ways = {name: [way for way in found["ways"] if way != "bare"] for name, found in jobs.items()}
    rows = {name: places(each) for name, each in ways.items()}
    heights = [1.4, *(each[-1] + 2.3 for each in rows.values())]
    figure = Figure(figsize=(10.5, 0.5 + 0.3 * sum(heights)), dpi=160, layout="constrained", facecolor="white")
    top, *panels = figure.subplots(1 + len(jobs), 1, height_ratios=heights)
    key(top)
    for axes, (name, found) in zip(panels, jobs.items(), strict=True):
        panel(axes, name, found, dict(zip(ways[name], rows[name], strict=True)))
    figure.suptitle(HEADING, x=0.008, ha="left", fontsize=13, fontweight="bold", color=INK)
    last = next(reversed(jobs.values()))
    rounds = {found["settings"]["rounds"] for found in jobs.values()}
    cold = "a first start, which finds nothing compiled or tuned before"
    note = f"One {gpu(last)}; " + (cold if rounds == {1} else f"medians of the rounds after {cold}") + "."
    figure.supxlabel(note, x=0.008, ha="left", fontsize=8, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def places(ways: list[str]) -> list[float]:
    """Where the bars lie, with a gap where another method begins."""
    found: list[float] = []
    at = 0.0
    for way, before in zip(ways, [ways[0], *ways], strict=False):
        at += 0.5 * (way.split("-")[-1] != before.split("-")[-1])
        found.append(at)
        at += 1
    return found


def key(axes: Any) -> None:
    """What the shades say, in both colours."""
    from matplotlib.legend_handler import HandlerTuple
    from matplotlib.patches import Patch

    axes.set_axis_off()
    axes.legend(
        [(Patch(color=ours), Patch(color=other)) for ours, other in zip(OURS, OTHERS, strict=True)],
        [
            "until the first step is done (in d: start and end)",
            "the other steps (in d: losses and answers)",
            "the rest",
        ],
        handler_map={tuple: HandlerTuple(ndivide=None, pad=0)},
        loc="lower left",
        ncols=3,
        frameon=False,
        fontsize=9,
        labelcolor=INK,
        borderaxespad=0,
    )


def panel(axes: Any, name: str, found: Found, ways: dict[str, float]) -> None:
    """The bars of one job."""
    longest = max((value_of(found, way, "whole") or 0.0 for way in ways), default=0.0) or 1.0
    axes.set_xlim(0, 1.25 * longest)
    for way, place in ways.items():
        whole = value_of(found, way, "whole")
        if whole is None:
            told(axes, place, found["ways"][way])
        else:
            bar(axes, place, found, way, whole)
    settings = found["settings"]
    shape = "a tiny model in the place of " * bool(settings.get("tiny")) * (name != "d")
    steps = f", {settings['steps']} steps" if name != "d" else ""
    title = f"{name}   {shape}{TITLES[name].format(rows=found.get('rows', ''))}{steps}, seconds"
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.set_yticks(list(ways.values()), [name_of(way) for way in ways], fontsize=9, color=INK)
    axes.set_ylim(max(ways.values()) + 0.6, -0.6)
    for label, way in zip(axes.get_yticklabels(), ways, strict=True):
        label.set_fontweight("bold" if is_ours(way) else "normal")
    plain_axes(axes)


def bar(axes: Any, place: float, found: Found, way: str, whole: float) -> None:
    """A bar of three parts with their seconds, and the sum at its end."""
    before, stepping = (value_of(found, way, part) or 0.0 for part in PARTS[:2])
    left, room = 0.0, axes.get_xlim()[1]
    shades, inks = (OURS, OURS_TEXT) if is_ours(way) else (OTHERS, OTHERS_TEXT)
    parts = zip((before, stepping, max(0.0, whole - before - stepping)), shades, inks, strict=True)
    for length, shade, ink in parts:
        axes.barh(place, length, left=left, height=0.72, color=shade, zorder=2)
        if length > NARROW * room:
            axes.text(left + length / 2, place, number(length), ha="center", va="center", fontsize=8, color=ink)
        left += length
    style = {"textcoords": "offset points", "va": "center"}
    sum_ = axes.annotate(
        number(whole), (left, place), xytext=(6, 0), fontsize=9.5, fontweight="bold", color=INK, **style
    )
    first = value_of(found, way, "whole", first=True)
    if first is not None and any(not run["first"] for run in found["ways"][way]["runs"]):
        text = f"first start {number(first)}"
        axes.annotate(text, (1, 0.5), xycoords=sum_, xytext=(6, 0), fontsize=8, color=FAINT, **style)


def told(axes: Any, place: float, taken: dict[str, Any]) -> None:
    """Why there is no bar."""
    text = (
        f"failed: {taken['failed']}" if "failed" in taken else f"left out: {taken.get('skipped', 'no round was run')}"
    )
    text = text if len(text) <= 100 else f"{text[:99]}…"
    axes.annotate(
        text,
        (0, place),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        fontsize=8,
        color=FAINT,
        style="italic",
    )


def number(value: float) -> str:
    return f"{value:.0f}" if value >= 20 else f"{value:.1f}"


def is_ours(way: str) -> bool:
    """Whether it is this checkout's."""
    return "-" not in way


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")), Path(sys.argv[2]))
