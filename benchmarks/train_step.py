"""One training step on a GPU: forward and backward of a frozen model, of its adapters by PEFT and Unsloth, and of ours.

    python benchmarks/train_step.py                                # the table: Llama-3-8B's shape, 8 of 32 layers
    python benchmarks/train_step.py --layers 32 --variants floor lora dora dora-fp8
    python benchmarks/train_step.py --sweep rank        # or tokens, checkpointing, targets, hidden, family, experts
    python benchmarks/train_step.py --quantize nf4 --sweep checkpointing              # on a base in 4 bits, or int8, …
    python benchmarks/train_step.py --quantize nf4 --hidden 8192 --layers 80 --batch 1 --gradient-checkpointing \
        --memory-limit 80 --variants floor-eager lora dora         # 70B's shape, as if the GPU had 80 GiB
    python benchmarks/train_step.py --sweep memory --memory-limit 24                  # what 24 GiB are enough for
    python benchmarks/train_step.py --layers 1 --hidden 64 --length 64 --batch 2 --vocabulary 256    # on a CPU

The weights are random, so nothing is downloaded. Each variant has a process of its own and they take turns (see
theodora.bench.runner): a turn is one untimed step, then timed ones, each between two waits for the GPU. `ms` is the
median of all timed steps, `× floor` the median of the ratios within a round. Between steps, outside the timing, every
adapter is moved, so that nothing computed once per optimizer step is used twice.

The floor is the model without an adapter: decoder blocks under torch.compile, one by one, and Liger's fused linear
cross entropy. Gradients flow to the embeddings' output in every row. Memory is the most that PyTorch's allocator has
handed out during a step (for a CUDA graph, while it was captured); the results file also has what it held in all. `% of
peak` counts what the frozen model alone must compute: 4 × the weights in matrix products × tokens (forward, and the
gradients of the inputs), and causal attention (theodora.bench.build.matmul_flops), against the GPU's datasheet in dense
bf16. `first step s` runs from the model on its device to the end of the first step: adapter, compilation with empty
caches, and all; a process's start and imports are not in it. With --keep-caches, the user's caches of compiled code are
used instead.

With --quantize every model is built in few bits, block by block, and never exists in bf16 (Unsloth's, which it loads
itself, is quantised from a folder of the same shape). The floor is then the faster of the two without an adapter:
compiled blocks, and eager with Liger's kernels. --memory-limit is what PyTorch's allocator may take in each process;
the CUDA context, about half a GiB, lies beside it. `--sweep memory` takes the optimizer's step, too.

With --sweep experts the models are mixtures of experts: transformers' grouped products run the frozen ones, in both
floors, of which the faster is the floor. "Experts too" adapts each expert's products beside attention; otherwise
attention alone is.

A peer that is not installed, or fails, has a row that says so.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from theodora.bench import (
    Job,
    Row,
    Runner,
    Variant,
    Workload,
    describe_machine,
    differing_losses,
    make_rows,
    plain_rows,
    step_table,
    timings,
)
from theodora.files.trained_on import KINDS

LLAMA: dict[str, Any] = {
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 16384,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500000.0},
    "tie_word_embeddings": False,
}

# Hidden size -> the rest of the shape: Llama-3.2-1B, Llama-3-8B, Qwen2.5-14B and Llama-3-70B.
SHAPES: dict[int, dict[str, Any]] = {
    2048: {"hidden_size": 2048, "intermediate_size": 8192},
    4096: {},
    5120: {
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_attention_heads": 40,
        "vocab_size": 152064,
    },
    8192: {"hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64},
}

# The shapes of Qwen2-7B, Mistral-7B-v0.3, Gemma-7B, Phi-3-mini and GPT-2 XL.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen2": {
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "vocab_size": 152064,
    },
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32768,
        "sliding_window": None,
    },
    "gemma": {
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "vocab_size": 256000,
    },
    "phi3": {
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32064,
        "pad_token_id": 0,
    },
    "gpt2": {
        "n_embd": 1600,
        "n_head": 25,
        "vocab_size": 50257,
        "n_positions": 2048,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
}

# The shapes of Qwen3-30B-A3B, gpt-oss-20b and Mixtral-8x7B, and how many layers of each are measured.
EXPERTS: dict[str, tuple[int, dict[str, Any]]] = {
    "qwen3_moe": (
        8,
        {
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "vocab_size": 151936,
        },
    ),
    "gpt_oss": (
        4,
        {
            "hidden_size": 2880,
            "intermediate_size": 2880,
            "num_local_experts": 32,
            "num_experts_per_tok": 4,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "vocab_size": 201088,
        },
    ),
    "mixtral": (
        4,
        {
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 32000,
        },
    ),
}

RESULTS = Path("benchmarks/results/train_step.json")
QUANTIZED_RESULTS = Path("benchmarks/results/quantised_step.json")
FLOORS = ("floor", "floor-eager")

PEFT, OURS = (
    partial(Variant, library="peft", liger="all"),
    partial(Variant, library="theodora", accelerate=True, graph=True),
)
VARIANTS = {
    "floor": Variant(label="floor: no adapter, compiled blocks", liger="loss", compiled=True),
    "floor-eager": Variant(label="floor, eager, Liger kernels", liger="all"),
    "peft-lora": PEFT(label="Liger + PEFT LoRA", method="lora"),
    "peft-lora-bf16": PEFT(label="Liger + PEFT LoRA, bf16 adapters", method="lora", bf16_adapter=True),
    "peft-dora": PEFT(label="Liger + PEFT DoRA", method="dora"),
    "peft-dora-bf16": PEFT(label="Liger + PEFT DoRA, bf16 adapters", method="dora", bf16_adapter=True),
    "unsloth-lora": Variant(label="Unsloth LoRA", method="lora", imports=("unsloth",)),
    "unsloth-dora": Variant(label="Unsloth DoRA", method="dora", imports=("unsloth",)),
    "lora": OURS(label="Theodora LoRA", method="lora"),
    "dora": OURS(label="Theodora DoRA", method="dora"),
    "dora-fp8": OURS(label="Theodora DoRA, fp8 base", method="dora", base_dtype="fp8"),
    "dora-eager": OURS(label="Theodora DoRA, no CUDA graph", method="dora", graph=False),
    # Not in the table unless asked for.
    "peft-lora-experts-bf16": PEFT(
        label="Liger + PEFT LoRA, experts too, bf16 adapters", method="lora", bf16_adapter=True, experts=True
    ),
    "lora-experts": OURS(label="Theodora LoRA, experts too", method="lora", experts=True),
    "dora-experts": OURS(label="Theodora DoRA, experts too", method="dora", experts=True),
    "dora-compiled": OURS(label="Theodora DoRA, compiled blocks", method="dora", compiled=True),
    "dora-reference": Variant(
        label="Theodora DoRA, without its fast path", library="theodora", method="dora", liger="all"
    ),
}
TABLE = [name for name, v in VARIANTS.items() if name not in ("dora-compiled", "dora-reference") and not v.experts]
QUANTIZED = [name for name in TABLE if name not in ("dora-fp8", "dora-eager")]
SWEEPS: dict[str, list[str]] = {
    "rank": ["floor", "dora"],
    "tokens": ["floor", "dora"],
    "checkpointing": ["floor", "floor-eager", "unsloth-lora", "dora"],
    "targets": ["floor", "unsloth-lora", "dora"],
    "hidden": ["floor", "dora"],
    "family": ["floor", "dora", "dora-compiled"],
    "memory": ["dora"],
    "experts": ["floor", "floor-eager", "peft-lora-experts-bf16", "lora-experts", "dora-experts", "dora"],
}
# Name, hidden size, layers, and whether activations are recomputed.
MODELS_IN_MEMORY = [("8B", 4096, 32, False), ("8B", 4096, 32, True), ("14B", 5120, 48, True)]
MEMORY = 24  # GiB, unless told otherwise: the cards that most people have


def main() -> None:
    args = parse_args()
    with tempfile.TemporaryDirectory(prefix="theodora-bench-") as scratch:
        args.scratch = Path(scratch)
        if args.sweep:
            run_sweep(args)
            return
        workload = base_workload(args)
        names = args.variants or (TABLE if args.quantize is None else QUANTIZED)
        report = run(args, make_jobs(args, names, workload), title(args, workload))
        save(args, part(args), report)
    if args.figure:
        from train_step_figure import draw

        draw(report, args.figure)
        say(f"drawn to {args.figure}")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"of {', '.join(VARIANTS)}")
    parser.add_argument("--sweep", choices=SWEEPS, help="a series of small tables instead of the large one")
    add_workload_arguments(parser)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute each block")
    parser.add_argument("--quantize", choices=KINDS, help="store the frozen linear layers so; default: in bf16")
    parser.add_argument("--memory-limit", type=float, metavar="GIB", help="of the GPU, for each process; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each variant; default: 5")
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a turn; default: 2")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no variant after so many seconds")
    parser.add_argument("--unsloth-path", help="folder to import Unsloth and what it needs from")
    parser.add_argument("--commit", help="to be noted where the code is not in a checkout")
    parser.add_argument("--keep-caches", action="store_true", help="use the user's caches of compiled code")
    parser.add_argument("--output", type=Path, help=f"JSON file; default: {RESULTS}, or {QUANTIZED_RESULTS}")
    parser.add_argument("--figure", type=Path, help="PNG of the table")
    args = parser.parse_args()
    if args.sweep == "memory" and args.quantize is None:
        args.quantize = "nf4"
    if args.quantize is not None and "dora-fp8" in (args.variants or []):
        parser.error(
            f"dora-fp8 puts a bf16 base into float8, and --quantize {args.quantize} leaves none; expected dora"
        )
    args.output = args.output or (RESULTS if args.quantize is None else QUANTIZED_RESULTS)
    return args


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """What `base_workload` reads, but for `gradient_checkpointing`, `quantize` and `memory_limit`."""
    parser.add_argument("--layers", type=int, help="default: 8; of --sweep memory, all")
    parser.add_argument("--hidden", type=int, help="another shape: 2048, 5120, 8192, or any small number for a test")
    parser.add_argument("--vocabulary", type=int, help="default: the family's")
    parser.add_argument("--batch", type=int, default=4, help="sequences in a batch; default: 4")
    parser.add_argument("--length", type=int, default=2048, help="tokens in a sequence; default: 2048")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")


# What is measured -----------------------------------------------------------------------------------------------------


def base_workload(args: argparse.Namespace) -> Workload:
    import torch

    cuda = torch.cuda.is_available()
    limit = getattr(args, "memory_limit", None)
    if limit is not None and not cuda:
        say("there is no GPU, so nothing is limited to --memory-limit")
    return Workload(
        model={**LLAMA, **shape(args)},
        quantize=getattr(args, "quantize", None),
        memory_limit=limit if cuda else None,
        dtype="bfloat16" if cuda else "float32",
        device="cuda" if cuda else "cpu",
        batch=args.batch,
        length=args.length,
        rank=args.rank,
        gradient_checkpointing=args.gradient_checkpointing,
    )


def shape(args: argparse.Namespace) -> dict[str, Any]:
    """What the command line changes of a model's configuration."""
    hidden = args.hidden or LLAMA["hidden_size"]
    small = {"hidden_size": hidden, "intermediate_size": 3 * hidden, "num_attention_heads": 4, "num_key_value_heads": 2}
    vocabulary = {"vocab_size": args.vocabulary} if args.vocabulary else {}
    return {**SHAPES.get(hidden, small), "num_hidden_layers": args.layers or 8, **vocabulary}


