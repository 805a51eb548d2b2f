"""One training step on the CPU: a frozen model's own forward and backward, PEFT's LoRA and DoRA, and ours.

    make bench                                                   # the demo's model, 7 rounds
    make bench ARGS="--model path/to/model --rounds 15 --rank 16"

Each variant lives in a process of its own, so that its peak memory is its own. The processes take turns, one step at
a time, so that whatever else slows the machine down slows all of them: a ratio is taken within each round, and the
table shows the median over the rounds. Linux only (it reads /proc). All variants are in memory at once: on a small
machine choose two with `--variants peft-lora dora`.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

VARIANTS = {
    "floor": "frozen model",
    "peft-lora": "PEFT LoRA",
    "peft-dora": "PEFT DoRA",
    "lora": "theodora LoRA",
    "dora": "theodora DoRA",
}
YARDSTICK = "peft-lora"


def main() -> None:
    args = parse_args()
    model = args.model or demo_model()
    # Spawned, not forked: a fork would start with the parent's memory and torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    started: dict[str, dict[str, Any]] = {}
    for name in args.variants:
        workers[name], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, name, model, args), daemon=True).start()
        theirs.close()
        started[name] = workers[name].recv()
        print(f"{VARIANTS[name]}: ready, first loss {started[name]['loss']:.4f}", file=sys.stderr)
    check_same_work(started)

    seconds: dict[str, list[float]] = {name: [] for name in workers}
    for round_ in range(args.rounds):
        for name, worker in workers.items():
            worker.send("step")
            seconds[name].append(worker.recv())
        print(f"round {round_ + 1}/{args.rounds}: {seconds_of_round(seconds, round_)}", file=sys.stderr)
    memory: dict[str, dict[str, int]] = {}
    for name, worker in workers.items():
        worker.send("memory")
        memory[name] = worker.recv()
        worker.send("stop")

    rows = [row(name, seconds, memory, started) for name in workers]
    show(rows, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    report = {"setting": setting(args, model), "machine": machine(), "rows": rows, "seconds": seconds}
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name of a causal LM; default: the demo's SmolLM2-135M")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"], help="default: bfloat16")
    parser.add_argument("--rank", type=int, default=8, help="default: 8")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch; default: 4")
    parser.add_argument("--length", type=int, default=256, help="tokens in a sequence; default: 256")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each variant; default: 7")
    parser.add_argument("--threads", type=int, default=0, help="threads of torch; default: its own choice")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="default: all")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu_step.json"), help="JSON file")
    return parser.parse_args()


def demo_model() -> str:
    from rich.console import Console

    from theodora.demo.model import cached_model

    return str(cached_model(Console(stderr=True)))


# The worker -----------------------------------------------------------------------------------------------------------


def work(pipe: Connection, variant: str, model: str, args: argparse.Namespace) -> None:
    """Hold one variant of the model; on command take one step, or say how much memory was used."""
    import torch
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    # peft 0.21 calls a property of transformers 5.23 by its old name
    warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
    if args.threads:
        torch.set_num_threads(args.threads)
    step, trained, model_only = build(variant, model, args)
    loss = step()  # warms up allocator and thread pools, and is not timed
    pipe.send({"loss": loss, "trained": trained})
    while (command := pipe.recv()) != "stop":
        if command == "step":
            start = time.perf_counter()
            step()
            pipe.send(time.perf_counter() - start)
        else:
            pipe.send({"model": model_only, "peak": status_bytes("VmHWM")})


def build(variant: str, folder: str, args: argparse.Namespace) -> tuple[Callable[[], float], int, int]:
    """One training step as a function, the number of trained parameters, and the resident bytes before adapters."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, args.dtype))
    model.config.use_cache = False
    ids = torch.randint(model.config.vocab_size, (args.batch, args.length))
    touch = sum(
        float(p.detach().view(-1)[::512].float().sum()) for p in model.parameters()
    )  # weights are mapped lazily
    assert touch == touch, "the model holds NaN"
    model_only = status_bytes("VmRSS")
    model = add_adapter(model, variant, args.rank).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None

    def step() -> float:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    return step, sum(p.numel() for p in trained), model_only


