"""`theodora merge`: adapter and base model -> a plain model folder.

example:
  theodora merge runs/first --output merged --dtype bf16

Weights are computed in float32 and rounded once; memory holds one output file and one layer, not the model.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from theodora.cli.imports import imports
from theodora.cli.numbers import percent
from theodora.safe_text import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from theodora.merging import MergeReport

# Where rounding eats more than this share of what the adapter changed, a wider dtype is worth its bytes.
_MUCH_ROUNDING = 0.5


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a merge."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter (PEFT's files)")
    parser.add_argument("--output", required=True, metavar="FOLDER", help="folder to write the merged model to")
    parser.add_argument(
        "--base-model", metavar="MODEL", help="folder or hub name of the base model. Default: the one the adapter names"
    )
    parser.add_argument(
        "--dtype",
        metavar="fp32|bf16|fp16",
        help="dtype of the merged weights; float32, bfloat16 and float16 work as well. Default: as in the base model",
    )
    parser.add_argument(
        "--max-shard-size", default="5GB", metavar="SIZE", help="largest weight file, such as 500MB. Default: 5GB"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier merge at --output")
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that comes with the base model"
    )


def run(args: argparse.Namespace) -> int:
    """Merge, with a progress bar, and say what came out."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    from theodora.cli.console import stderr, stdout
    from theodora.cli.tables import print_table
    from theodora.config import METHOD_NAMES

    with imports():
        from theodora.merging.checkpoint import merge_checkpoint

    columns = (
        TextColumn("merging", markup=False),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}", style="dim", markup=False),
    )
    with Progress(*columns, console=stderr(), transient=True) as bar:
        task = bar.add_task("")
        report = merge_checkpoint(
            args.adapter,
            args.output,
            base_model=args.base_model,
            dtype=args.dtype,
            overwrite=args.overwrite,
            max_shard_size=args.max_shard_size,
            trust_remote_code=args.trust_remote_code,
            progress=lambda done, total, key: bar.update(task, completed=done, total=total, description=key),
        )
    console = stdout()
    console.print(
        f"Merged the {METHOD_NAMES[report.method]} adapter {report.adapter} "
        f"into {report.base_model}: {report.changed} of {report.tensors} tensors changed, in {report.seconds:.1f} s.",
        markup=False,
        soft_wrap=True,
    )
    print_table(console, _table(report))
    for note in (*report.notes, *_advice(report)):
        console.print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    files = "1 weight file" if report.files == 1 else f"{report.files} weight files"
    console.print(f"\n{report.output}  ({report.bytes / 1e6:,.0f} MB, {files})", markup=False, soft_wrap=True)
    console.print(
        "It is a plain model now. Score it with\n"
        f"  theodora evaluate --model {quoted(args.output)} --data YOUR_ROWS.jsonl",
        markup=False,
        soft_wrap=True,
    )
    return 0


def _table(report: MergeReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column("layers", no_wrap=True)
    for heading in ("tensors", "change", "rounding", "worst layer", "worst weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for kind in report.kinds:
        table.add_row(
            kind.kind,
            str(kind.tensors),
            percent(kind.change),
            percent(kind.rounding_mean),
            percent(kind.rounding_max),
            f"{kind.rounding_max_abs:.1e}" if kind.rounding_max_abs else "0",
        )
    table.caption_justify = "left"
    table.caption = (
        f"change: by the adapter; rounding: to {report.dtype}\n"
        "relative to the layer's norm, mean over the layers\n"
        "worst weight: absolute error"
    )
    return table


def _advice(report: MergeReport) -> list[str]:
    lost = [kind for kind in report.kinds if kind.rounding_mean > _MUCH_ROUNDING * kind.change]
    if not lost:
        return []
    names = ", ".join(kind.kind for kind in lost)
    return [
        f"Rounding to {report.dtype} is more than half as large as what the adapter changed in {names}. "
        "A merge with --dtype fp32 keeps all of it."
    ]