def sweep_points(args: argparse.Namespace) -> Iterator[tuple[str, Workload]]:
    """What each row of a sweep is called, and its workload."""
    base = base_workload(args)
    if args.sweep == "rank":
        yield from ((f"rank {rank}", replace(base, rank=rank)) for rank in (4, 8, 16, 32, 64, 128, 256))
    elif args.sweep == "tokens":
        lengths = [max(2, args.length * k // 8) for k in (1, 2, 4, 8, 16)]
        yield from ((f"{base.batch * n} tokens", replace(base, length=n)) for n in lengths)
    elif args.sweep == "checkpointing":
        yield "all kept", base
        yield "checkpointing", replace(base, gradient_checkpointing=True)
    elif args.sweep == "targets":
        yield "all linear", base
        yield "q, v only", replace(base, targets=("q_proj", "v_proj"))
    elif args.sweep == "hidden":
        count = args.layers or 8
        for hidden, layers in ((2048, count), (4096, count), (8192, max(1, count // 2))):
            model = {**LLAMA, **SHAPES[hidden], "num_hidden_layers": layers}
            yield f"hidden {hidden}, {layers} layers", replace(base, model=model)
    elif args.sweep == "memory":
        for name, hidden, layers, recomputes in MODELS_IN_MEMORY:
            own = shape(args) if args.hidden else {**SHAPES[hidden], "num_hidden_layers": args.layers or layers}
            model, checkpointing = {**LLAMA, **own}, ", checkpointing" * recomputes
            workload = replace(base, model=model, batch=1, gradient_checkpointing=recomputes, optimizer=True)
            if base.device != "cpu" and base.memory_limit is None:
                workload = replace(workload, memory_limit=MEMORY)
            yield f"{name}, 1 × {base.length}{checkpointing}", workload
    elif args.sweep == "experts":
        for family, (layers, settings) in EXPERTS.items():
            small = {}
            if args.hidden:
                small = {**small_family(family, shape(args)), "moe_intermediate_size": args.hidden}
                small |= {"intermediate_size": args.hidden, "num_experts": 4, "num_local_experts": 4}
                small["num_experts_per_tok"] = 2
            own = {"model_type": family, "max_position_embeddings": 16384, **settings, **small}
            yield family, replace(base, model={**own, "num_hidden_layers": args.layers or layers})
    else:
        for family, settings in FAMILIES.items():
            model = {"max_position_embeddings": 16384} if family != "gpt2" else {}
            small = small_family(family, shape(args)) if args.hidden else {}
            model |= {"model_type": family, **settings, **small, "num_hidden_layers": args.layers or 8}
            yield family, replace(base, model=model, length=min(base.length, 2048))


def small_family(family: str, sizes: dict[str, Any]) -> dict[str, Any]:
    """The family's architecture at the sizes of the command line, for a test."""
    if family == "gpt2":
        return {"n_embd": sizes["hidden_size"], "n_head": 4, "vocab_size": sizes.get("vocab_size", 50257)}
    return {**sizes, "head_dim": sizes["hidden_size"] // 4}


def make_jobs(args: argparse.Namespace, names: list[str], workload: Workload, label: str = "") -> list[Job]:
    """Jobs of one workload; without a GPU, those that need none."""
    jobs: list[Job] = []
    for name in names:
        variant = VARIANTS[name]
        if workload.device == "cpu":
            if variant.imports:
                continue
            variant = without_gpu(variant)
        if variant.imports:
            from train_step_unsloth import unsloth_variant

            variant = unsloth_variant(variant, workload, args)
        job_name = f"{name} {label}".strip()
        variant = replace(variant, environment={**variant.environment, **cache_folders(args, job_name)})
        jobs.append(
            Job(name=job_name, variant=replace(variant, label=f"{variant.label} {label}".strip()), workload=workload)
        )
    return jobs


def without_gpu(variant: Variant) -> Variant:
    """The variant as a CPU can run it."""
    return replace(variant, liger="none", accelerate=False, compiled=False)


def cache_folders(args: argparse.Namespace, name: str) -> dict[str, str]:
    """Empty caches of compiled code: one for each variant of the table, whose first step is to be a first one."""
    if args.keep_caches:
        return {}
    folder = args.scratch / ("sweep" if args.sweep else name)
    return {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton")}


# Running and reporting ------------------------------------------------------------------------------------------------


def run(args: argparse.Namespace, jobs: list[Job], heading: str, floors: Sequence[str] = FLOORS) -> dict[str, Any]:
    """Measure, print the table, and give the report, with ratios to the first of the `floors`; of a quantised base, to
    the fastest."""
    from rich.console import Console

    cuda = jobs[0].workload.device == "cuda"
    floors = [name for name in floors if any(job.name == name for job in jobs)]
    floor = floors[0] if floors else jobs[0].name
    measured = Runner(
        jobs,
        floor=floor,
        rounds=args.rounds,
        warm_up=1 if cuda else 0,
        steps=args.steps,
        seconds=args.seconds,
        progress=say,
    ).run()
    for name, m in measured.items():
        if m.failure and m.failure.traceback and not m.failure.out_of_memory:
            say(f"{name}:\n{m.failure.traceback[-2500:]}")
    if args.quantize is not None or args.sweep == "experts":
        floor = fastest(make_rows(measured, against=[]), floors) or floor
    rows = make_rows(measured, against=floors or [floor])
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(step_table(rows, title=heading, floor=floor))
    if warning := differing_losses(rows):
        say(f"Warning: {warning}")
    workloads = {job.name: {k: v for k, v in vars(job.workload).items() if k != "seed"} for job in jobs}
    return {
        "title": heading,
        "floor": floor,
        "machine": describe_machine() | ({"commit": args.commit} if args.commit else {}),
        "workloads": workloads,
        "rows": plain_rows(rows),
        "seconds": timings(measured),
    }


def run_sweep(args: argparse.Namespace) -> None:
    """One table for each floor: points that differ in the adapter alone share theirs."""
    tables: dict[str, list[Job]] = {}
    for label, workload in sweep_points(args):
        jobs = tables.setdefault(repr(replace(workload, rank=1, targets="all-linear")), [])
        names = args.variants or SWEEPS[args.sweep]
        jobs += make_jobs(args, [n for n in names if not (jobs and n.startswith("floor"))], workload, label)
    if args.sweep == "memory":  # nothing is compared: all at once save the time of as many starts
        tables = {"": [job for jobs in tables.values() for job in jobs]}
    reports: list[dict[str, Any]] = []
    for jobs in tables.values():
        floors = [job.name for job in jobs if job.name.startswith("floor")]
        reports.append(run(args, jobs, title(args, jobs[0].workload), floors))
        save(args, part(args), reports)


def fastest(rows: Sequence[Row], names: Sequence[str]) -> str | None:
    """Of those rows the one with the shortest step; None if none of them was measured."""
    done = [row for row in rows if row.name in names and row.failure is None]
    return min(done, key=lambda row: row.step).name if done else None


def part(args: argparse.Namespace) -> str:
    """Under which name the results file has it: "nf4_checkpointing_8192x80"."""
    hidden, layers = args.hidden or LLAMA["hidden_size"], args.layers or 8
    if args.quantize is None or args.sweep:
        return "_".join(filter(None, [args.quantize, args.sweep])) or "table"
    sizes = "" if (hidden, layers) == (LLAMA["hidden_size"], 8) else f"{hidden}x{layers}"
    return "_".join(filter(None, [args.quantize, "checkpointing" * args.gradient_checkpointing, sizes]))


def save(args: argparse.Namespace, part: str, report: Any) -> None:
    """Put one part into the results file, and leave the others."""
    results = json.loads(args.output.read_text(encoding="utf-8")) if args.output.exists() else {}
    results[part] = report
    write_report(args.output, results)


def write_report(path: Path, report: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    say(f"written to {path}")


def title(args: argparse.Namespace, workload: Workload) -> str:
    model: Any = workload.model
    hidden = model.get("hidden_size") or model.get("n_embd")
    checkpointing = ", activation checkpointing" * workload.gradient_checkpointing
    stored = "" if args.quantize is None else f" on a frozen base in {args.quantize}"
    within = "" if workload.memory_limit is None else f", within {workload.memory_limit:g} GiB"
    if args.sweep == "memory":
        return f"One training step with AdamW's{stored}, rank {workload.rank} on all linear layers{within}"
    rank = "" if args.sweep == "rank" else f", rank {workload.rank}"
    targets = "" if args.sweep in ("targets", "experts") else " on all linear layers"
    return (
        f"One training step, {model['model_type']} of hidden size {hidden}, {model['num_hidden_layers']} layers, "
        f"{workload.batch} × {workload.length} tokens{rank}{targets}, {workload.dtype}{stored}{checkpointing}{within}"
    )


START = time.monotonic()


def say(message: str) -> None:
    print(f"[{time.monotonic() - START:5.0f} s] {message}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
