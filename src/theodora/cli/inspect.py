"""`theodora inspect`: how training changed a model, in magnitude and direction, layer by layer.

example:
  theodora inspect runs/first
  theodora inspect runs/full --base-model HuggingFaceTB/SmolLM2-135M-Instruct
  theodora inspect runs/full runs/lora runs/dora --base-model HuggingFaceTB/SmolLM2-135M-Instruct --figures changed
  theodora inspect runs/first --json > changes.json

Section 3 of the DoRA paper, for your own runs: LoRA, DoRA and fully tuned models, at every checkpoint-*/ of a run.
Nothing is downloaded. docs/inspect.md explains the measures.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING, Any

from theodora.cli.numbers import percent

if TYPE_CHECKING:
    from pathlib import Path

    from rich.console import Console
    from rich.table import Table

    from theodora.analysis.correlation import Correlation
    from theodora.analysis.run import Checkpoint, ModuleChange, RunReport

_PAPER = "The DoRA paper, query weights of its models: full −0.62, LoRA +0.83, DoRA −0.31."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a look at runs."""
    parser.add_argument(
        "runs", metavar="RUN", nargs="+", help="output folder of a run, an adapter, or a fully tuned model"
    )
    parser.add_argument(
        "--base-model",
        metavar="MODEL",
        help="folder or hub name of the model before training. Default: the one the adapter names",
    )
    parser.add_argument("--json", action="store_true", help="print everything, module by module, as JSON")
    parser.add_argument("--report", metavar="FILE", help="write that JSON into a file, beside what is printed")
    parser.add_argument("--figures", metavar="FOLDER", help="draw scatter.png, heat_map.png and experts.png there")
    parser.add_argument("--movers", type=int, default=5, metavar="N", help="show the N largest movers. Default: 5")
    parser.add_argument("--no-rank", action="store_true", help="skip effective ranks, most of the work")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )


def run(args: argparse.Namespace) -> int:
    """Inspect every run, print, draw."""
    from theodora.cli.console import print_json, stdout
    from theodora.cli.tables import print_table

    reports = _inspect(args)
    found = {"runs": [report.to_dict() for report in reports]}
    if args.report:
        _write(args.report, found)
    drawn = _draw(reports, args.figures) if args.figures else []
    if args.json:
        print_json(found)
        return 0
    console = stdout()
    for report in reports:
        _print(report, args.movers, console)
    if len(reports) > 1:
        print_table(console, _side_by_side(reports))
    if drawn:
        console.print("Drawn: " + ", ".join(map(str, drawn)), markup=False, soft_wrap=True)
    return 0


def _inspect(args: argparse.Namespace) -> list[RunReport]:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    from theodora.cli.console import stderr

    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr(), transient=True) as bar:
        tasks = [bar.add_task(run, total=None) for run in args.runs]
        from theodora.analysis.run import inspect_run

        return [
            inspect_run(
                run,
                args.base_model,
                rank=not args.no_rank,
                trust_remote_code=args.trust_remote_code,
                progress=lambda done, total, task=task: bar.update(task, completed=done, total=total),
            )
            for run, task in zip(args.runs, tasks, strict=True)
        ]


def _write(file: str, found: dict[str, Any]) -> None:
    from pathlib import Path

    from theodora.files.atomic import atomic_write, explained_io_errors
    from theodora.parse import to_json

    with explained_io_errors(Path(file)), atomic_write(Path(file)) as partial:
        partial.write_text(to_json(found), encoding="utf-8")


def _draw(reports: list[RunReport], folder: str) -> list[Path]:
    from theodora.analysis.run_figure import draw_run_figures

    return draw_run_figures(reports, folder)


def _print(report: RunReport, movers: int, console: Console) -> None:
    from rich.panel import Panel
    from rich.text import Text

    from theodora.cli.tables import print_table

    console.print(Text.assemble((report.path, "bold"), f"  {_method(report)}, against {report.base_folder}"))
    for warning in report.warnings:
        console.print(Panel(Text(warning), title="warning", border_style="bold red"))
    for note in report.notes:
        console.print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    if len(report.checkpoints) > 1:
        print_table(console, _checkpoints(report))
    print_table(console, _kinds(report))
    if (experts := _experts(report)) is not None:
        print_table(console, experts)
    if movers > 0:
        print_table(console, _movers(report.last, movers))


