"""One training step on the CPU: a frozen model's own forward and backward, PEFT's LoRA and DoRA, and ours.

    make bench                                                   # the demo's model, 7 rounds
    make bench ARGS="--model path/to/model --rounds 15 --rank 16"

A step is forward, backward, and AdamW's update of the adapter. Each variant lives in a process of its own, so that its
peak memory is its own; they take turns, one step at a time, and a ratio is taken within each round (see
theodora.bench.runner). All variants are in memory at once: on a small machine choose two with
`--variants peft-lora dora`. `theodora bench` times other models, also on a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

from theodora.bench import VARIANTS, Job, Row, Runner, Workload, describe_machine, differing_losses, make_rows
from theodora.bench.table import Ratio, plain_rows, timings

METHODS = ["floor", "peft-lora", "peft-dora", "lora", "dora"]
YARDSTICK = "peft-lora"


def main() -> None:
    args = parse_args()
    workload = Workload(
        model=args.model or demo_model(),
        dtype=args.dtype,
        batch=args.batch,
        length=args.length,
        rank=args.rank,
        optimizer=True,
    )
    # Read by torch when it is imported, in the workers.
    environment = {"OMP_NUM_THREADS": str(args.threads)} if args.threads else {}
    measured = Runner(
        [Job(name=n, variant=replace(VARIANTS[n], environment=environment), workload=workload) for n in args.variants],
        floor="floor",
        rounds=args.rounds,
        progress=lambda message: print(message, file=sys.stderr),
    ).run()
    rows = make_rows(measured, against=["floor", YARDSTICK])
    show(rows, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    setting = {key: value for key, value in vars(args).items() if key not in ("output", "model")}
    report = {
        "setting": {"model": Path(str(workload.model)).name, **setting},
        "machine": describe_machine(),
        "rows": plain_rows(rows),
        "seconds": timings(measured),
    }
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)
    problems = [f"{row.label}: {row.failure}" for row in rows if row.failure]
    if problems or (problems := list(filter(None, [differing_losses(rows), differing_sizes(rows)]))):
        raise SystemExit("\n".join(problems))


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal LM; default: the demo's SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--rank", type=int, default=8, help="default: 8")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch; default: 4")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence; default: 256")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant; default: 7")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; default: its own choice")
    parser.add_argument("--variants", nargs="+", choices=METHODS, default=METHODS, help="default: all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_step.json"), help="JSON file")
    return parser.parse_args()


def demo_model() -> str:
    from rich.console import Console

    from theodora.demo.model import cached_model

    return str(cached_model(Console(stderr=True)))


def differing_sizes(rows: list[Row]) -> str | None:
    """What PEFT's and our adapter of one method train must be of one size."""
    trained = {row.name: row.trained_parameters for row in rows}
    pairs = [p for p in (("peft-lora", "lora"), ("peft-dora", "dora")) if trained.keys() >= set(p)]
    wrong = [f"{peft} trains {trained[peft]} parameters, {ours} {trained[ours]}" for peft, ours in pairs]
    return "; ".join(w for w, (a, b) in zip(wrong, pairs, strict=True) if trained[a] != trained[b]) or None


def show(rows: list[Row], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"One training step, {args.batch} × {args.length} tokens, {args.dtype}, rank {args.rank}, all linear layers"
    table = Table(
        title=title, caption="× is the median of the rounds' ratios (smallest–largest); memory is resident memory"
    )
    columns = ("", "step s", "tokens/s", "× floor", "× PEFT LoRA", "peak GB", "× PEFT LoRA", "above model GB")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for row in rows:
        if row.failure:
            table.add_row(row.label, "failed")
            continue
        table.add_row(
            row.label,
            f"{row.step:.3f}",
            f"{row.tokens_per_second:.0f}",
            ratio(row.ratios.get("floor")),
            ratio(row.ratios.get(YARDSTICK)),
            f"{row.peak / 1e9:.2f}",
            f"{row.peak_ratios[YARDSTICK]:.2f}" if YARDSTICK in row.peak_ratios else "",
            f"{(row.peak - row.model) / 1e9:.2f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)  # a pipe has no width of its own


def ratio(values: Ratio | None) -> str:
    return f"{values.median:.2f} ({values.min:.2f}–{values.max:.2f})" if values else ""


if __name__ == "__main__":
    main()
