"""Steps of GRPO on a GPU, drawing and learning apart: ours beside TRL's trainer with PEFT.

    python benchmarks/grpo_step.py --model out/study/SmolLM2-135M-Instruct
    python benchmarks/grpo_step.py --model tiny --steps 2 --prompts 2 --completions 2 --length 8      # on a CPU

A step draws `completions` answers to each of `prompts` prompts at temperature 1 and learns from all of them at once,
rewarded for the letter e. Variants run one after the other in processes of their own, each on the same prompts; the
first two steps, which capture graphs and compile kernels, are left out. `trl-…` is TRL's GRPOTrainer with peft_config
and bf16, drawing by transformers' generate, or where it says so by transformers' continuous batching.

Tokens/s of drawing are tokens of completions over the time in which they are drawn; those of learning are tokens of
prompts and completions over the rest of the step (rewards, forward and backward pass, optimizer).
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from theodora.bench import describe_machine

RESULTS = Path("benchmarks/results/grpo_step.json")
LEFT_OUT = 2
VARIANTS = {
    "lora": "Theodora LoRA",
    "dora": "Theodora DoRA",
    "trl-lora": "TRL and PEFT LoRA, generate",
    "trl-dora": "TRL and PEFT DoRA, generate",
    "trl-lora-batches": "TRL and PEFT LoRA, continuous batching",
}


class Clock:
    """Seconds and tokens of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.drawing = self.drawn = self.learned = 0.0
        self.began = 0.0

    def now(self) -> float:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def drawn_by(self, draw: Any, count: Any) -> Any:
        """`draw`, timed; `count` gives the tokens of completions, and with those of prompts, of what it returns."""

        def timed(*args: Any, **kwargs: Any) -> Any:
            begin = self.now()
            found = draw(*args, **kwargs)
            self.drawing += self.now() - begin
            completions, whole = count(found, *args)
            self.drawn, self.learned = self.drawn + completions, self.learned + whole
            return found

        return timed

    def callback(self) -> Any:
        from transformers import TrainerCallback

        clock = self

        class Steps(TrainerCallback):
            def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
                clock.began = clock.now()

            def on_step_end(self, *args: Any, **kwargs: Any) -> None:
                now = clock.now()
                clock.steps.append(
                    {
                        "step": now - clock.began,
                        "drawing": clock.drawing,
                        "drawn": clock.drawn,
                        "learned": clock.learned,
                    }
                )
                clock.began, clock.drawing, clock.drawn, clock.learned = now, 0.0, 0.0, 0.0

        return Steps()


def prompts_of(count: int) -> list[str]:
    words = ["river", "mountain", "engine", "library", "market", "winter", "violin", "harbour"]
    return [f"Write some sentences about the {words[n % len(words)]} number {n}." for n in range(count)]


def share_of_e(completions: list[Any]) -> list[float]:
    """The reward: how often a completion has the letter e."""
    texts = [each if isinstance(each, str) else each[0]["content"] for each in completions]
    return [text.count("e") / max(1, len(text)) for text in texts]


def ours(args: argparse.Namespace, method: str, clock: Clock) -> dict[str, Any]:
    from rich.console import Console

    from theodora import TrainConfig, train
    from theodora.train import build, grpo

    draw = grpo.Rollouts.__call__

    def count(found: list[Any], _: Any, prompts: list[list[int]], *rest: Any) -> tuple[int, int]:
        completions = sum(len(each.tokens) for each in found)
        return completions, completions + sum(map(len, prompts))

    grpo.Rollouts.__call__ = clock.drawn_by(draw, count)
    made = build.build_trainer
    trainers: list[Any] = []

    def build_trainer(prepared: Any, arguments: Any, callbacks: list[Any]) -> Any:
        trainers.append(made(prepared, arguments, [*callbacks, clock.callback()]))
        return trainers[-1]

    import_module("theodora.train.run").build_trainer = build_trainer  # pyright: ignore[reportAttributeAccessIssue]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        rows = prompts_of(args.prompts * (args.steps + LEFT_OUT))
        data.write_text("".join(json.dumps({"prompt": [{"role": "user", "content": row}]}) + "\n" for row in rows))
        options = {
            "model": args.model,
            "data": str(data),
            "output": f"{folder}/run",
            "objective": "grpo",
            "reward": [f"{__file__}:share_of_e"],
            "num_generations": args.completions,
            "max_completion_length": args.length,
            "per_device_train_batch_size": args.prompts * args.completions,
            "max_steps": args.steps + LEFT_OUT,
            "held_out": 0,
            "method": method,
            "rank": 16,
            "learning_rate": 1e-6,
            "save_steps": 1000,
            "logging_steps": 1,
        }
        train(TrainConfig.from_options(options, granted=["reward"]), console=Console(quiet=True))
        lines = [json.loads(line) for line in (Path(folder) / "run" / "metrics.jsonl").read_text().splitlines()]
    name = "sampling/sampling_logp_difference/mean"
    difference = [line[name] for line in lines if name in line]
    return {
        "way": trainers[0].rollouts.way,
        "graphs": trainers[0].graph_replays,
        "why_no_graph": trainers[0].why_no_graph,
        "logp_difference": statistics.mean(difference),
    }