def _checkpoints(report: RunReport) -> Table:
    table = _table("checkpoint", "ΔM", "ΔM / ‖w‖", "ΔD", "‖ΔW‖ / ‖W‖")
    for checkpoint in report.checkpoints:
        table.add_row(checkpoint.label, *_means(checkpoint.modules))
    table.caption = "means over all modules"
    return table


def _kinds(report: RunReport) -> Table:
    table = _table("modules", "", "ΔM", "ΔM / ‖w‖", "ΔD", "‖ΔW‖ / ‖W‖", "rank", "r(ΔD, ΔM)", "last alone")
    last = report.last
    of_kind = {correlation.kind: correlation for correlation in report.correlations}
    for kind in report.kinds:
        modules = tuple(module for module in last.modules if module.kind == kind)
        ranks = [module.effective_rank for module in modules if module.effective_rank is not None]
        correlation = of_kind.get(kind)
        table.add_row(
            kind,
            str(len(modules)),
            *_means(modules),
            f"{math.fsum(ranks) / len(ranks):.1f}" if ranks else "-",
            _signed(correlation.pearson if correlation else None),
            _last_alone(correlation),
        )
    table.caption = (
        f"at {last.label}; rank: effective rank of W' − W; r: Pearson's, over layers and checkpoints;\n"
        f"last alone: over the layers of {last.label}, with its 95 % interval"
    )
    return table


def _experts(report: RunReport) -> Table | None:
    from theodora.analysis.expert_figure import by_layer
    from theodora.cli.expert_table import experts_table

    directions = by_layer(report.last.modules, "direction")
    magnitudes = by_layer(report.last.modules, "relative_magnitude")
    return experts_table([("ΔD", directions, lambda value: f"{value:.3g}"), ("ΔM / ‖w‖", magnitudes, percent)])


def _movers(checkpoint: Checkpoint, count: int) -> Table:
    from theodora.analysis.run import largest_movers

    table = _table("largest movers", "ΔM", "ΔM / ‖w‖", "ΔD", "‖ΔW‖ / ‖W‖", "rank")
    for module in largest_movers(checkpoint, count):
        rank = "-" if module.effective_rank is None else f"{module.effective_rank:.1f}"
        table.add_row(module.path, *_means((module,)), rank)
    return table


def _side_by_side(reports: list[RunReport]) -> Table:
    from pathlib import Path

    table = _table("r(ΔD, ΔM)", *(f"{Path(report.path).name} ({_method(report)})" for report in reports))
    kinds = dict.fromkeys(correlation.kind for report in reports for correlation in report.correlations)
    by_run = [{correlation.kind: correlation for correlation in report.correlations} for report in reports]
    for kind in kinds:
        table.add_row(kind, *(_signed(c.pearson if (c := of_kind.get(kind)) else None) for of_kind in by_run))
    table.caption = _PAPER
    return table


def _table(*headings: str) -> Table:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    # Many columns: in 80 characters headings and long names take several lines, and no figure is cut.
    table = Table(box=box.SIMPLE_HEAD, caption_justify="left", collapse_padding=True, pad_edge=False)
    for index, heading in enumerate(headings):
        first = index == 0
        least = len("gate_proj") if first else None
        table.add_column(Text(heading), justify="left" if first else "right", overflow="fold", min_width=least)
    return table


def _means(modules: tuple[ModuleChange, ...]) -> tuple[str, str, str, str]:
    def mean(name: str) -> float:
        values = [getattr(module, name) for module in modules]
        known = [value for value in values if math.isfinite(value)]
        return math.fsum(known) / len(known) if known else math.nan

    share = mean("relative_magnitude"), mean("size")
    percents = [percent(value if math.isfinite(value) else None) for value in share]
    return f"{mean('magnitude'):.3g}", percents[0], f"{mean('direction'):.3g}", percents[1]


def _last_alone(correlation: Correlation | None) -> str:
    text = _signed(next(reversed(correlation.by_checkpoint), None) if correlation else None)
    if correlation is None or correlation.last_interval is None:
        return text
    low, high = correlation.last_interval
    return f"{text} ({_signed(low)} to {_signed(high)})"


def _signed(value: float | None) -> str:
    return "-" if value is None else f"{value:+.2f}".replace("-", "−")


def _method(report: RunReport) -> str:
    from theodora.config import METHOD_NAMES

    return METHOD_NAMES.get(report.method, "full fine-tuning")
