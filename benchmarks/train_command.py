"""Does `theodora train` keep the pace of the bare step? Tokens per second of the command beside those of the benchmark.

    python benchmarks/train_command.py                                        # a GPU: 8 layers of Llama-3-8B's shape
    python benchmarks/train_command.py --layers 1 --hidden 64 --vocabulary 256 --length 64 --batch 2 --steps 30  # a CPU
    python benchmarks/train_command.py --launched                 # and what the path of several processes costs in one

One model of random weights is saved with a tokenizer, and rows of random words that fill packed sequences. The command
runs as a user would run it: reading and packing the data, optimizer, clipping, logging at every tenth step, in a
process of its own. Its tokens per second are those of the steps after the first ten, by the clock of its metrics file.
Beside it the forward and backward pass alone (benchmarks/train_step.py, "Theodora DoRA"), before and after the command.

With --launched, torchrun starts the command with one process, too, in turns with the plain one: 1 2 2 1.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import train_step
from random_folder import save_random_model

from theodora.bench import Job, Runner, describe_machine
from theodora.train.callbacks import read_metrics

LOGGED = 10  # steps between two lines of the metrics file


def main() -> None:
    args = parse_args()
    workload = train_step.base_workload(args)
    with tempfile.TemporaryDirectory(prefix="theodora-command-") as scratch:
        model, data = Path(scratch) / "model", Path(scratch) / "rows.jsonl"
        save_random_model(workload, model)
        write_rows(data, args)
        bare = [bare_step(workload, args)]
        turns = (False, True, True, False) if args.launched else (False,)
        found = [
            (launched, run_command(model, data, Path(scratch) / f"run{n}", args, launched))
            for n, launched in enumerate(turns)
        ]
        bare.append(bare_step(workload, args))
    command, launched = ([speed for by_torchrun, speed in found if by_torchrun == which] for which in (False, True))
    tokens = workload.tokens
    report = {
        "machine": describe_machine(),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "bare_tokens_per_second": [tokens / seconds for seconds in bare],
        "command_tokens_per_second": command,
        "ratio": statistics.mean(command) / (tokens / statistics.mean(bare)),
    }
    if launched:
        report["launched_tokens_per_second"] = launched
        report["launched_time_ratio"] = statistics.mean(command) / statistics.mean(launched)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    before, after = report["bare_tokens_per_second"]
    print(f"forward and backward alone   {before:10,.0f} tokens/s before, {after:,.0f} after")
    print(f"theodora train               {statistics.mean(command):10,.0f} tokens/s: {report['ratio']:.3f} of it")
    if launched:
        ratio = report["launched_time_ratio"]
        print(
            f"by torchrun, one process     {statistics.mean(launched):10,.0f} tokens/s: {ratio:.3f} of the plain time"
        )


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    train_step.add_workload_arguments(parser)
    parser.add_argument("--steps", type=int, default=60, help="optimizer steps of the command; default: 60")
    parser.add_argument("--launched", action="store_true", help="also by torchrun, with one process")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/train_command.json"), help="JSON file")
    args = parser.parse_args()
    if args.steps <= LOGGED:
        parser.error(f"--steps is {args.steps}; the first {LOGGED} warm up, so more are needed")
    args.gradient_checkpointing = False
    return args


def write_rows(path: Path, args: argparse.Namespace) -> None:
    """Rows of words that the tokenizer knows, of several lengths, enough for every step."""
    draw = random.Random(0)
    tokens = 0
    with path.open("w", encoding="utf-8") as file:
        while tokens < (args.steps + 2) * args.batch * args.length:
            count = draw.randint(args.length // 32, args.length // 2)
            words = " ".join(f"word{draw.randint(4, 255)}" for _ in range(count))
            file.write(json.dumps({"text": words}) + "\n")
            tokens += count


def bare_step(workload: Any, args: argparse.Namespace) -> float:
    """Median seconds of the forward and backward pass."""
    cuda, variant = workload.device == "cuda", train_step.VARIANTS["dora"]
    job = Job(name="dora", variant=variant if cuda else train_step.without_gpu(variant), workload=workload)
    found = Runner([job], rounds=3 if cuda else 1, warm_up=3 if cuda else 1, steps=5).run()["dora"]
    if found.failure:
        sys.exit(f"The bare step failed: {found.failure.reason}\n{found.failure.traceback}")
    return statistics.median(seconds for turn in found.rounds.values() for seconds in turn)


def run_command(model: Path, data: Path, output: Path, args: argparse.Namespace, launched: bool) -> float:
    """Tokens per second of `theodora train`; `launched` by torchrun."""
    options = {
        "model": model,
        "data": data,
        "output": output,
        "rank": args.rank,
        "alpha": 2 * args.rank,
        "max-length": args.length,
        "per-device-train-batch-size": args.batch,
        "max-steps": args.steps,
        "logging-steps": LOGGED,
        "save-steps": 10 * args.steps,
        "held-out": 0,
    }
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"] if launched else []
    command = [sys.executable, *launcher, "-m", "theodora", "train", *words, "--packing"]
    log, metrics = output.parent / f"{output.name}.txt", output / "metrics.jsonl"
    seen: list[tuple[float, int]] = []  # when the file told how many tokens
    with log.open("wb") as printed:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        while process.poll() is None:
            time.sleep(0.005)
            tokens = [line["num_tokens"] for line in read_metrics(metrics) if "loss" in line]
            if len(tokens) > len(seen):
                seen.append((time.monotonic(), tokens[-1]))
    text = log.read_text(encoding="utf-8", errors="replace")
    if process.returncode or len(seen) < 2:
        sys.exit(f"theodora train failed (exit code {process.returncode}):\n{text[-3000:]}")
    print(text, file=sys.stderr)
    (began, first), (ended, last) = seen[0], seen[-1]
    return (last - first) / (ended - began)


if __name__ == "__main__":
    main()
