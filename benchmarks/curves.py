"""Loss curves of several ways to train, seed by seed: running, judging and drawing them. Parts of *_curve.py.

A run is a dict: `seed`, `way`, and `train` and `held_out`, each a list of [step, loss]. One way is the reference, whose
seeds make the band. Judged are two losses: that of the rows trained on, as a running mean over a twelfth of the steps,
and that of the held-out rows. Another way is *within the seed-to-seed spread* if, for both,

  - its mean over the seeds lies between the lowest and the highest seed of the reference, at 95 % of the steps or
    more, and
  - the same seed's difference from the reference is smaller than the difference between two seeds of it (root mean
    squares over all steps and seeds, or pairs of seeds). A ratio well below 1 says that the way matters less than luck.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import random
import tempfile
from collections.abc import Callable, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

INK, FAINT, GRID = "#222222", "#6b6b6b", "#e4e4e4"
BAND = "#8a8f98"
LOSSES = {"train": "training loss (running mean)", "held_out": "held-out loss"}
RESULTS = Path(__file__).parent / "results"

Run = dict[str, Any]
Cell = tuple[argparse.Namespace, int, str, Path]
"""What one run is told: the options, its seed, its way, and a folder with the rows, for its own output, too."""


# Measuring ------------------------------------------------------------------------------------------------------------


def parser_of(doc: str, name: str, figure: Path) -> argparse.ArgumentParser:
    """The options that all comparisons share; `name` is the results file's."""
    parser = argparse.ArgumentParser(description=doc.partition("\n")[0])
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
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json")
    parser.add_argument("--figure", type=Path, default=figure)
    parser.add_argument("--draw", type=Path, help="draw an earlier results file, and measure nothing")
    return parser


def parsed(parser: argparse.ArgumentParser) -> argparse.Namespace:
    args = parser.parse_args()
    if not args.draw and not (args.model and args.data):
        parser.error("--model and --data are needed")
    if args.seeds < 2:
        parser.error(f"--seeds is {args.seeds}; a spread needs at least 2")
    return args


def settings(args: argparse.Namespace) -> dict[str, Any]:
    shown = {name: value for name, value in vars(args).items() if name not in ("output", "figure", "draw", "parallel")}
    return shown | {"model": Path(args.model).name, "data": Path(args.data).name}


