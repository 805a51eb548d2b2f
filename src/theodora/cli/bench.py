"""`theodora bench`: what a training step costs on your model and machine, with PEFT's adapters and with ours.

example:
  theodora bench HuggingFaceTB/SmolLM2-135M-Instruct
  theodora bench path/to/model --rank 64 --batch 2 --length 4096 --output bench.json
  theodora bench path/to/model --quantize nf4 --batch 1 --length 2048
  theodora bench meta-llama/Llama-3.1-8B --layers 8 --random-weights --methods floor peft-dora dora

A step is forward and backward on a batch of random tokens. The floor is the frozen model without an adapter, its
gradients flowing to the embeddings' output. Each method runs in a process of its own, in turns with the others.
"""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from theodora.files.trained_on import KINDS

if TYPE_CHECKING:
    from theodora.bench import Variant, Workload

_METHODS = ("floor", "peft-lora", "peft-dora", "lora", "dora")
_MORE_METHODS = ("dora-fp8",)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of a measurement."""
    parser.add_argument("model", metavar="MODEL", help="model folder or hub name; a bare config.json will do")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=[*_METHODS, *_MORE_METHODS],
        default=list(_METHODS),
        metavar="NAME",
        help=f"what to measure, of {', '.join([*_METHODS, *_MORE_METHODS])}. Default: all but the last.",
    )
    parser.add_argument("--rank", type=int, default=16, metavar="N", help="of the adapters. Default: 16.")
    parser.add_argument("--batch", type=int, default=4, metavar="N", help="sequences in a batch. Default: 4.")
    parser.add_argument("--length", type=int, default=512, metavar="N", help="tokens in a sequence. Default: 512.")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns of each method. Default: 5.")
    parser.add_argument("--layers", type=int, metavar="N", help="only the first N decoder layers. Default: all.")
    parser.add_argument("--targets", nargs="+", metavar="NAME", help="modules to adapt. Default: all linear layers.")
    parser.add_argument(
        "--dtype", default="bf16", choices=["bf16", "fp16", "fp32"], help="of the model's weights. Default: bf16."
    )
    parser.add_argument(
        "--quantize",
        choices=["none", *KINDS],
        help="quantise the frozen linear layers as the model is loaded, or drawn. Default: none.",
    )
    parser.add_argument(
        "--gradient-checkpointing", action="store_true", help="recompute each block in the backward pass"
    )
    parser.add_argument(
        "--random-weights", action="store_true", help="draw weights instead of loading them: needs the config.json only"
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], help="default: the GPU, if there is one")
    parser.add_argument("--output", metavar="FILE", help="write every timing, hardware and versions as JSON")
    parser.add_argument("--trust-remote-code", action="store_true", help="run Python code that comes with the model")


def run(args: argparse.Namespace) -> int:
    """Measure, and print the table."""
    from theodora.bench import Job, Runner, describe_machine, differing_losses, make_rows, plain_rows, step_table
    from theodora.bench.table import timings
    from theodora.cli.console import stderr, stdout
    from theodora.cli.tables import print_table
    from theodora.errors import TheodoraError
    from theodora.files.model_folder import check_model_folder

    check_model_folder(args.model)
    workload = _workload(args)
    variants = _variants(args.methods, workload)
    with stderr().status("starting") as status:
        measured = Runner(
            [Job(name=name, variant=variant, workload=workload) for name, variant in variants.items()],
            floor="floor",
            rounds=args.rounds,
            warm_up=1 if workload.device == "cuda" else 0,
            steps=2 if workload.device == "cuda" else 1,
            progress=status.update if stderr().is_terminal else lambda message: None,
        ).run()
    for m in measured.values():
        if args.debug and m.failure:
            stderr().print(m.failure.traceback, markup=False, soft_wrap=True)
    rows = make_rows(measured, against=["floor"])
    print_table(stdout(), step_table(rows, title=_title(args, workload), caption=_caption(variants, args.methods)))
    if warning := differing_losses(rows):
        stderr().print(f"Warning: {warning}", style="yellow", markup=False, soft_wrap=True)
    if args.output:
        report = {"machine": describe_machine(), "setting": vars(workload), "rows": plain_rows(rows)}
        _write(Path(args.output), report | {"seconds": timings(measured)})
    if all(row.failure for row in rows):
        raise TheodoraError(f"Nothing could be measured. {rows[0].label}: {rows[0].failure}")
    return 0


def _workload(args: argparse.Namespace) -> Workload:
    import torch

    from theodora.bench import Workload
    from theodora.files.model_folder import DTYPES

    return Workload(
        model=args.model,
        random_weights=args.random_weights,
        layers=args.layers,
        dtype=DTYPES[args.dtype],
        quantize=args.quantize,
        device=args.device or ("cuda" if torch.cuda.is_available() else "cpu"),
        batch=args.batch,
        length=args.length,
        rank=args.rank,
        targets=tuple(args.targets) if args.targets else "all-linear",
        gradient_checkpointing=args.gradient_checkpointing,
        trust_remote_code=args.trust_remote_code,
    )


def _variants(methods: list[str], workload: Workload) -> dict[str, Variant]:
    """On a GPU, everybody gets Liger's kernels where they are installed, and ours its fast path."""
    from dataclasses import replace

    from theodora.bench import VARIANTS

    chosen = {n: v for n, v in VARIANTS.items() if n in methods and (v.library != "peft" or find_spec("peft"))}
    if workload.device != "cuda":
        return chosen
    liger = "all" if find_spec("liger_kernel") else "none"
    return {
        name: replace(v, accelerate=True, graph=True) if v.library == "theodora" else replace(v, liger=liger)
        for name, v in chosen.items()
    }


def _title(args: argparse.Namespace, workload: Workload) -> str:
    checkpointing = ", gradient checkpointing" * workload.gradient_checkpointing
    targets = ", ".join(args.targets) if args.targets else "all linear layers"
    layers = f", {args.layers} layers" if args.layers else ""
    stored = f" on a base in {args.quantize}" if args.quantize not in (None, "none") else ""
    return (
        f"One step of {Path(args.model).name}{layers}: {workload.batch} × {workload.length} tokens, "
        f"rank {workload.rank} on {targets}, {args.dtype}{stored}, {workload.device}{checkpointing}"
    )


def _caption(variants: dict[str, Variant], methods: list[str]) -> str:
    lines: list[str] = []
    if any(v.liger == "all" for v in variants.values()):
        lines.append("Frozen model and PEFT run with Liger-Kernel.")
    if missing := [name for name in methods if name not in variants]:
        lines.append(f"Left out, because peft is not installed: {', '.join(missing)}.")
    return "\n".join(lines)


def _write(path: Path, report: dict[str, Any]) -> None:
    from theodora.parse import to_json

    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(to_json(report, indent=2, readable=True) + "\n", encoding="utf-8", errors="backslashreplace")
