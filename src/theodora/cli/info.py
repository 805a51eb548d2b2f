"""`theodora info`: what an adapter is, and how far it has moved its base.

example:
  theodora info runs/first
  theodora info runs/first --json > info.json
  theodora info runs/first --figure moved.png

The base model is looked for where the adapter says, in folders and the local hub cache; nothing is downloaded.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from theodora.cli.numbers import degrees, percent

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from theodora.analysis import AdapterReport, Group

_BAR = 20
_SETTINGS = ("data", "num_train_epochs", "max_steps", "learning_rate", "per_device_train_batch_size", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a look at an adapter."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter (PEFT's files)")
    parser.add_argument(
        "--base-model", metavar="MODEL", help="folder or hub name of the base model. Default: the one the adapter names"
    )
    parser.add_argument("--json", action="store_true", help="print the whole report, module by module, as JSON")
    parser.add_argument("--figure", metavar="FILE", help="draw layers against kinds of layers: .png, .svg or .pdf")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect and print."""
    from theodora.cli.console import print_json, stderr, stdout

    with stderr().status("reading"):
        from theodora.analysis import inspect_adapter
        from theodora.analysis.figure import draw_movement, figure_format

        if args.figure:
            figure_format(args.figure)
        report = inspect_adapter(args.adapter, args.base_model, trust_remote_code=args.trust_remote_code)
        if args.figure:
            draw_movement(report, args.figure)
    if args.json:
        print_json(report.to_dict())
    else:
        _print(report, stdout())
        if args.figure:
            stdout().print(f"Drawn in {args.figure}", markup=False, soft_wrap=True)
    return 0


def _print(report: AdapterReport, console: Console) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from theodora.cli.tables import print_table

    console.print(_summary(report))
    for warning in report.warnings:
        console.print(Panel(Text(warning), title="warning", border_style="bold red"))
    for note in report.notes:
        console.print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    if report.by_kind:
        print_table(console, _kinds(report))
    if len(report.by_layer) > 1:
        print_table(console, _layers(report))
    if (experts := _experts(report)) is not None:
        print_table(console, experts)
    for full in report.full:
        change = "" if full.relative_change is None else f", changed by {percent(full.relative_change)}"
        console.print(f"  {full.path}: trained in full, {full.parameters:,} parameters{change}", markup=False)


def _summary(report: AdapterReport) -> Table:
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in _facts(report).items():
        if value:
            table.add_row(name, value)
    return table


def _facts(report: AdapterReport) -> dict[str, str]:
    from theodora.config import METHOD_NAMES

    ranks = ", ".join(f"{r} ({n} modules)" if len(report.ranks) > 1 else str(r) for r, n in report.ranks.items())
    scales = ", ".join(f"{scale:.4g}" for scale in report.scales)
    method = METHOD_NAMES[report.method]
    share = f" ({report.parameters / report.base_parameters:.2%} of the base)" if report.base_parameters else ""
    at_hand = " (here)" if report.base_folder else " (not at hand)"
    settings = report.training or {}
    return {
        "adapter": report.path,
        "method": method + (" with rsLoRA's scale" if report.rslora else ""),
        "rank": f"{ranks}; alpha {report.alpha:g}, scale {scales}" if ranks else "",
        "base model": (report.base_model or "not named") + at_hand,
        "trained on": _base(report),
        "adapts": f"{len(report.modules)} modules: {', '.join(group.name for group in report.by_kind)}",
        "in full": ", ".join(report.modules_to_save),
        "size": f"{report.parameters:,} parameters{share}, {report.bytes / 1e6:.1f} MB, {report.dtype}",
        "files": report.written or "",
        "training": ", ".join(f"{name} {settings[name]}" for name in _SETTINGS if settings.get(name) is not None),
    }


def _base(report: AdapterReport) -> str:
    """What the file remembers of the base beyond its name."""
    on = report.trained_on
    if on is None or not (on.quantization or on.revision):
        return ""
    stored = f", quantised as it was loaded (--quantize {on.quantize})" if on.quantize else ""
    parts = [f"{on.quantization}{stored}" if on.quantization else "", f"commit {on.revision}" if on.revision else ""]
    return "; ".join(part for part in parts if part)


def _kinds(report: AdapterReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layers", no_wrap=True)
    measured = report.base_folder is not None
    headings = ("direction", "largest", "magnitude", "largest") if measured else ("update ‖s·B·A‖",)
    for heading in ("modules", *headings):
        table.add_column(heading, justify="right", no_wrap=True)
    for group in report.by_kind:
        figures = _movement(group) if measured else (f"{group.update:.3g}",)
        table.add_row(group.name, str(group.modules), *figures)
    if measured:
        table.caption_justify = "left"
        table.caption = (
            "direction: angle between base rows and adapted rows\n"
            "magnitude: change of the rows' length\n"
            "means over all rows, and the row that moved most"
        )
    return table


def _movement(group: Group) -> tuple[str, str, str, str]:
    return (
        degrees(group.angle_mean),
        degrees(group.angle_max),
        percent(group.magnitude_mean),
        percent(group.magnitude_max),
    )


def _experts(report: AdapterReport) -> Table | None:
    from theodora.analysis.expert_figure import by_layer
    from theodora.cli.expert_table import experts_table

    if report.base_folder is None:
        return experts_table([("update ‖s·B·A‖", by_layer(report.modules, "update"), lambda value: f"{value:.3g}")])
    directions, magnitudes = by_layer(report.modules, "angle"), by_layer(report.modules, "magnitude")
    return experts_table([("direction", directions, degrees), ("magnitude", magnitudes, percent)])


def _layers(report: AdapterReport) -> Table:
    from rich import box
    from rich.bar import Bar
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layer", justify="right", no_wrap=True)
    measured = report.base_folder is not None
    columns: dict[str, list[float]] = (
        {
            "direction": [group.angle_mean or 0.0 for group in report.by_layer],
            "magnitude": [group.magnitude_mean or 0.0 for group in report.by_layer],
        }
        if measured
        else {"update ‖s·B·A‖": [group.update for group in report.by_layer]}
    )
    shown = {"direction": degrees, "magnitude": percent}
    for name in columns:
        table.add_column(name, width=_BAR)
        table.add_column("", justify="right", no_wrap=True)
    for index, group in enumerate(report.by_layer):
        cells: list[Any] = []
        for name, values in columns.items():
            largest = max((value for value in values if math.isfinite(value)), default=0.0) or 1.0
            text = shown.get(name, lambda value: f"{value:.3g}")(values[index])
            length = values[index] if math.isfinite(values[index]) else 0.0
            cells += [Bar(largest, 0, length, width=_BAR, color="cyan"), text]
        table.add_row(group.name, *cells)
    return table