def report_of(args: argparse.Namespace, reference: str, others: Sequence[str], run: Callable[[Cell], Run]) -> Any:
    """What was measured and judged, written to the results file; or an earlier file, if that is to be drawn."""
    from theodora.bench import describe_machine

    if args.draw:
        return json.loads(args.draw.read_text(encoding="utf-8"))
    report: dict[str, Any] = {
        "machine": describe_machine(),
        "settings": settings(args),
        "runs": measure(args, (reference, *others), run),
    }
    report["judgement"] = {
        other: {name: judge(report["runs"], name, reference, other) for name in LOSSES} for other in others
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    return report


def measure(args: argparse.Namespace, ways: Sequence[str], run: Callable[[Cell], Run]) -> list[Run]:
    """All runs, `--parallel` at once; `run` gives the losses by step of one."""
    runs: list[Run] = []
    pool = multiprocessing.get_context("spawn").Pool(args.parallel)
    with tempfile.TemporaryDirectory(prefix="theodora-curve-") as scratch, pool:
        split_rows(Path(args.data), args.held_out, Path(scratch))
        every = [(args, seed, way, Path(scratch)) for seed in range(args.seeds) for way in ways]
        for (_, seed, way, _), found in zip(every, pool.imap(run, every), strict=True):
            runs.append({"seed": seed, "way": way, **found})
            losses = f"loss {found['train'][-1][1]:.4f}, held out {found['held_out'][-1][1]:.4f}"
            print(f"seed {seed}  {way:<6}  {losses}  {found['seconds']:.0f} s", flush=True)
    return runs


def split_rows(data: Path, held_out: int, folder: Path) -> None:
    rows = data.read_text(encoding="utf-8").splitlines()
    random.Random(0).shuffle(rows)
    for name, part in (("held_out.jsonl", rows[:held_out]), ("train.jsonl", rows[held_out:])):
        (folder / name).write_text("\n".join(part) + "\n", encoding="utf-8")


def train_options(cell: Cell) -> dict[str, Any]:
    """What all ways have in common, for `TrainConfig`."""
    import torch

    args, seed, way, scratch = cell
    torch.set_num_threads(max(1, torch.get_num_threads() // args.parallel))
    return {
        "model": args.model,
        "data": str(scratch / "train.jsonl"),
        "eval_data": str(scratch / "held_out.jsonl"),
        "output": str(scratch / f"{way}-{seed}"),
        "max_steps": args.steps,
        "per_device_train_batch_size": args.batch,
        "per_device_eval_batch_size": 32,
        "learning_rate": args.learning_rate,
        "max_length": args.max_length,
        "eval_steps": max(1, args.steps // 12),
        "save_steps": args.steps,
        "bf16": True,
        "seed": seed,
    }


def trained(config: Any) -> Run:
    """A run of `theodora train`."""
    from rich.console import Console

    from theodora import train
    from theodora.train.callbacks import read_metrics

    result = train(config, console=Console(quiet=True), show_result=False)
    lines = read_metrics(Path(config.output) / "metrics.jsonl")
    return losses_in(lines) | {"seconds": result.seconds, "peak_memory": result.peak_memory}


def losses_in(lines: Sequence[Mapping[str, Any]]) -> Run:
    """Of a trainer's log."""
    return {
        "train": [(line["step"], line["loss"]) for line in lines if "loss" in line],
        "held_out": [(line["step"], line["eval_loss"]) for line in lines if "eval_loss" in line],
    }


# Judging --------------------------------------------------------------------------------------------------------------


def curves(runs: Sequence[Run], way: str, name: str) -> tuple[list[int], list[list[float]]]:
    """Steps, and the losses of each seed; those of training as running means, from the first whole window on."""
    chosen = sorted((run for run in runs if run["way"] == way), key=lambda run: run["seed"])
    steps = [step for step, _ in chosen[0][name]]
    losses = [[loss for _, loss in run[name]] for run in chosen]
    if name == "held_out":
        # Before the first step an adapter does nothing: all seeds are one point, and no spread.
        return steps[1:], [values[1:] for values in losses]
    width = max(1, len(steps) // 12)
    means = [[sum(v[i - width : i]) / width for i in range(width, len(v) + 1)] for v in losses]
    return steps[width - 1 :], means


def judge(runs: Sequence[Run], name: str, reference: str, other: str) -> dict[str, Any]:
    """One way against the spread of the reference, as the text at the top says."""
    (_, base), (_, found) = curves(runs, reference, name), curves(runs, other, name)
    inside = [min(b) <= mean(f) <= max(b) for b, f in zip(columns(base), columns(found), strict=True)]
    same_seed = root_mean_square(differences(zip(found, base, strict=True)))
    two_seeds = root_mean_square(differences(combinations(base, 2)))
    final = {way: [values[-1] for values in losses] for way, losses in ((reference, base), (other, found))}
    return {
        "share_of_steps_inside": sum(inside) / len(inside),
        "same_seed_difference": same_seed,
        "difference_between_seeds": two_seeds,
        "ratio": same_seed / two_seeds,
        "within_the_spread": sum(inside) >= 0.95 * len(inside) and same_seed < two_seeds,
        "final": final,
        "final_mean_difference": mean(final[other]) - mean(final[reference]),
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


def print_table(report: dict[str, Any], reference: str, names: Mapping[str, str]) -> None:
    """Last losses and differences of each way; `names` are those of the ways."""
    head = f"{names[reference] + ', last':>22} {'its own':>9} {'difference':>11} {'two seeds':>10} {'ratio':>6}"
    for other, judged in report["judgement"].items():
        print(f"\n{names[other]:<24} {head}  inside")
        for name, found in judged.items():
            last = [mean(found["final"][way]) for way in (reference, other)]
            numbers = f"{last[0]:22.4f} {last[1]:9.4f} {found['same_seed_difference']:11.4f}"
            spread = f"{found['difference_between_seeds']:10.4f} {found['ratio']:6.2f}"
            print(f"  {name:<22} {numbers} {spread}  {found['share_of_steps_inside']:.0%} of steps")


def draw(
    report: dict[str, Any],
    path: Path,
    reference: str,
    names: Mapping[str, str],
    colours: Mapping[str, str],
    heading: str,
    run_of: str,
) -> None:
    """Above the two losses, the reference as a band; below, what another way changes for each seed, against what the
    seed changes."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 6.4), dpi=160, layout="constrained", facecolor="white")
    axes = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    base = names[reference]
    for column, (name, title) in enumerate(LOSSES.items()):
        above, below = axes[0][column], axes[1][column]
        steps, plain = curves(report["runs"], reference, name)
        low, high = [min(v) for v in columns(plain)], [max(v) for v in columns(plain)]
        middle = [mean(v) for v in columns(plain)]
        band = {"color": BAND, "alpha": 0.3, "linewidth": 0}
        above.fill_between(steps, low, high, label=f"{base}: all seeds", **band)
        above.plot(steps, middle, color=BAND, linewidth=2, label=f"{base}: mean")
        spread = ([a - m for a, m in zip(edge, middle, strict=True)] for edge in (low, high))
        below.fill_between(steps, *spread, label=f"{base} seeds − their mean", **band)
        for way in report["judgement"]:
            _, found = curves(report["runs"], way, name)
            for losses in found:
                above.plot(steps, losses, color=colours[way], linewidth=0.8, alpha=0.4)
            means = [mean(v) for v in columns(found)]
            label = f"{names[way]}: mean, and each seed"
            above.plot(steps, means, color=colours[way], linewidth=2, linestyle=(0, (4, 2)), label=label)
            for number, (one, other) in enumerate(zip(found, plain, strict=True)):
                label = f"{names[way]} − {base}, same seed" if number == 0 else None
                change = differences([(one, other)])
                below.plot(steps, change, color=colours[way], linewidth=1, alpha=0.8, label=label)
        below.axhline(0, color=INK, linewidth=0.8)
        bottom, top = below.get_ylim()  # room for the legend over the lines
        below.set_ylim(bottom, top + 0.14 * (1 + len(report["judgement"])) * (top - bottom))
        above.set_title(title, loc="left", fontsize=10, color=INK)
        below.set_xlabel("step", color=FAINT, fontsize=9)
        for panel in (above, below):
            style(panel)
    axes[0][0].set_ylabel("nats per token", color=FAINT, fontsize=9)
    axes[1][0].set_ylabel("difference", color=FAINT, fontsize=9)
    figure.suptitle(heading, x=0.008, ha="left", fontsize=12, fontweight="bold", color=INK)
    figure.supxlabel(footnote(report, run_of), x=0.008, ha="left", fontsize=8, color=FAINT)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def style(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")
    axes.tick_params(colors="#555555", labelsize=8)
    axes.grid(axis="y", color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.margins(x=0.02)
    axes.legend(loc="upper right", fontsize=8, facecolor="white", framealpha=0.9, edgecolor="none")


def footnote(report: dict[str, Any], run_of: str) -> str:
    chosen, machine = report["settings"], report["machine"]
    where = machine["gpus"][0].partition(",")[0] if machine["gpus"] else machine["cpu"]
    runs = (
        f"{run_of}, rank {chosen['rank']}, {chosen['steps']} steps of {chosen['batch']} rows, {chosen['seeds']} seeds"
    )
    return f"{chosen['model']} on {chosen['data']}: {runs}, on {where}."
