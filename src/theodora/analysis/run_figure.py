"""The DoRA paper's figure 2 for your own runs: ΔM against ΔD, a point for each layer; and a heat map of modules."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theodora.analysis.expert_figure import by_layer, draw_experts, height_of
from theodora.analysis.run import RunReport
from theodora.errors import CheckpointError, ConfigError
from theodora.files.atomic import atomic_write
from theodora.safe_text import in_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SCATTER, HEAT_MAP, EXPERTS = "scatter.png", "heat_map.png", "experts.png"
_COLOURS = "viridis"


def draw_run_figures(reports: list[RunReport], folder: str | Path) -> list[Path]:
    """Write scatter.png and heat_map.png into `folder`, which is made if need be; experts.png, where some are adapted.

    Raises:
        ConfigError: no run changed a module in a numbered layer.
        CheckpointError: the folder cannot be made.
    """
    reports = [report for report in reports if report.correlations]
    if not reports:
        raise ConfigError("There is nothing to draw: no changed module stands in a numbered layer.")
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be made: {error.strerror}.") from error
    drawn = []
    figures = {SCATTER: _scatter(reports), HEAT_MAP: _heat_map(reports)}
    if of_experts := [report for report in reports if any(module.experts for module in report.last.modules)]:
        figures[EXPERTS] = _of_experts(of_experts)
    for name, figure in figures.items():
        with atomic_write(Path(folder) / name) as partial:
            figure.savefig(partial, format="png", dpi=130)
        drawn.append(Path(folder) / name)
    return drawn


def _scatter(reports: list[RunReport]) -> Figure:
    """A row for each run, a column for each kind of module; early checkpoints dark, late ones bright."""
    from matplotlib.figure import Figure

    kinds = _kinds(reports)
    size = (1.4 + 2.3 * len(kinds), 0.5 + 2.4 * len(reports))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(reports), len(kinds), squeeze=False)
    for row, report in zip(grid, reports, strict=True):
        of_kind = {correlation.kind: correlation for correlation in report.correlations}
        for axes, kind in zip(row, kinds, strict=True):
            correlation = of_kind.get(kind)
            r = None if correlation is None else correlation.pearson
            axes.set_title(
                in_figure(kind) + ("" if r is None else f"  r = {r:+.2f}".replace("-", "−")), fontsize="small"
            )
            axes.tick_params(labelsize="x-small")
            axes.ticklabel_format(style="sci", scilimits=(-2, 3))
            for text in (axes.xaxis.get_offset_text(), axes.yaxis.get_offset_text()):
                text.set_fontsize("x-small")
            _points(axes, report, kind)
            axes.set_xlabel("ΔD", fontsize="small")
        row[0].set_ylabel(f"{_name(report)}\nΔM", fontsize="small")
        row[-1].legend(fontsize="x-small", loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    return figure


def _points(axes: Any, report: RunReport, kind: str) -> None:
    from matplotlib import colormaps

    last = max(1, len(report.checkpoints) - 1)
    for index, checkpoint in enumerate(report.checkpoints):
        pairs = [(m.direction, m.magnitude) for m in checkpoint.modules if m.kind == kind and m.layer is not None]
        x, y = zip(*pairs, strict=True) if pairs else ((), ())
        colour = colormaps[_COLOURS](0.9 * index / last)
        axes.scatter(x, y, s=14, color=colour, alpha=0.8, linewidths=0, label=checkpoint.label)


def _heat_map(reports: list[RunReport]) -> Figure:
    """A row for each run, ΔD left and ΔM against the rows' length right: layers across, kinds down."""
    from matplotlib.figure import Figure

    kinds = _kinds(reports)
    layers = 1 + max(m.layer or 0 for report in reports for m in report.last.modules)
    size = (2 * max(3.6, 1.8 + 0.13 * layers), len(reports) * (0.9 + 0.24 * len(kinds)))
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(reports), 2, squeeze=False)
    for row, report in zip(grid, reports, strict=True):
        last = report.last
        panels = {"direction ΔD": "direction", "magnitude ΔM / ‖w‖ (%)": "relative_magnitude"}
        for axes, (title, name) in zip(row, panels.items(), strict=True):
            factor = 100 if name == "relative_magnitude" else 1
            values = {(m.kind, m.layer): factor * getattr(m, name) for m in last.modules}
            cells = [[values.get((kind, layer), math.nan) for layer in range(layers)] for kind in kinds]
            image = axes.imshow(cells, aspect="auto", cmap=_COLOURS, vmin=0, interpolation="nearest")
            axes.set_title(f"{_name(report)}, {last.label}: {title}", fontsize="small", loc="left")
            axes.set_yticks(range(len(kinds)), map(in_figure, kinds), fontsize="x-small")
            axes.tick_params(axis="x", labelsize="x-small")
            axes.set_xlabel("layer", fontsize="x-small")
            bar = figure.colorbar(image, ax=axes, pad=0.01).ax
            bar.tick_params(labelsize="x-small")
            bar.yaxis.get_offset_text().set_fontsize("x-small")
    return figure


def _of_experts(reports: list[RunReport]) -> Figure:
    """A row for each run, ΔD of each expert left and ΔM right: layers across, experts down."""
    from matplotlib.figure import Figure

    layers = 1 + max(m.layer or 0 for report in reports for m in report.last.modules)
    experts = max(len(m.experts) for report in reports for m in report.last.modules)
    size = (2 * max(3.6, 1.8 + 0.13 * layers), len(reports) * (0.9 + height_of(experts)))
    figure = Figure(figsize=size, layout="constrained")
    for row, report in zip(figure.subplots(len(reports), 2, squeeze=False), reports, strict=True):
        panels = {"direction ΔD": ("direction", 1), "magnitude ΔM / ‖w‖ (%)": ("relative_magnitude", 100)}
        for axes, (title, (name, factor)) in zip(row, panels.items(), strict=True):
            whole = f"{_name(report)}, {report.last.label}: {title}"
            image = draw_experts(axes, by_layer(report.last.modules, name), whole, layers, factor)
            bar = figure.colorbar(image, ax=axes, pad=0.01).ax
            bar.tick_params(labelsize="x-small")
            bar.yaxis.get_offset_text().set_fontsize("x-small")
    return figure


def _kinds(reports: list[RunReport]) -> list[str]:
    return list(dict.fromkeys(correlation.kind for report in reports for correlation in report.correlations))


def _name(report: RunReport) -> str:
    return in_figure(Path(report.path).name)
