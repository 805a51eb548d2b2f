"""`theodora export`: an adapter in the form that another program reads.

example:
  theodora export runs/first --to hf --output merged --dtype bf16
  theodora export runs/first --to gguf --output first.gguf --dtype q8_0
  theodora export runs/first --to gguf --output first-q4.gguf --quantize q4_k_m
  theodora export runs/first --to gguf-lora --output first-lora.gguf --lora-rank 32

  hf         a plain model folder with the adapter merged in (as `theodora merge`)
  peft       PEFT's adapter folder
  mlx        an adapter folder for mlx-lm
  gguf       one file of the merged model, for llama.cpp
  gguf-lora  a LoRA for llama.cpp's --lora; llama.cpp has no DoRA, so give --lora-rank
  served     g in place of m, for engines that should compute nothing at loading

Every export ends with `theodora verify`: it gets its name only if it predicts what the adapter on its base does.
--lora-rank R makes a plain LoRA first, by SVD of what the adapter really changes, and tells the error before it writes.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from theodora.cli.verify import add_probe_arguments, read_text, show

if TYPE_CHECKING:
    from rich.table import Table

    from theodora.export import Approximation

FORMS = ("hf", "peft", "mlx", "gguf", "gguf-lora", "served")
"""Those of `export.exporting.WRITERS`, which torch comes with."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of `theodora export`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="folder of the adapter (PEFT's files)")
    parser.add_argument("--to", required=True, choices=FORMS, metavar="|".join(FORMS), help="the form, see below")
    parser.add_argument("--output", required=True, metavar="PATH", help="folder, or .gguf file, to write")
    parser.add_argument("--base-model", metavar="MODEL", help="base model. Default: the one that the adapter names")
    parser.add_argument(
        "--dtype", metavar="fp32|bf16|fp16|q8_0", help="of hf and gguf weights. Default: as in the base; gguf: fp16"
    )
    parser.add_argument(
        "--quantize",
        metavar="q4_k_m|q5_k_m|q6_k|…",
        help="of gguf: few bits, by llama.cpp's own quantiser, where that is installed; q8_0 needs none",
    )
    parser.add_argument("--lora-rank", type=int, metavar="R", help="make a plain LoRA of at most rank R first")
    parser.add_argument(
        "--max-loss",
        type=float,
        default=0.5,
        metavar="SHARE",
        help="how much of the adapter's effect that LoRA may lose, as a share of mean KL from the base. Default: 0.5",
    )
    parser.add_argument(
        "--llama-cpp",
        metavar="FOLDER",
        help="a llama.cpp checkout, whose converter writes the gguf and whose quantiser (llama-quantize, in it or its "
        "build/bin) quantises. Default for the quantiser: the variable LLAMA_CPP, the PATH, or llama-cpp-python",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier export at --output")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the export with the adapter")
    add_probe_arguments(parser)
    parser.add_argument("--json", action="store_true", help="print JSON, and nothing else, on standard output")


def run(args: argparse.Namespace) -> int:
    """Write, compare and report."""
    from theodora.cli.console import print_json, stderr, stdout
    from theodora.cli.tables import print_table
    from theodora.export import VerificationFailed, export_adapter

    with stderr().status("Exporting ...") as status:

        def approximated(approximation: Approximation) -> None:
            console = stderr() if args.json else stdout()
            for table in fit_tables(approximation):
                print_table(console, table)
            show(approximation.verification, console, verdict=False)

        try:
            report = export_adapter(
                args.adapter,
                args.output,
                args.to,
                base_model=args.base_model,
                dtype=args.dtype,
                quantize=args.quantize,
                lora_rank=args.lora_rank,
                max_loss=args.max_loss,
                llama_cpp=args.llama_cpp,
                overwrite=args.overwrite,
                check=not args.no_verify,
                text=read_text(args.text),
                tokens=args.tokens,
                bound=args.bound,
                kl_bound=args.kl_bound,
                trust_remote_code=args.trust_remote_code,
                progress=status.update,
                approximated=approximated,
            )
        except VerificationFailed as failure:
            status.stop()
            if failure.verification.bound < float("inf"):  # else it was shown
                show(failure.verification, stderr())
            raise
    if args.json:
        print_json(report.to_dict())
        return 0
    if report.verification is not None:
        show(report.verification, stdout())
    for note in report.notes:
        stdout().print("Note: " + note, markup=False, style="yellow", soft_wrap=True)
    stdout().print(f"{report.output}  ({report.bytes / 1e6:,.1f} MB)", markup=False, soft_wrap=True)
    return 0


def fit_tables(approximation: Approximation) -> list[Table]:
    """The error of every layer: one row for each block, one column for each kind of layer."""
    from rich import box
    from rich.table import Table

    from theodora.paths import layer_index, layer_kinds

    errors, ranks = approximation.fit.errors, approximation.fit.ranks
    kinds = layer_kinds(errors)
    columns = list(dict.fromkeys(kinds.values()))
    rows = sorted({layer_index(path) for path in errors}, key=lambda block: -1 if block is None else block)
    cells = {(layer_index(path), kinds[path]): error for path, error in errors.items()}
    table = Table(box=box.SIMPLE_HEAD, title=f"LoRA of rank {max(ranks.values(), default=0)}: error by layer")
    table.add_column("block", justify="right")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        found_here = [cells.get((row, column)) for column in columns]
        table.add_row("-" if row is None else str(row), *("" if e is None else f"{e:.1%}" for e in found_here))
    table.caption_justify = "left"
    table.caption = "of W\u2032 \u2212 W, relative, Frobenius norm"
    return [table]
