"""The report's figures, as SVG to be put into the page."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from itertools import count
from typing import Any

from theodora.compare.cells import Record
from theodora.compare.methods import Variant
from theodora.compare.stats import Estimate
from theodora.compare.summary import Line, front

_COLOURS = (
    "#3b6fb6",
    "#d1603d",
    "#1f7a5c",
    "#8a5aa8",
    "#b08a1e",
    "#c2497f",
    "#4a4a4a",
    "#3a9fb0",
    "#7f8c2d",
    "#a0522d",
)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
_SIZE = (4.8, 3.5)  # inches; scaled to the page's width
_numbers = count()


def score_against_parameters(lines: Sequence[Line], variants: Sequence[Variant]) -> str | None:
    """Mean test score over the number of trained parameters (logarithmic), with intervals; ranks of a method joined."""
    scored = [(line, line.score) for line in lines if line.score is not None]
    if not scored:
        return None
    figure, axes = _axes("trained parameters", "test score (%)")
    axes.set_xscale("log")
    for name, colour in _colours(variants).items():
        own = sorted((line.parameters, score) for line, score in scored if line.variant.name == name)
        if own:
            x, y = [parameters for parameters, _ in own], [100 * score.mean for _, score in own]
            axes.errorbar(
                x, y, yerr=_halves([score for _, score in own]), color=colour, marker="o", label=name, **_LINE
            )
    return _finish(figure, axes)


def score_against_forgetting(lines: Sequence[Line], variants: Sequence[Variant], base: Record | None) -> str | None:
    """Mean test score over the loss on general text, with intervals both ways, and the front of the best."""
    points = [
        (line, line.score, line.general_loss)
        for line in lines
        if line.score is not None and line.general_loss is not None
    ]
    if not points:
        return None
    figure, axes = _axes("loss on general text (left: less forgotten)", "test score (%)")
    colours, markers = _colours(variants), _markers(variants)
    for line, score, general in points:
        axes.errorbar(
            [general.mean],
            [100 * score.mean],
            xerr=_halves([general], 1.0),
            yerr=_halves([score]),
            color=colours[line.variant.name],
            marker=markers[line.variant.rank],
            label=line.variant.key,
            **{**_LINE, "linestyle": "none"},
        )
    best = front([(general.mean, score.mean) for _, score, general in points])
    axes.plot(
        [points[i][2].mean for i in best],
        [100 * points[i][1].mean for i in best],
        color="#999999",
        linewidth=1,
        linestyle=":",
        zorder=1,
        label="front",
    )
    if base is not None and base.general_loss is not None:
        axes.axvline(base.general_loss, color="#bbbbbb", linewidth=1)
        axes.annotate(
            "base model", (base.general_loss, 0.02), xycoords=("data", "axes fraction"), fontsize=7, color="#888888",
            xytext=(3, 0), textcoords="offset points",
        )  # fmt: skip
    return _finish(figure, axes)


def learning_curves(lines: Sequence[Line], variants: Sequence[Variant], rank: int | None) -> str | None:
    """Mean loss on validation rows along the runs, of the methods at one rank."""
    figure, axes = _axes("step", "validation loss (nats)")
    colours, drawn = _colours(variants), False
    for line in lines:
        curves = [run.curve for run in line.runs if run.curve]
        if curves and line.variant.rank in (rank, None):
            steps = [step for step, _ in curves[0]]
            means = [sum(curve[i][1] for curve in curves) / len(curves) for i in range(len(steps))]
            dashes = "--" if line.variant.replay else "-"
            axes.plot(
                steps,
                means,
                color=colours[line.variant.name],
                linewidth=1.6,
                linestyle=dashes,
                marker="o",
                markersize=3,
                label=line.variant.key,
            )
            drawn = True
    if not drawn:
        return None
    axes.set_yscale("log")
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    axes.yaxis.set_major_locator(LogLocator(10, (1, 2, 5)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.yaxis.set_minor_formatter(NullFormatter())
    return _finish(figure, axes)


def rates(
    by_variant: Sequence[tuple[Variant, Sequence[tuple[float, float]]]], variants: Sequence[Variant], what: str
) -> str | None:
    """What each learning rate came to on validation rows. Takes (learning rate, value) of each variant."""
    figure, axes = _axes("learning rate", what)
    axes.set_xscale("log")
    colours, markers, drawn = _colours(variants), _markers(variants), False
    for variant, points in by_variant:
        if len(points) > 1:
            axes.plot(
                *zip(*points, strict=True),
                color=colours[variant.name],
                marker=markers[variant.rank],
                label=variant.key,
                linewidth=1.2,
                markersize=4,
                alpha=0.85,
            )
            drawn = True
    ticks = sorted({rate for _, points in by_variant for rate, _ in points})
    axes.set_xticks(ticks, [f"{rate:g}" for rate in ticks])
    axes.minorticks_off()
    return _finish(figure, axes) if drawn else None


_LINE: dict[str, Any] = {"linewidth": 1.4, "markersize": 5, "capsize": 2, "elinewidth": 1}


def _halves(estimates: Sequence[Estimate], scale: float = 100.0) -> list[float]:
    return [scale * (estimate.half_width or 0.0) for estimate in estimates]


def _colours(variants: Sequence[Variant]) -> dict[str, str]:
    names = list(dict.fromkeys(variant.name for variant in variants))
    return {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(names)}


def _markers(variants: Sequence[Variant]) -> dict[int | None, str]:
    ranks = sorted({variant.rank for variant in variants}, key=lambda rank: rank or 0)
    return {rank: _MARKERS[i % len(_MARKERS)] for i, rank in enumerate(ranks)}


def _axes(x: str, y: str) -> tuple[Any, Any]:
    # The figure class itself, not pyplot: no windows, and no state shared with a user's own figures.
    from matplotlib.figure import Figure

    figure = Figure(figsize=_SIZE, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x, fontsize=8, color="#444444")
    axes.set_ylabel(y, fontsize=8, color="#444444")
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.grid(axis="y", color="#e6e6e6", linewidth=0.8)
    axes.set_axisbelow(True)
    return figure, axes


def _finish(figure: Any, axes: Any) -> str:
    import matplotlib

    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    columns = 3 if len(unique) <= 9 else 4
    figure.legend(
        unique.values(), unique.keys(), loc="outside lower center", ncols=columns, fontsize=7, frameon=False,
        handlelength=1.4, columnspacing=1.0,
    )  # fmt: skip
    rows = -(-len(unique) // columns)
    figure.set_size_inches(_SIZE[0], _SIZE[1] + 0.16 * rows)
    text = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "theodora", "font.family": "sans-serif"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    return _inline(text.getvalue())


def _inline(svg: str) -> str:
    """The svg element alone, as wide as its place, with ids that no other figure of the page has."""
    svg = svg[svg.index("<svg") :]
    prefix = f"f{next(_numbers)}-"
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r'(href="|url\()#', rf"\1#{prefix}", svg)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    return re.sub(
        r'<svg (.*?)width="[^"]*"', r'<svg \1width="100%"', re.sub(r' height="[^"]*pt"', "", svg, count=1), count=1
    )