def add_adapter(model: Any, variant: str, rank: int) -> Any:
    if variant == "floor":
        # What any adapter has to pay: gradients flow through all layers down to the embeddings' output.
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model
    if variant.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        dora = variant == "peft-dora"
        config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", use_dora=dora)
        return get_peft_model(model, config)
    from theodora import AdapterConfig, inject_adapter

    method = "dora" if variant == "dora" else "lora"
    return inject_adapter(model, AdapterConfig(method=method, rank=rank, alpha=2 * rank, targets="all-linear"))


def status_bytes(key: str) -> int:
    """VmRSS (resident now) or VmHWM (most ever) of this process. `ru_maxrss` would count the parent's, too."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {key}")


# The report -----------------------------------------------------------------------------------------------------------


def check_same_work(started: dict[str, dict[str, Any]]) -> None:
    """Every adapter starts as the identity, so all first losses are one, up to the dtype's rounding."""
    losses = [worker["loss"] for worker in started.values()]
    if max(losses) > 1.01 * min(losses):
        raise SystemExit(f"first losses differ, so this compares different work: {losses}")
    for peft, ours in (("peft-lora", "lora"), ("peft-dora", "dora")):
        if {peft, ours} <= started.keys() and started[peft]["trained"] != started[ours]["trained"]:
            raise SystemExit(f"{peft} and {ours} train a different number of parameters: {started}")


def seconds_of_round(seconds: dict[str, list[float]], round_: int) -> str:
    return "  ".join(f"{name} {values[round_]:.3f}" for name, values in seconds.items())


def row(
    name: str, seconds: dict[str, list[float]], memory: dict[str, dict[str, int]], started: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    result: dict[str, Any] = {
        "variant": name,
        "trained_parameters": started[name]["trained"],
        "step_s_median": statistics.median(seconds[name]),
        "step_s_min": min(seconds[name]),
        "peak_bytes": memory[name]["peak"],
        "model_bytes": memory[name]["model"],
        "growth_bytes": memory[name]["peak"] - memory[name]["model"],
    }
    for other in ("floor", YARDSTICK):
        if other in seconds:
            ratios = [a / b for a, b in zip(seconds[name], seconds[other], strict=True)]
            result[f"step_ratio_to_{other}"] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
            }
            result[f"peak_ratio_to_{other}"] = memory[name]["peak"] / memory[other]["peak"]
    return result


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    title = f"One training step, {args.batch} × {args.length} tokens, {args.dtype}, rank {args.rank}, all linear layers"
    table = Table(
        title=title, caption="× is the median of the rounds' ratios (smallest–largest); memory is resident memory"
    )
    columns = ("", "step s", "tokens/s", "× floor", "× PEFT LoRA", "peak GB", "× PEFT LoRA", "above model GB")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left")
    for r in rows:
        step = r["step_s_median"]
        table.add_row(
            VARIANTS[r["variant"]],
            f"{step:.3f}",
            f"{args.batch * args.length / step:.0f}",
            ratio(r.get("step_ratio_to_floor")),
            ratio(r.get(f"step_ratio_to_{YARDSTICK}")),
            f"{r['peak_bytes'] / 1e9:.2f}",
            f"{r[f'peak_ratio_to_{YARDSTICK}']:.2f}" if f"peak_ratio_to_{YARDSTICK}" in r else "",
            f"{r['growth_bytes'] / 1e9:.2f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)  # a pipe has no width of its own


def ratio(values: dict[str, float] | None) -> str:
    return f"{values['median']:.2f} ({values['min']:.2f}–{values['max']:.2f})" if values else ""


def setting(args: argparse.Namespace, model: str) -> dict[str, Any]:
    chosen = {key: value for key, value in vars(args).items() if key not in ("output", "model")}
    command = " ".join(["python", *(argument.replace(str(Path.home()), "~") for argument in sys.argv)])
    return {"command": command, "model": Path(model).name, "commit": commit(), "date": now(), **chosen}


def machine() -> dict[str, Any]:
    import torch

    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), "")
    packages = ("theodora", "torch", "transformers", "peft", "accelerate")
    return {
        "cpu": cpu.partition(":")[2].strip() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "system": platform.platform(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
    }


def commit() -> str | None:
    try:
        here = Path(__file__).parent
        asked = ["git", "-C", str(here), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        return subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # an export without git


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    main()
