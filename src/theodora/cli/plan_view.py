"""What `theodora plan` prints: the panel, the table of settings, and the command."""

from __future__ import annotations

from pathlib import Path

from rich import box
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from theodora.cli.tables import print_table
from theodora.plan.devices import GIB
from theodora.plan.estimate import Estimate
from theodora.plan.fits import size
from theodora.plan.survey import Row, Survey
from theodora.safe_text import quoted
from theodora.terminal import Terminal


def print_plan(console: Terminal, found: Survey, command: str | None) -> None:
    """Print what was found, and the command for the recommended setting."""
    console.print(_panel(found))
    print_table(console, _table(found))
    console.print(Text(_caption(found), style="dim"))
    console.print()
    _print_choice(console, found, command)


def _panel(found: Survey) -> Panel:
    config, machine, asked = found.config, found.machine, found.asked
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim", no_wrap=True)
    grid.add_column()
    adapter = config.adapter
    method = {"dora": "DoRA", "lora": "LoRA"}.get(adapter.method, adapter.method)
    grid.add_row(
        "Model",
        Text.assemble(
            (Path(config.model).name, "bold"),
            f"  {_count(found.parameters)} parameters, {found.family}, {found.layers} blocks",
        ),
    )
    targets = adapter.targets if isinstance(adapter.targets, str) else ", ".join(adapter.targets)
    grid.add_row("Adapter", f"{method} of rank {adapter.rank} on {targets}: {_count(found.trained)} trained parameters")
    grid.add_row("Batch", f"{asked.batch} × {asked.length:,} tokens in a pass" + _accumulated(found))
    number = "" if machine.device == "cpu" else f"{machine.gpus} GPU{'s' * (machine.gpus > 1)} with "
    each = " each" if machine.gpus > 1 else ""
    grid.add_row("Machine", f"{number}{size(machine.memory)}{each}" + (f"  {machine.name}" if machine.name else ""))
    for note in found.notes:
        grid.add_row(Text("Note", style="yellow"), note)
    return Panel(
        grid, title=Text("theodora plan", style="bold"), title_align="left", border_style="cyan", box=box.ROUNDED
    )


def _accumulated(found: Survey) -> str:
    passes, gpus = found.asked.accumulation, found.machine.gpus
    rows = found.asked.batch * passes * gpus
    return "" if passes * gpus == 1 else f", {rows:,} rows in a step"


def _table(found: Survey) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1))
    table.add_column("GiB", no_wrap=True)
    for heading in ("weights", "adapter", "kept", "passing", "peak", "needs"):
        table.add_column(heading, justify="right")
    table.add_column("fits", justify="right", no_wrap=True)
    if any(row.tokens_per_second for row in found.rows):
        table.add_column("tokens/s", justify="right")
    for row in found.rows:
        table.add_row(*_cells(found, row), style=_style(found, row))
    return table


def _cells(found: Survey, row: Row) -> list[str | Text]:
    e = row.estimate
    adapter = e.adapter + e.gradients + e.optimizer
    sizes = [e.weights, adapter, e.activations, e.passing + e.workspace, e.peak, e.taken]
    cells: list[str | Text] = [found.name_of(e.setting), *(f"{n / GIB:,.1f}" for n in sizes)]
    most = row.largest_batch
    told = "none" if most == 0 else f"{most:,} row{'s' * (most > 1)}"
    cells.append(Text(told, style="green" if row.fits else "red"))
    if any(other.tokens_per_second for other in found.rows):
        cells.append("-" if row.tokens_per_second is None else f"{row.tokens_per_second:,.0f}")
    return cells


def _style(found: Survey, row: Row) -> str | None:
    chosen = None if found.recommended is None else found.recommended.setting
    own = row.estimate.setting
    same = chosen is not None and (chosen.stored, chosen.recomputes, chosen.sharding) == (
        own.stored,
        own.recomputes,
        own.sharding,
    )
    return "bold" if same else None if row.fits else "dim"


def _caption(found: Survey) -> str:
    where = "CUDA's own and the allocator's spare memory" if found.machine.device == "cuda" else "the process"
    lines = [
        "adapter: with its optimizer's states; kept: by the forward pass for the backward pass; passing: what comes",
        f"and goes at the worst moment; needs: the peak, {where}; fits: the most rows in a pass",
    ]
    if not any(row.tokens_per_second for row in found.rows):
        name = found.config.model
        bench = f"theodora bench {quoted(name)} --output bench.json"
        lines[-1] += "."
        lines.append(f"Tokens/s: not measured ({bench}, then plan with --measured bench.json).")
    return " ".join(lines)


def _print_choice(console: Terminal, found: Survey, command: str | None) -> None:
    chosen = found.recommended
    if chosen is None or command is None:
        console.print(Text.assemble(("Nothing fits. ", "bold red"), _why(found)), soft_wrap=False)
        return
    console.print(Text.assemble(("Recommended: ", "bold green"), _sentence(found, chosen)))
    console.print(Text("  " + command, style="cyan"), soft_wrap=True)


def _sentence(found: Survey, chosen: Estimate) -> str:
    setting, asked = chosen.setting, found.asked
    dtype = found.plain if setting.stored == "plain" else setting.stored
    words = [f"{'' if found.config.trains_all else 'frozen '}weights in {dtype}"]
    words.append("activations " + ("recomputed" if setting.recomputes else "kept"))
    if setting.sharding != "none":
        words.append("the base sharded over the GPUs")
    rows = f"{setting.batch} × {setting.length:,} tokens in a pass"
    if setting.batch != asked.batch:
        rows += f" and {setting.accumulation} passes in a step (the same steps as {asked.batch} rows at once)"
    words.append(rows)
    return f"{', '.join(words)}. Needs {size(chosen.taken)} of {size(found.machine.memory)}."


def _why(found: Survey) -> str:
    least = min(found.rows, key=lambda row: row.estimate.taken).estimate
    weights = f"{size(least.weights)} of weights alone" if least.weights > found.machine.memory else "one row"
    hint = "a smaller model, shorter rows (--max-length)" + (", more GPUs" if found.machine.gpus == 1 else "")
    left = (
        ""
        if found.config.quantize is None and found.config.gradient_checkpointing is None
        else (" Some settings were given, and not planned: leave them out.")
    )
    return f"{weights} is more than {size(found.machine.memory)} can hold; expected {hint}, or more memory.{left}"


def _count(number: int) -> str:
    for least, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= least:
            return f"{number / least:.2f} {unit}"
    return str(number)
