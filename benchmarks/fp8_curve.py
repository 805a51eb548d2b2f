"""Does a frozen base in float8 change how a DoRA adapter learns? Loss curves in bf16 and fp8, seed by seed.

    python benchmarks/fp8_curve.py --model path/to/SmolLM2-135M-Instruct --data findings.jsonl
    python benchmarks/fp8_curve.py --draw benchmarks/results/fp8_curve.json        # the picture again

The same run as `theodora train` makes, twice for each seed: the seed sets the adapter's start and the order of the
rows, so that two runs of a seed differ in the base's storage alone. `--data` is a JSONL file that `theodora train`
reads; the same rows of it are held out in all runs. Nothing is downloaded. (`theodora demo` leaves both behind: rows in
its output's `data/`, and the model's folder in its cache.)

Judged are two losses: that of the rows trained on, as a running mean over a twelfth of the steps, and that of the
held-out rows. fp8 is *within the seed-to-seed spread* if, for both,

  - its mean over the seeds lies between the lowest and the highest bf16 seed, at 95 % of the steps or more, and
  - the same seed's difference, fp8 − bf16, is smaller than the difference between two bf16 seeds (root mean squares
    over all steps and seeds, or pairs of seeds). A ratio well below 1 says that the storage matters less than luck.

Without GPU instructions for float8 the same numbers come out, slower.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

from theodora.bench import describe_machine

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
COLOURS = {"bf16": "#8a8f98", "fp8": "#1f7a5c"}
DTYPES = {"bf16": "auto", "fp8": "fp8"}
HERE = Path(__file__).parent


def main() -> None:
    args = parse_args()
    if args.draw:
        report = json.loads(args.draw.read_text(encoding="utf-8"))
    else:
        report = {"machine": describe_machine(), "settings": settings(args), "runs": measure(args)}
        report["judgement"] = {name: judge(report["runs"], name) for name in ("train", "held_out")}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print_table(report)
    draw(report, args.figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--data", help="rows to train on: JSONL in any format that theodora train reads")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--held-out", type=int, default=200, help="rows held out")
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, on one device; default: 1")
    parser.add_argument("--output", type=Path, default=HERE / "results" / "fp8_curve.json")
    parser.add_argument("--figure", type=Path, default=HERE / "results" / "fp8_curve.png")
    parser.add_argument("--draw", type=Path, help="draw an earlier results file, and measure nothing")
    args = parser.parse_args()
    if not args.draw and not (args.model and args.data):
        parser.error("--model and --data are needed")
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; a spread needs at least 2")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    shown = {name: value for name, value in vars(args).items() if name not in ("output", "figure", "draw", "parallel")}
    return shown | {"model": Path(args.model).name, "data": Path(args.data).name}


# Measuring ------------------------------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> list[dict[str, Any]]:
    """All runs: seed, dtype, and the losses by step."""
    runs: list[dict[str, Any]] = []
    pool = multiprocessing.get_context("spawn").Pool(args.parallel)
    with tempfile.TemporaryDirectory(prefix="theodora-curve-") as scratch, pool:
        split_rows(Path(args.data), args.held_out, Path(scratch))
        every = [(args, seed, dtype, Path(scratch)) for seed in range(args.seeds) for dtype in DTYPES]
        for (_, seed, dtype, _), found in zip(every, pool.imap(run, every), strict=True):
            runs.append({"seed": seed, "dtype": dtype, **found})
            losses = f"loss {found['train'][-1][1]:.4f}, held out {found['held_out'][-1][1]:.4f}"
            print(f"seed {seed}  {dtype:<4}  {losses}  {found['seconds']:.0f} s", flush=True)
    return runs


def split_rows(data: Path, held_out: int, folder: Path) -> None:
    rows = data.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    for name, part in (("held_out.jsonl", rows[:held_out]), ("train.jsonl", rows[held_out:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")


def run(cell: tuple[argparse.Namespace, int, str, Path]) -> dict[str, Any]:
    """One run, in a process of the pool."""
    import torch
    from rich.console import Console

    from theodora import AdapterConfig, TrainConfig, train
    from theodora.train.callbacks import read_metrics

    args, seed, dtype, scratch = cell
    output = scratch / f"{dtype}-{seed}"
    torch.set_num_threads(max(1, torch.get_num_threads() // args.parallel))
    config = TrainConfig(
        model=args.model,
        data=str(output.parent / "train.jsonl"),
        eval_data=str(output.parent / "held_out.jsonl"),
        output=str(output),
        adapter=AdapterConfig(method="dora", rank=args.rank),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch,
        per_device_eval_batch_size=32,
        learning_rate=args.learning_rate,
        max_length=args.max_length,
        eval_steps=max(1, args.steps // 12),
        save_steps=args.steps,
        bf16=True,
        base_dtype=DTYPES[dtype],
        seed=seed,
    )
    result = train(config, console=Console(quiet=True), show_result=False)
    lines = read_metrics(output / "metrics.jsonl")
    return {
        "train": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "held_out": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
        "seconds": result.seconds,
        "peak_memory": result.peak_memory,
    }


# Judging --------------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[dict[str, Any]], dtype: str, name: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and the losses of each seed; those of training as running means, from the first whole window on."""
    chosen = sorted((run for run in runs if run["dtype"] == dtype), key=lambda run: run["seed"])
    steps = [step for step, _ in chosen[0][name]]
    losses = [[loss for _, loss in run[name]] for run in chosen]
    if name == "held_out":
        # Before the first step the adapter does nothing: all bf16 seeds are one point, and no spread.
        return steps[1:], [values[1:] for values in losses]
    width = max(1, len(steps) // 12)
    means = [[sum(v[i - width : i]) / width for i in range(width, len(v) + 1)] for v in losses]
    return steps[width - 1 :], means


def judge(runs: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """fp8 against the spread of bf16, as the text at the top says."""
    (_, plain), (_, float8) = curves(runs, "bf16", name), curves(runs, "fp8", name)
    inside = [min(p) <= mean(f) <= max(p) for p, f in zip(columns(plain), columns(float8), strict=True)]
    same_seed = root_mean_square(differences(zip(float8, plain, strict=True)))
    two_seeds = root_mean_square(differences(combinations(plain, 2)))
    final = {dtype: [values[-1] for values in found] for dtype, found in (("bf16", plain), ("fp8", float8))}
    return {
        "share_of_steps_inside": sum(inside) / len(inside),
        "same_seed_difference": same_seed,
        "difference_between_seeds": two_seeds,
        "ratio": same_seed / two_seeds,
        "within_the_spread": sum(inside) >= 0.95 * len(inside) and same_seed < two_seeds,
        "final": final,
        "final_mean_difference": mean(final["fp8"]) - mean(final["bf16"]),
    }


def columns(values: Sequence[Sequence[float]]) -> list[tuple[float, ...]]:
    return list(zip(*values, strict=True))


def differences(pairs: Any) -> list[float]:
    return [a - b for one, other in pairs for a, b in zip(one, other, strict=True)]


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def root_mean_square(values: Sequence[float]) -> float:
    return mean([value * value for value in values]) ** 0.5


# Showing --------------------------------------------------------------------------------------------------------------


def statement(report: dict[str, Any]) -> str:
    judged = report["judgement"]
    both = all(found["within_the_spread"] for found in judged.values())
    share = max(found["ratio"] for found in judged.values())
    where = "stays within" if both else "leaves"
    return f"fp8 {where} the seed-to-seed spread of bf16: the same seed differs by {share:.2f} of what two seeds do"


def print_table(report: dict[str, Any]) -> None:
    print(f"\n{'':<10} {'bf16, last':>11} {'fp8, last':>11} {'fp8 − bf16':>11} {'two seeds':>10} {'ratio':>6}  inside")
    for name, found in report["judgement"].items():
        last = [mean(found["final"][dtype]) for dtype in DTYPES]
        numbers = f"{last[0]:11.4f} {last[1]:11.4f} {found['same_seed_difference']:11.4f}"
        spread = f"{found['difference_between_seeds']:10.4f} {found['ratio']:6.2f}"
        print(f"{name:<10} {numbers} {spread}  {found['share_of_steps_inside']:.0%} of steps")
    print(f"\n{statement(report)}.")


def draw(report: dict[str, Any], path: Path) -> None:
    """Above the two losses, bf16 as a band; below, what fp8 changes for each seed, against what the seed changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    titles = {"train": "training loss (running mean)", "held_out": "held-out loss"}
    for column, (name, title) in enumerate(titles.items()):
        above, below = axes[0][column], axes[1][column]
        steps, plain = curves(report["runs"], "bf16", name)
        _, float8 = curves(report["runs"], "fp8", name)
        low, high = [min(v) for v in columns(plain)], [max(v) for v in columns(plain)]
        middle = [mean(v) for v in columns(plain)]
        above.fill_between(steps, low, high, color=COLOURS["bf16"], alpha=0.3, linewidth=0, label="bf16: all seeds")
        above.plot(steps, middle, color=COLOURS["bf16"], linewidth=2, label="bf16: mean")
        for number, losses in enumerate(float8):
            label = "fp8: each seed" if number == 0 else None
            above.plot(steps, losses, color=COLOURS["fp8"], linewidth=0.8, alpha=0.6, label=label)
        mean_float8 = [mean(v) for v in columns(float8)]
        above.plot(steps, mean_float8, color=COLOURS["fp8"], linewidth=2, linestyle=(0, (4, 2)), label="fp8: mean")
        spread = ([a - m for a, m in zip(edge, middle, strict=True)] for edge in (low, high))
        below.fill_between(
            steps, *spread, color=COLOURS["bf16"], alpha=0.3, linewidth=0, label="bf16 seeds − their mean"
        )
        for number, (one, other) in enumerate(zip(float8, plain, strict=True)):
            label = "fp8 − bf16, same seed" if number == 0 else None
            below.plot(steps, differences([(one, other)]), color=COLOURS["fp8"], linewidth=1, alpha=0.8, label=label)
        below.axhline(0, color=INK, linewidth=0.8)
        above.set_title(title, loc="left", fontsize=10, color=INK)
        below.set_xlabel("step", color=FAINT, fontsize=9)
        for panel in (above, below):
            style(panel)
    axes[0][0].set_ylabel("nats per token", color=FAINT, fontsize=9)
    axes[1][0].set_ylabel("difference", color=FAINT, fontsize=9)
    figure.suptitle(statement(report), x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel(footnote(report), x=0.008, ha="left", fontsize=8, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.legend(loc="best", fontsize=8, facecolor="white", framealpha=0.9, edgecolor="none")


def footnote(report: dict[str, Any]) -> str:
    chosen, machine = report["settings"], report["machine"]
    where = machine["gpus"][0].partition(",")[0] if machine["gpus"] else machine["cpu"]
    run_of = f"DoRA rank {chosen['rank']}, {chosen['steps']} steps of {chosen['batch']} rows, {chosen['seeds']} seeds"
    return f"{chosen['model']} on {chosen['data']}: {run_of}, on {where}."


if __name__ == "__main__":
    main()
