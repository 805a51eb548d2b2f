"""Time per generated token on a GPU: the base model, merged, and with an adapter beside it, ours and PEFT's.

    python benchmarks/decode.py                                        # 8 layers of Llama-3-8B's shape, under a minute
    python benchmarks/decode.py --layers 32 --variants base dora       # the whole model; 16 GB for each variant
    python benchmarks/decode.py --quantize nf4 --batches 1             # beside the base in 4 bits, alone

Weights are random: time does not depend on them. Each variant lives in a process of its own; the processes take turns,
so that whatever else slows the machine down slows all of them. A ratio is taken within each round, and the table shows
the median over the rounds. Three ways to generate:

    graph      the model's forward under torch.compile (reduce-overhead: CUDA graphs) with a static cache, in a loop
    static     `model.generate(cache_implementation="static")`, which does the same and works on the host beside it
    eager      `model.generate()`, no compilation

With --quantize the base of every variant is built in few bits, block by block; nothing is merged then.

With few layers `static` and `eager` measure the host, which waits for nobody: look at `graph` for the GPU's own time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from theodora.files.trained_on import KINDS

RESULTS = Path("benchmarks/results")
VARIANTS = {
    "base": "base model",
    "merged": "theodora DoRA, merged",
    "lora": "theodora LoRA",
    "dora": "theodora DoRA",
    "peft-lora": "PEFT LoRA",
    "peft-dora": "PEFT DoRA",
}
MODES = ("graph", "static", "eager")
LLAMA_8B = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
TINY = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
WARM_UP = 6
"""Tokens that are not timed at the start of a run: the prefill, and what a CUDA graph needs to be recorded."""


def main() -> None:
    args = parse_args()
    # Spawned, not forked: a fork cannot use CUDA, and would start with torch's threads in an unknown state.
    context = multiprocessing.get_context("spawn")
    workers: dict[str, Connection] = {}
    for name in args.variants:
        workers[name], theirs = context.Pipe()
        context.Process(target=work, args=(theirs, name, args), daemon=True).start()
        theirs.close()
    started = {name: worker.recv() for name, worker in workers.items()}
    print(f"ready: {', '.join(started)}", file=sys.stderr)
    differences = check_same_work(started)

    runs = [(mode, batch) for mode in args.modes for batch in args.batches]
    for run in runs:  # compiles; all variants at once
        for worker in workers.values():
            worker.send(run)
        for worker in workers.values():
            worker.recv()
    seconds: dict[str, dict[str, list[float]]] = {key(*run): {name: [] for name in workers} for run in runs}
    for round_ in range(args.rounds):
        for run in runs:
            for name, worker in workers.items():
                worker.send(run)
                seconds[key(*run)][name].append(worker.recv())
        print(f"round {round_ + 1}/{args.rounds}", file=sys.stderr)
    for worker in workers.values():
        worker.send("stop")

    rows = [row(name, seconds) for name in workers]
    show(rows, seconds, args)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    from theodora.bench.machine import describe_machine

    chosen = {name: value for name, value in vars(args).items() if name != "output"}
    report = {"setting": chosen, "machine": describe_machine(), "rows": rows, "seconds": seconds, **differences}
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="decoder layers; default: 8 (Llama-3-8B has 32)")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32], help="default: 1 32")
    parser.add_argument("--prompt", type=int, default=32, help="tokens of the prompts; default: 32")
    parser.add_argument("--tokens", type=int, default=48, help="timed tokens of a run; default: 48")
    parser.add_argument("--rounds", type=int, default=5, help="timed runs of each kind; default: 5")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, help="default: all; on a quantised base, all but merged"
    )
    parser.add_argument("--quantize", choices=KINDS, help="store the linear layers so")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES), help="default: all")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to try the script out on a CPU")
    parser.add_argument("--output", type=Path, help="JSON file; default: results/decode.json or quantised_decode.json")
    args = parser.parse_args()
    args.variants = args.variants or [name for name in VARIANTS if args.quantize is None or name != "merged"]
    args.output = args.output or RESULTS / ("decode.json" if args.quantize is None else "quantised_decode.json")
    if args.quantize is not None and "merged" in args.variants:
        parser.error("merged is the base's own weights plus the adapter, and --quantize leaves none to add to")
    return args


# The worker -----------------------------------------------------------------------------------------------------------


def work(pipe: Connection, variant: str, args: argparse.Namespace) -> None:
    """Hold one variant of the model; on command generate, and say how many seconds a token took."""
    import torch
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    warnings.simplefilter("ignore")  # inductor's and peft's advice
    torch.set_grad_enabled(False)
    model = build(variant, args)
    pipe.send(first_logits(model, args))
    run = {"graph": run_graph, "static": run_static, "eager": run_eager}
    while (command := pipe.recv()) != "stop":
        mode, batch = command
        pipe.send(run[mode](model, batch, args))


def build(variant: str, args: argparse.Namespace) -> Any:
    """The model with its adapter, whose B differs from zero."""
    import torch
    from transformers import AutoConfig

    from theodora.bench.models import random_model

    shape = {**(TINY if args.tiny else LLAMA_8B), "num_hidden_layers": args.layers, "bos_token_id": None}
    config = AutoConfig.for_model("llama", **shape, eos_token_id=None, pad_token_id=0, max_position_embeddings=8192)
    model = random_model(config, dtype=torch.bfloat16, device=args.device, quantize=args.quantize).eval()
    if variant.startswith("peft"):
        from peft import LoraConfig, get_peft_model

        peft = LoraConfig(
            r=args.rank, lora_alpha=2 * args.rank, target_modules="all-linear", use_dora=variant == "peft-dora"
        )
        get_peft_model(model, peft, autocast_adapter_dtype=False)
    elif variant != "base":
        from theodora import AdapterConfig, inject_adapter

        method = "lora" if variant == "lora" else "dora"
        inject_adapter(model, AdapterConfig(method=method, rank=args.rank, alpha=2 * args.rank, adapter_dtype="base"))
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:  # the libraries draw it in different ways
            parameter.normal_(std=parameter.shape[1] ** -0.5)
        elif "lora_B" in name:
            parameter.normal_(std=0.02)
    if variant == "merged":
        from theodora import merge_adapter

        merge_adapter(model)
    return model.eval()


def prompt(batch: int, args: argparse.Namespace) -> Any:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (batch, args.prompt), generator=generator).to(args.device)


def first_logits(model: Any, args: argparse.Namespace) -> list[float]:
    """A few logits of the last prompt token, to compare the variants by."""
    return model(prompt(1, args)).logits[0, -1, :64].float().tolist()


def run_graph(model: Any, batch: int, args: argparse.Namespace) -> float:
    """Greedy decoding with a static cache and transformers' own compiled forward, without anything around it."""
    import torch
    from transformers import StaticCache

    from theodora.synonyms import cache_argument

    step = model.get_compiled_call(None)
    ids = prompt(batch, args)
    cache = StaticCache(config=model.config, max_cache_len=args.prompt + WARM_UP + args.tokens + 1)
    given = {cache_argument(model): cache, "use_cache": True}
    token = model(ids, **given).logits[:, -1:].argmax(-1)
    position = torch.full((batch, 1), args.prompt, device=args.device)
    for index in range(WARM_UP + args.tokens):
        if index == WARM_UP:
            start = now(args.device)
        logits = step(input_ids=token, position_ids=position, **given).logits
        token = logits[:, -1:].argmax(-1)
        position = position + 1
    return (now(args.device) - start) / args.tokens


