"""`theodora merge`: adapter and base model -> a plain model folder.

example:
  theodora merge runs/first --output merged --dtype bf16
  theodora merge runs/on_nf4 --output merged --onto quantised

An adapter that was trained on a quantised base merges three ways: onto the original full-precision weights (the
default), onto the dequantised ones, or back into the quantised format. Each says how far the result is from what was
trained.

Weights are computed in float32 and rounded once; memory holds one output file and one layer, not the model.
"""

from __future__ import annotations

import argparse
import math
from typing import TYPE_CHECKING

from theodora.cli.arguments import not_negative
from theodora.cli.imports import imports
from theodora.cli.numbers import percent
from theodora.safe_text import quoted

if TYPE_CHECKING:
    from rich.table import Table

    from theodora.merging import MergeReport
    from theodora.merging.logits import LogitsReport

ONTO = {
    "original": "Onto the original weights; the adapter was trained on them quantised ({}).",
    "dequantised": "Onto the dequantised weights ({}), the numbers that training multiplied by.",
    "quantised": "Onto the quantised weights ({}), which were quantised again.",
}
"""What there is to merge onto, and how the report tells it."""
_LAYERS_TOLD = 5
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
        "--onto",
        default="original",
        metavar="|".join(ONTO),
        help="weights to merge onto, if the base was quantised in training: the original ones, those that training "
        "multiplied by, or these quantised again in the same format. Default: original",
    )
    parser.add_argument(
        "--quantize",
        metavar="nf4|int8|int4|fp8",
        help="how the base was quantised as it was loaded for the training. Default: as the adapter remembers",
    )
    parser.add_argument(
        "--max-error",
        type=not_negative,
        metavar="X",
        help="for --onto quantised: largest relative error of a layer. Default: 0.2 in 4 bits, 0.05 in 8",
    )
    parser.add_argument(
        "--max-loss",
        type=not_negative,
        default=0.5,
        metavar="X",
        help="for --onto quantised: largest share of the adapter's effect that may be lost, by the mean KL from the "
        "base. Default: 0.5",
    )
    parser.add_argument(
        "--no-logits",
        action="store_true",
        help="with a quantised base: do not compare predictions, which reads the model three times",
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
            onto=args.onto,
            quantize=args.quantize,
            max_error=args.max_error,
            max_loss=args.max_loss,
            check_logits=not args.no_logits,
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
    if report.quantisation is not None:
        console.print(ONTO[report.onto].format(report.quantisation), markup=False, soft_wrap=True)
    print_table(console, _table(report))
    if report.layers:
        print_table(console, _layers(report))
    if report.logits is not None:
        console.print(_predictions(report.logits, report.onto), markup=False, soft_wrap=True)
    for note in (*report.notes, *_advice(report)):
        console.print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    files = "1 weight file" if report.files == 1 else f"{report.files} weight files"
    console.print(f"\n{report.output}  ({report.bytes / 1e6:,.0f} MB, {files})", markup=False, soft_wrap=True)
    if report.scores:
        return 0
    console.print(
        ("It is quantised as its base is." if report.onto == "quantised" else "It is a plain model now.")
        + " Score it with\n"
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


def _layers(report: MergeReport) -> Table:
    from rich import box
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(f"worst of {len(report.layers)} layers", no_wrap=True)
    for heading in ("error", "change", "row norms"):
        table.add_column(heading, justify="right", no_wrap=True)
    for layer in report.layers[:_LAYERS_TOLD]:
        table.add_row(layer.path, percent(layer.error), percent(layer.change), percent(layer.norms))
    mean = [math.fsum(values) / len(report.layers) for values in zip(*_figures(report), strict=True)]
    table.add_row("mean of all", *map(percent, mean))
    table.caption_justify = "left"
    table.caption = (
        "error: from the formula on the weights of the training\n"
        "change: by the adapter; both relative to the layer's norm\n"
        "row norms: mean relative difference"
    )
    return table


def _figures(report: MergeReport) -> list[tuple[float, float, float]]:
    return [(layer.error, layer.change, layer.norms) for layer in report.layers]


def _predictions(logits: LogitsReport, onto: str) -> str:
    share = "" if math.isnan(logits.loss) or onto == "original" else f", {100 * logits.loss:.2g} % of it"
    return (
        f"Predictions after {logits.positions} tokens, mean KL: the adapter changes them by {logits.kl_effect:.2g} "
        f"nats, and the merged model is {logits.kl_mean:.2g} nats from what was trained{share}; largest difference of "
        f"a logit {logits.largest:.2g}; same likeliest token {logits.agreeing:.0%}."
    )


def _advice(report: MergeReport) -> list[str]:
    if report.onto == "quantised":
        return _advice_on_format(report)
    lost = [kind for kind in report.kinds if kind.rounding_mean > _MUCH_ROUNDING * kind.change]
    if not lost:
        return []
    names = ", ".join(kind.kind for kind in lost)
    return [
        f"Rounding to {report.dtype} is more than half as large as what the adapter changed in {names}. "
        "A merge with --dtype fp32 keeps all of it."
    ]


def _advice_on_format(report: MergeReport) -> list[str]:
    lost = [layer for layer in report.layers if layer.lost > _MUCH_ROUNDING]
    if not lost:
        return []
    return [
        f"Rounding to {report.dtype} is more than half as large as what the adapter changed in {len(lost)} of "
        f"{len(report.layers)} layers. --onto dequantised and --onto original keep all of it."
    ]