def trls(args: argparse.Namespace, method: str, batches: bool, clock: Clock) -> dict[str, Any]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    cuda = torch.cuda.is_available()
    rows = [
        {"prompt": [{"role": "user", "content": row}]} for row in prompts_of(args.prompts * (args.steps + LEFT_OUT))
    ]
    with tempfile.TemporaryDirectory() as folder:
        arguments = GRPOConfig(
            folder,
            bf16=cuda,
            use_cpu=not cuda,
            gradient_checkpointing=False,
            per_device_train_batch_size=args.prompts * args.completions,
            num_generations=args.completions,
            max_completion_length=args.length,
            max_steps=args.steps + LEFT_OUT,
            learning_rate=1e-6,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            use_transformers_continuous_batching=batches,
        )
        model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16 if cuda else torch.float32)
        trainer = GRPOTrainer(
            model,
            reward_funcs=lambda completions, **_: share_of_e(completions),
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=AutoTokenizer.from_pretrained(args.model),
            peft_config=LoraConfig(
                r=16, lora_alpha=32, target_modules="all-linear", use_dora=method == "dora", task_type="CAUSAL_LM"
            ),
            callbacks=[clock.callback()],
        )

        def count(found: Any, prompt_ids: Any, *rest: Any) -> tuple[int, int]:
            completions = sum(map(len, found[0]))
            return completions, completions + sum(map(len, prompt_ids))

        trainer._generate_single_turn = clock.drawn_by(trainer._generate_single_turn, count)
        trainer.train()
    return {}


def measure(args: argparse.Namespace) -> None:
    """In a process of its own: one variant, as JSON on the last line."""
    import torch

    clock = Clock()
    rest = args.variant.removeprefix("trl-")
    method = rest.partition("-")[0]
    found = ours(args, method, clock) if rest == args.variant else trls(args, method, "batches" in rest, clock)
    steps = clock.steps[LEFT_OUT:]
    drawing, learning = sum(s["drawing"] for s in steps), sum(s["step"] - s["drawing"] for s in steps)
    result = {
        "label": VARIANTS[args.variant],
        "step": statistics.median(s["step"] for s in steps),
        "drawing": statistics.median(s["drawing"] for s in steps),
        "drawn_per_second": sum(s["drawn"] for s in steps) / drawing,
        "learned_per_second": sum(s["learned"] for s in steps) / learning,
        "completion_tokens": sum(s["drawn"] for s in steps) / len(steps),
        "peak": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "steps": clock.steps,
        **found,
    }
    print(json.dumps(result))


def main() -> None:
    args = parse_args()
    if args.variant:
        measure(args)
        return
    rows: dict[str, Any] = {}
    for name in args.variants or VARIANTS:
        command = [sys.executable, __file__, "--variant", name, "--model", args.model]
        command += [f"--{key}={getattr(args, key)}" for key in ("steps", "prompts", "completions", "length")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            print(f"{name} failed:\n{done.stderr[-3000:]}")
            continue
        row = rows[name] = json.loads(done.stdout.splitlines()[-1])
        peak = f", peak {row['peak'] / 2**30:.2f} GiB" if row["peak"] else ""
        print(
            f"{row['label']:42} step {row['step'] * 1e3:8.1f} ms, drawing {row['drawing'] * 1e3:8.1f} ms, "
            f"{row['drawn_per_second']:9,.0f} tokens/s drawn, {row['learned_per_second']:9,.0f} learned{peak}"
            + (f", log-probabilities off by {row['logp_difference']:.1e}" if "logp_difference" in row else "")
            + (f", {row['way']}" if "way" in row else ""),
            flush=True,
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        machine = describe_machine() | ({"commit": args.commit} if args.commit else {})
        args.output.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder or hub name")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--variant", choices=VARIANTS, help=argparse.SUPPRESS)
    parser.add_argument("--steps", type=int, default=8, help="timed steps; default: 8")
    parser.add_argument("--prompts", type=int, default=16, help="of a step; default: 16")
    parser.add_argument("--completions", type=int, default=8, help="of a prompt; default: 8")
    parser.add_argument("--length", type=int, default=128, help="tokens of a completion, at most; default: 128")
    parser.add_argument("--commit", help="to be noted where the code is not in a checkout")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file; default: {RESULTS}")
    return parser.parse_args()


if __name__ == "__main__":
    main()