def run_static(model: Any, batch: int, args: argparse.Namespace) -> float:
    """`generate` with CUDA graphs, as transformers offers them."""
    return run_generate(model, batch, args, cache_implementation="static")


def run_eager(model: Any, batch: int, args: argparse.Namespace) -> float:
    """`generate` as it is by default."""
    return run_generate(model, batch, args)


def run_generate(model: Any, batch: int, args: argparse.Namespace, **options: Any) -> float:
    from transformers import LogitsProcessorList

    times: list[float] = []

    def watch(ids: Any, scores: Any) -> Any:
        if ids.shape[1] - args.prompt in (WARM_UP, WARM_UP + args.tokens):
            times.append(now(args.device))
        return scores

    ids = prompt(batch, args)
    new = WARM_UP + args.tokens + 1
    processors = LogitsProcessorList([watch])  # pyright: ignore[reportArgumentType]
    mask = ids.new_ones(ids.shape)
    model.generate(
        ids, attention_mask=mask, max_new_tokens=new, do_sample=False, logits_processor=processors, **options
    )
    return (times[1] - times[0]) / args.tokens


def now(device: str) -> float:
    """Seconds, once the device has done all that it was given."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# The report -----------------------------------------------------------------------------------------------------------


def check_same_work(started: dict[str, list[float]]) -> dict[str, float]:
    """Merged and unmerged compute the same, up to the rounding of bfloat16; so do we and PEFT."""
    found = {}
    for one, other in (("merged", "dora"), ("peft-dora", "dora"), ("peft-lora", "lora")):
        if {one, other} <= started.keys():
            difference = sum((a - b) ** 2 for a, b in zip(started[one], started[other], strict=True)) ** 0.5
            size = sum(a * a for a in started[other]) ** 0.5
            found[f"difference of {one} and {other}"] = difference / size
            if one == "merged" and not difference < 0.2 * size:
                raise SystemExit(f"{one} and {other} differ by {difference / size:.1%}: this compares different work")
    return found


def key(mode: str, batch: int) -> str:
    return f"{mode}, batch {batch}"


def row(name: str, seconds: dict[str, dict[str, list[float]]]) -> dict[str, Any]:
    result: dict[str, Any] = {"variant": name}
    for run, times in seconds.items():
        result[run] = {"median_s": statistics.median(times[name]), "min_s": min(times[name])}
        if "base" in times:
            ratios = [a / b for a, b in zip(times[name], times["base"], strict=True)]
            result[run] |= {"ratio": statistics.median(ratios), "ratios": [min(ratios), max(ratios)]}
    return result


def show(rows: list[dict[str, Any]], seconds: dict[str, Any], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"Milliseconds a token (× base model): {args.layers} layers, rank {args.rank}, all linear layers, "
        f"{'bf16' if args.quantize is None else f'base in {args.quantize}'}",
        caption="a step generates one token for each sequence of the batch; × is the median of the rounds' ratios",
    )
    table.add_column("")
    for run in seconds:
        table.add_column(run, justify="right")
    for r in rows:
        cells = (f"{1e3 * r[run]['median_s']:.3f}" + ratio(r[run].get("ratio")) for run in seconds)
        table.add_row(VARIANTS[r["variant"]], *cells)
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)  # a pipe has no width of its own


def ratio(value: float | None) -> str:
    return "" if value is None else f" ({value:.2f})"


if __name__ == "__main__":
    main()
