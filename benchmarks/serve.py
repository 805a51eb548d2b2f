"""Tokens per second with many adapters mixed in a batch, beside the base model on the same engine, and beside PEFT.

    python benchmarks/serve.py --model HuggingFaceTB/SmolLM2-135M-Instruct         # on this machine
    python benchmarks/serve.py --shape llama-3-8b --peft-adapters                  # on a GPU, random weights

The same requests (random prompts of one length, greedy, no end token) go through an engine with the base model alone,
and through one whose requests are spread evenly over 1, 8, 64 and 256 adapters; where there are more adapters than
requests, as many requests as adapters are sent, to both. Engines take turns, and a ratio is taken within each round;
the table shows medians. PEFT serves the same requests adapter by adapter: `set_adapter`, then `generate` on all
requests of that adapter at once. Adapters are random: time does not depend on their numbers. HTTP is left out. The time
to load an adapter is from its folder to ready (read, checked, g computed), one at a time, the page cache warm.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

SHAPES = {
    "llama-3-8b": {
        "vocab_size": 128256,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_hidden_layers": 32,
    },
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 2,
    },
}


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="theodora-serve-") as folder:
        measure(args, Path(folder))


def measure(args: argparse.Namespace, path: Path) -> None:
    """Serve from adapters in the folder `path`, and report."""
    import torch

    torch.set_grad_enabled(False)
    model = build(args)
    adapted = twin(model)
    save_random_adapter(copy.deepcopy(model) if args.shape is None else model, path / "one", args)
    load_seconds, engine = served(adapted, path / "one", args)
    base = started(model, args)
    warm_up(base, engine, args)

    results: dict[str, list[float]] = {"base": []} | {str(n): [] for n in args.adapters}
    ratios: dict[str, list[float]] = {name: [] for name in results}
    for round_ in range(args.rounds):
        bases = {
            count: throughput(base, [None], args, count)
            for count in sorted({requests(n, args) for n in (1, *args.adapters)})
        }
        results["base"].append(bases[args.requests])
        ratios["base"].append(1.0)
        for n in args.adapters:
            results[str(n)].append(throughput(engine, names(n), args, requests(n, args)))
            ratios[str(n)].append(results[str(n)][-1] / bases[requests(n, args)])
        print(f"round {round_ + 1}/{args.rounds}: {[round(v[-1], 1) for v in results.values()]}", file=sys.stderr)
    base.stop()
    engine.stop()
    peft = {str(n): peft_throughput(model, path / "one", n, args) for n in args.peft_adapters}
    report(results, ratios, peft, load_seconds, args)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name")
    parser.add_argument("--shape", choices=SHAPES, help="random weights of this shape instead")
    parser.add_argument("--layers", type=int, help="of the shape, instead of all")
    parser.add_argument("--dtype", default="auto", help="default: as stored; bf16 with --shape")
    parser.add_argument("--device", help="default: the GPU, if there is one")
    parser.add_argument("--adapters", type=int, nargs="+", default=[1, 8, 64, 256], help="default: 1 8 64 256")
    parser.add_argument("--peft-adapters", type=int, nargs="*", default=[1, 8, 64], help="default: 1 8 64")
    parser.add_argument("--method", choices=("dora", "lora"), default="dora", help="default: dora")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--batch", type=int, default=64, help="requests in a batch; default: 64")
    parser.add_argument("--requests", type=int, help="default: as many as fit in a batch")
    parser.add_argument("--prompt", type=int, default=32, help="tokens; default: 32")
    parser.add_argument("--tokens", type=int, default=64, help="tokens of an answer; default: 64")
    parser.add_argument("--rounds", type=int, default=3, help="default: 3")
    parser.add_argument("--cuda-graphs", action=argparse.BooleanOptionalAction, help="default: the server's choice")
    parser.add_argument("--cpu-time", action="store_true", help="count the process's CPU seconds: on a busy machine")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/serve.json"), help="JSON file")
    args = parser.parse_args()
    if (args.model is None) == (args.shape is None):
        parser.error("expected either --model or --shape")
    args.requests = args.requests or args.batch
    return args


def build(args: argparse.Namespace) -> Any:
    """The base model, frozen, on its device."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from theodora.adapters.models import best_device, load_model
    from theodora.files.model_folder import DTYPES

    device = torch.device(args.device) if args.device else best_device()
    if args.model is not None:
        model: Any = load_model(args.model, dtype=args.dtype).to(device)  # pyright: ignore[reportArgumentType]
    else:
        shape = SHAPES[args.shape] | ({"num_hidden_layers": args.layers} if args.layers else {})
        config = AutoConfig.for_model("llama", **shape, max_position_embeddings=8192)
        dtype = getattr(torch, DTYPES["bf16" if args.dtype == "auto" else args.dtype])
        torch.manual_seed(0)
        with device:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.eval().requires_grad_(False)


def twin(model: Any) -> Any:
    """Another model with the same weights in the same memory."""
    return copy.deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def save_random_adapter(model: Any, folder: Path, args: argparse.Namespace) -> None:
    """An adapter of all linear layers, as if it had been trained."""
    import torch

    from theodora import AdapterConfig, inject_adapter, remove_adapter, save_adapter

    torch.manual_seed(1)
    inject_adapter(model, AdapterConfig(method=args.method, rank=args.rank))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.normal_(std=0.01)
        elif name.endswith("magnitude"):
            parameter.mul_(1 + 0.02 * torch.randn_like(parameter))
    save_adapter(model, folder)
    remove_adapter(model)


def config(args: argparse.Namespace) -> Any:
    from theodora.serve.config import ServeConfig

    return ServeConfig(
        model="base",
        slots=max(args.adapters),
        max_rank=args.rank,
        max_batch=args.batch,
        max_queue=max(args.requests, *args.adapters),
        kv_tokens=args.batch * (args.prompt + args.tokens + 256),
        cuda_graphs=args.cuda_graphs,
        prefix_reuse=False,
    )


