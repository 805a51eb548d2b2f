"""A heat map of an adapter: one column for each layer, one row for each kind, colour for how far the rows moved."""

from __future__ import annotations

import math
from pathlib import Path

from theodora.analysis.expert_figure import Values, by_layer, draw_experts, height_of, most_experts
from theodora.analysis.inspection import AdapterReport, ModuleReport
from theodora.errors import ConfigError
from theodora.files.atomic import atomic_write
from theodora.safe_text import in_figure

FORMATS = ("png", "svg", "pdf")


def figure_format(path: str | Path) -> str:
    """The format that a figure's file name asks for.

    Raises:
        ConfigError: none that can be drawn.
    """
    suffix = Path(path).suffix.lstrip(".").lower()
    if suffix not in FORMATS:
        raise ConfigError(f"The figure is to be {path}; expected a name that ends with .{', .'.join(FORMATS)}")
    return suffix


def draw_movement(report: AdapterReport, path: str | Path) -> None:
    """Draw direction and magnitude (or the size of the update, if the base was not at hand) of every module.

    Raises:
        ConfigError: the adapter has no numbered layers, or `path` names no known format.
    """
    from matplotlib.figure import Figure

    kind = figure_format(path)
    inside = [module for module in report.modules if module.layer is not None]
    if not inside:
        raise ConfigError("There is nothing to draw: no adapted module stands in a numbered layer.")
    kinds = list(dict.fromkeys(module.kind for module in inside))
    layers = max(module.layer or 0 for module in inside) + 1
    measured = report.base_folder is not None
    panels, experts = _panels(inside, measured=measured), _panels_of_experts(inside, measured=measured)
    height = height_of(most_experts(*experts.values())) if experts else 0.0
    heights = [0.26 * len(kinds)] * len(panels) + [height] * len(experts)
    size = max(5.0, 1.8 + 0.22 * layers), 0.6 + sum(1.1 + each for each in heights)
    figure = Figure(figsize=size, layout="constrained")
    figure.suptitle(f"{in_figure(Path(report.path).name)}: how far each layer moved", fontsize="medium")
    rows = figure.subplots(len(heights), squeeze=False, height_ratios=[0.3 + each for each in heights])[:, 0]
    for axes, (title, values) in zip(rows, panels.items(), strict=False):
        grid = [[values.get((name, layer), math.nan) for layer in range(layers)] for name in kinds]
        image = axes.imshow(grid, aspect="auto", cmap="viridis", vmin=0, interpolation="nearest")
        axes.set_title(title, fontsize="small", loc="left")
        axes.set_yticks(range(len(kinds)), map(in_figure, kinds), fontsize="small")
        axes.set_xlabel("layer", fontsize="small")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.tick_params(axis="x", labelsize="small")
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize="small")
    for axes, (title, by_expert) in zip(rows[len(panels) :], experts.items(), strict=True):
        image = draw_experts(axes, by_expert, title, layers, 100 if title.endswith("(%)") else 1)
        figure.colorbar(image, ax=axes, pad=0.01).ax.tick_params(labelsize="small")
    with atomic_write(path) as partial:
        figure.savefig(partial, format=kind, dpi=150)


def _panels(modules: list[ModuleReport], *, measured: bool) -> dict[str, dict[tuple[str, int | None], float]]:
    """Title -> (kind, layer) -> value."""
    if not measured:
        return {"update ‖s·B·A‖": {(module.kind, module.layer): module.update for module in modules}}
    return {
        "direction: mean angle between base and adapted rows (degrees)": {
            (module.kind, module.layer): _or_nan(module.angle_mean) for module in modules
        },
        "magnitude: mean change of the rows' length (%)": {
            (module.kind, module.layer): 100 * _or_nan(module.magnitude_mean) for module in modules
        },
    }


def _panels_of_experts(modules: list[ModuleReport], *, measured: bool) -> dict[str, Values]:
    """Title → layer → the value of each expert; nothing where no experts are adapted."""
    if not any(module.experts for module in modules):
        return {}
    if not measured:
        return {"update ‖s·B·A‖ of each expert": by_layer(modules, "update")}
    return {
        "direction of each expert: mean angle (degrees)": by_layer(modules, "angle"),
        "magnitude of each expert: mean change (%)": by_layer(modules, "magnitude"),
    }


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