def started(model: Any, args: argparse.Namespace) -> Any:
    from theodora.serve.engine import Engine

    engine = Engine(model, config(args))
    engine.start()
    return engine


def served(model: Any, folder: Path, args: argparse.Namespace) -> tuple[list[float], Any]:
    """An engine with as many adapters as are asked for, all with the same numbers, and how long loading took."""
    from dataclasses import replace

    from theodora.serve.engine import Engine

    engine = Engine(model, config(args))
    adapter = engine.load("a0", folder)  # makes the slots
    seconds = []
    for _ in range(3):
        engine.unload("a0")
        engine.mover.submit(lambda: None).result()  # one at a time: the last one is in host memory by now
        adapter = engine.load("a0", folder)
        seconds.append(adapter.seconds)
    for index in range(max(args.adapters)):
        another = replace(adapter, name=f"a{index}", serial=adapter.serial + 1 + index, leaving=False)
        engine.host.add(another)
        engine.adapters.add(another)
    engine.start()
    return seconds, engine


def names(count: int) -> list[str]:
    return [f"a{index}" for index in range(count)]


def requests(adapters: int, args: argparse.Namespace) -> int:
    """Requests that are sent to that many adapters."""
    return max(adapters, args.requests)


def warm_up(base: Any, engine: Any, args: argparse.Namespace) -> None:
    """Fill all slots, compile what is compiled, and capture what is captured (for each length, on a GPU)."""
    short = argparse.Namespace(**{**vars(args), "tokens": args.tokens if base.device.type == "cuda" else 4})
    throughput(base, [None], short, args.requests)
    for n in sorted(args.adapters):
        throughput(engine, names(n), short, requests(n, args))


def throughput(engine: Any, adapters: list[Any], args: argparse.Namespace, count: int) -> float:
    """Generated tokens per second."""
    from theodora.serve.requests import Sampling

    sampling = Sampling(max_tokens=args.tokens, temperature=0.0)
    asked = list(zip(prompts(args, count), itertools.cycle(adapters), strict=False))
    clock = time.process_time if args.cpu_time else time.perf_counter
    start = clock()
    sent = [engine.submit(prompt, sampling, name, every_token=False) for prompt, name in asked]
    outputs = [request.updates.get(timeout=3600) for request in sent]
    seconds = clock() - start
    assert all(len(output.generated_tokens) == args.tokens for output in outputs), outputs[0].error
    return count * args.tokens / seconds


def prompts(args: argparse.Namespace, count: int) -> list[list[int]]:
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(3, 256, (count, args.prompt), generator=generator).tolist()


def peft_throughput(model: Any, folder: Path, count: int, args: argparse.Namespace) -> float:
    """Generated tokens per second of PEFT, which serves one adapter at a time; one warm round before."""
    import torch
    from peft import PeftModel
    from transformers.utils.logging import set_verbosity_error

    set_verbosity_error()
    with torch.enable_grad():
        peft: Any = PeftModel.from_pretrained(twin(model), folder, "a0").eval()
        for name in names(count)[1:]:
            peft.load_adapter(folder, name)
    per_adapter: dict[str, list[list[int]]] = {}
    for prompt, name in zip(prompts(args, requests(count, args)), itertools.cycle(names(count)), strict=False):
        per_adapter.setdefault(name, []).append(prompt)
    clock = time.process_time if args.cpu_time else time.perf_counter
    for tokens in (4, args.tokens):
        start = clock()
        for name, its in per_adapter.items():
            peft.set_adapter(name)
            ids = torch.tensor(its, device=model.device)
            mask = torch.ones_like(ids)
            out = peft.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False
            )
            assert out.shape[1] == args.prompt + tokens
        if model.device.type == "cuda":
            torch.cuda.synchronize()
    return requests(count, args) * args.tokens / (clock() - start)


def report(
    results: dict[str, list[float]],
    ratios: dict[str, list[float]],
    peft: dict[str, float],
    load_seconds: list[float],
    args: argparse.Namespace,
) -> None:
    from rich.console import Console
    from rich.table import Table

    from theodora.bench.machine import describe_machine

    rows = []
    for name, values in results.items():
        rows.append(
            {
                "adapters": name,
                "tokens_per_second": statistics.median(values),
                "ratio": statistics.median(ratios[name]),
                "ratios": [min(ratios[name]), max(ratios[name])],
                "peft_tokens_per_second": peft.get(name),
            }
        )
    what = args.model or args.shape
    table = Table(
        title=f"{what}, {args.method} rank {args.rank}: {args.requests} requests, batch {args.batch}, "
        f"{args.prompt} + {args.tokens} tokens",
        caption=f"loading an adapter: {1e3 * statistics.median(load_seconds):.0f} ms (median of {len(load_seconds)})",
    )
    for heading in ("adapters", "tokens/s", "× base", "PEFT tokens/s", "× PEFT"):
        table.add_column(heading, justify="right")
    for r in rows:
        theirs = r["peft_tokens_per_second"]
        span = f"{r['ratio']:.2f} ({r['ratios'][0]:.2f}–{r['ratios'][1]:.2f})"
        extra = (f"{theirs:.1f}", f"{r['tokens_per_second'] / theirs:.1f}") if theirs else ("", "")
        table.add_row(r["adapters"], f"{r['tokens_per_second']:.1f}", span, *extra)
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = {name: value for name, value in vars(args).items() if name != "output"}
    found = {"setting": chosen, "machine": describe_machine(), "rows": rows, "load_seconds": load_seconds}
    args.output.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)


if __name__ == "__main__":
    main()
