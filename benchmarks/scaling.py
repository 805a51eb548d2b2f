"""How a training step grows with the number of GPUs: DDP and FSDP2, with our adapter and with PEFT's.

    python benchmarks/scaling.py                                # Llama-3-8B's shape, 8 of 32 layers, on 1, 2, 4 … GPUs
    python benchmarks/scaling.py --processes 2 8 --layers 32 --gradient-checkpointing --ways dora-fsdp2 peft-dora-fsdp2
    python benchmarks/scaling.py --processes 2 --layers 80 --hidden 8192 --ways dora-nf4-fsdp2 --memory-limit 80
    python benchmarks/scaling.py --device cpu --backend gloo --processes 1 2 \
        --layers 1 --hidden 64 --length 64 --batch 2 --vocabulary 256                # to try it

The weights are random, so nothing is downloaded. Each way and each number of processes is one `torchrun` of this file's
`work`, on this machine. A step is forward and backward on a batch of the same size in every process (weak scaling),
the gradients' average, and AdamW's step.

`ms` is the median of the timed steps, each between two waits for the device, of the slowest process. `× 1` is how many
times the tokens/s of the same way in one process there are. `sent` is what one process sends in a step, counted where
collectives are called, as the usual ring makes of it: 2·(N - 1)/N of an all-reduce, (N - 1)/N of what an all-gather
gives or a reduce-scatter takes. Memory is the most that PyTorch's allocator has handed out in any process during the
steps (on a CPU, the process's peak). The loss of the first step is the same for every number of processes.

The floor is the frozen model without an adapter, its blocks compiled, with our cross entropy and gradients that flow to
the embeddings' output; under DDP it has nothing to send.

DDP: PEFT's model in torch's DistributedDataParallel; ours without a wrapper, its forward and backward pass as one CUDA
graph on a GPU and its gradients averaged in one message after it, as `theodora train` does. FSDP2: torch's
`fully_shard` on each decoder block and the whole, PEFT's adapter sharded with it (in the base's dtype, which a group
has to share; DDP's is in it, too); ours by `theodora.train.sharding`, whose adapter stays whole. The model is built
whole on its device before it is sharded, so it has to fit there. A way that fails has a
row that says so.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from train_step import add_workload_arguments, base_workload, say, write_report

from theodora.bench import Variant, describe_machine

RESULTS = Path("benchmarks/results/scaling.json")
FLOOR = Variant(label="no adapter, compiled blocks", compiled=True)
LORA = Variant(label="Theodora LoRA", library="theodora", method="lora", accelerate=True)
DORA = Variant(label="Theodora DoRA", library="theodora", method="dora", accelerate=True)
DORA_FP8 = replace(DORA, label="Theodora DoRA, fp8 base", base_dtype="fp8")
DORA_NF4 = replace(DORA, label="Theodora DoRA, NF4 base")
PEFT_LORA = Variant(label="Liger + PEFT LoRA", library="peft", method="lora", bf16_adapter=True, liger="all")
PEFT_DORA = replace(PEFT_LORA, label="Liger + PEFT DoRA", method="dora")
WAYS: dict[str, tuple[Variant, str]] = {
    f"{name}-{how}": (replace(variant, label=f"{variant.label}, {how.upper()}"), how)
    for how in ("ddp", "fsdp2")
    for name, variant in {
        "floor": FLOOR,
        "lora": LORA,
        "dora": DORA,
        "dora-fp8": DORA_FP8,
        "dora-nf4": DORA_NF4,
        "peft-lora": PEFT_LORA,
        "peft-dora": PEFT_DORA,
    }.items()
    if (name, how) != ("dora-fp8", "fsdp2")  # float8 is not sharded
}
COLUMNS = ("way", "N", "ms", "× floor", "tokens/s", "× 1", "sent MB", "peak GiB", "× floor", "loss")


def main() -> None:
    args = parse_args()
    if args.work is not None:
        work(args)
        return
    rows: list[dict[str, Any]] = json.loads(args.beside.read_text(encoding="utf-8"))["rows"] if args.beside else []
    for way in args.ways:
        for count in args.processes:
            say(f"{way} in {count} process{'es' * (count > 1)}")
            rows.append({"way": way, "label": WAYS[way][0].label, "processes": count} | launch(args, way, count))
            write(rows, args)
    for row in rows:
        others = {(r["way"], r["processes"]): r for r in rows if "failure" not in r}
        how = WAYS[row["way"]][1]
        one, floor = others.get((row["way"], 1)), others.get((f"floor-{how}", row["processes"]))
        if "failure" not in row:
            row |= {"speedup": row["tokens_per_second"] / one["tokens_per_second"]} if one else {}
            row |= {f"{key}_by_floor": row[key] / floor[key] for key in ("seconds", "peak")} if floor else {}
    show(rows, args)
    write(rows, args)


def write(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    settings = {name: value for name, value in vars(args).items() if name not in ("work", "output", "commit", "beside")}
    machine = describe_machine() | ({"commit": args.commit} if args.commit else {})
    report = {"machine": machine, "settings": settings, "rows": rows}
    write_report(args.output, report)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ways", nargs="+", choices=WAYS, metavar="NAME", help=f"of {', '.join(WAYS)}; default: all")
    parser.add_argument("--processes", nargs="+", type=int, metavar="N", help="default: 1, 2, 4 … up to all GPUs")
    parser.add_argument("--device", choices=["cuda", "cpu"], help="default: cuda where there is a GPU")
    parser.add_argument("--backend", help="default: nccl, or gloo on the CPU")
    add_workload_arguments(parser)
    parser.add_argument("--gradient-checkpointing", action="store_true", help="recompute each block")
    parser.add_argument("--memory-limit", type=float, help="GiB of each GPU, as if there were no more. Default: all.")
    parser.add_argument("--cpu-offload", action="store_true", help="FSDP2 keeps the shards in the host's memory")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps; default: 3")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; default: 10")
    parser.add_argument("--seconds", type=float, default=900, help="for one row, until it is given up; default: 900")
    parser.add_argument("--beside", type=Path, help="JSON file of an earlier call on this machine, whose rows go first")
    parser.add_argument("--commit", help="to be noted where the code is not in a checkout")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file; default: {RESULTS}")
    parser.add_argument("--work", nargs=2, metavar=("WAY", "FILE"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    import torch

    gpus = torch.cuda.device_count()
    args.device = args.device or ("cuda" if gpus else "cpu")
    args.backend = args.backend or ("nccl" if args.device == "cuda" else "gloo")
    most = gpus if args.device == "cuda" else os.cpu_count() or 1
    args.processes = args.processes or [count for count in (1, 2, 4, 8, 16) if count <= most]
    if args.device == "cuda" and max(args.processes) > gpus:
        parser.error(f"--processes {max(args.processes)}: there are {gpus} GPUs")
    args.ways = args.ways or list(WAYS)
    return args


def launch(args: argparse.Namespace, way: str, count: int) -> dict[str, Any]:
    """One row: the figures, or `failure`."""
    with tempfile.TemporaryDirectory(prefix="theodora-scaling-") as folder:
        result = Path(folder) / "result.json"
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", __file__]
        command += [*passed_on(args), "--work", way, str(result)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=args.seconds, check=False)
        except subprocess.TimeoutExpired:
            return {"failure": f"not done after {args.seconds:g} s"}
        if done.returncode or not result.is_file():
            return {"failure": why(done.stderr)}
        return json.loads(result.read_text(encoding="utf-8"))


def passed_on(args: argparse.Namespace) -> Iterator[str]:
    """The arguments that a process needs."""
    for name in ("device", "backend", "layers", "hidden", "vocabulary", "batch", "length", "rank", "memory_limit"):
        if (value := getattr(args, name)) is not None:
            yield from (f"--{name.replace('_', '-')}", str(value))
    yield from ("--warm-up", str(args.warm_up), "--steps", str(args.steps))
    for name in ("gradient_checkpointing", "cpu_offload"):
        if getattr(args, name):
            yield f"--{name.replace('_', '-')}"


def why(stderr: str) -> str:
    """The error of the process that failed first, in a line."""
    lines = [line.split("]: ", 1)[-1].strip() for line in stderr.splitlines()]
    errors = [line for line in lines if line.partition(":")[0].endswith(("Error", "Exception"))]
    own = [line for line in errors if "ChildFailedError" not in line]
    return (own or errors or lines or ["it ended without a word"])[0][:300]


def show(rows: list[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    checkpointing = ", activation checkpointing" * args.gradient_checkpointing
    table = Table(
        title=f"{args.batch} × {args.length} tokens a process, rank {args.rank}{checkpointing}", title_style=""
    )
    for name in COLUMNS:
        table.add_column(name, justify="left" if name == "way" else "right")
    for row in rows:
        if "failure" in row:
            table.add_row(row["label"], str(row["processes"]), row["failure"][:60])
            continue
        table.add_row(
            row["label"],
            str(row["processes"]),
            f"{1000 * row['seconds']:.1f}",
            ratio(row, "seconds_by_floor"),
            f"{row['tokens_per_second']:,.0f}",
            ratio(row, "speedup"),
            f"{row['bytes_sent'] / 1e6:,.2f}",
            f"{row['peak'] / 2**30:.2f}",
            ratio(row, "peak_by_floor"),
            f"{row['loss']:.4f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=140)).print(table)


def ratio(row: dict[str, Any], name: str) -> str:
    return f"{row[name]:.3f}" if name in row else ""


# In each process ------------------------------------------------------------------------------------------------------


def work(args: argparse.Namespace) -> None:
    """Measure one way in this process, one of several; the first one writes the figures."""
    import torch
    import torch.distributed as dist

    way, file = args.work
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group(args.backend)
    workload = replace(
        base_workload(args),
        device=args.device,
        dtype="bfloat16" if args.device == "cuda" else "float32",
        quantize="nf4" if "nf4" in way else None,
        sharded=WAYS[way][1] == "fsdp2",
    )
    if args.memory_limit is not None:
        total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
        torch.cuda.set_per_process_memory_fraction(args.memory_limit * 2**30 / total)
    sent = Sent(dist.get_world_size())
    with sent.counted():
        step = build(args, workload, *WAYS[way], sent)
        loss = float(step())
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        for _ in range(args.warm_up):  # in them graphs are captured, whose memory counts
            step()
        sent.bytes = 0
        seconds = [timed(step, args.device) for _ in range(args.steps)]
    device = torch.device(args.device)
    slowest = torch.tensor([*seconds, float(peak(args.device))], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    *times, most = slowest.tolist()
    median = statistics.median(times)
    if dist.get_rank() == 0:
        tokens = workload.tokens * dist.get_world_size() / median
        figures = {
            "seconds": median,
            "all_seconds": times,
            "tokens_per_second": tokens,
            "loss": loss,
            "peak": int(most),
        }
        Path(file).write_text(json.dumps(figures | {"bytes_sent": sent.bytes / args.steps}), encoding="utf-8")
    dist.barrier()
    dist.destroy_process_group()


def build(args: argparse.Namespace, workload: Any, variant: Variant, how: str, sent: Sent) -> Callable[[], Any]:
    """A whole training step; gives its loss."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from theodora.bench.build import prepare
    from theodora.bench.models import decoder_blocks, load_base
    from theodora.kernels.graph import GraphedStep

    ours, model = variant.library == "theodora", load_base(workload)
    if args.device == "cpu":  # Liger's kernels are Triton's
        variant = replace(variant, liger="none")
    # What makes it fast goes on last: onto what is sharded, not under it.
    prepare(model, workload, replace(variant, accelerate=False, compiled=False))
    if how == "fsdp2":
        shard(model, ours, args.cpu_offload)
    if variant.compiled:
        for block in decoder_blocks(model):  # the pass alone: what gathers weights runs before it
            block.forward = torch.compile(block.forward, dynamic=False)
    loss = own_forward(model, workload, variant)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4) if trained else None
    called: Any = model
    if how == "ddp" and variant.library == "peft" and sent.count > 1:
        called = DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if args.device == "cuda" else None
        )
        called.register_comm_hook(None, sent.hook)

    def pass_through(_: Any) -> Any:
        value = loss(called)
        value.backward()
        return value.detach()

    graphed = GraphedStep(pass_through, trained) if ours and how == "ddp" and args.device == "cuda" else None

    def step() -> Any:
        value = (graphed or pass_through)({})
        if graphed is not None and graphed.why_not is not None:
            raise RuntimeError(f"The step is no CUDA graph: {graphed.why_not}")
        if ours:
            average(trained, sent.count)
        if optimizer is not None:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return value

    return step


def shard(model: Any, ours: bool, cpu_offload: bool) -> None:
    import torch.distributed as dist
    from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

    from theodora.bench.models import decoder_blocks

    if ours:
        from theodora.train.processes import Processes
        from theodora.train.sharding import shard_model

        processes = Processes(count=dist.get_world_size(), index=dist.get_rank())
        shard_model(model, "fsdp2", processes, cpu_offload=cpu_offload)
        return
    policy = CPUOffloadPolicy() if cpu_offload else OffloadPolicy()
    for block in decoder_blocks(model):
        fully_shard(block, offload_policy=policy)
    fully_shard(model, offload_policy=policy)


def own_forward(model: Any, workload: Any, variant: Variant) -> Callable[[Any], Any]:
    """The mean loss of the batch. Where its cross entropy is fused with the head, that is inside the model's forward
    pass, so that whatever wraps the model or hooks into it (FSDP2 gathers the head there) sees one call."""
    import torch

    from theodora.bench.build import random_batch, shifted_labels
    from theodora.fastpath.accelerate import accelerate, recompute_less
    from theodora.fastpath.masks import whole_rows
    from theodora.kernels.cross_entropy import linear_cross_entropy

    ids_BT = random_batch(workload, model.config.get_text_config().vocab_size)
    if variant.library == "peft" and variant.liger == "none":
        return lambda called: called(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    if variant.accelerate:
        accelerate(model)
        if workload.gradient_checkpointing:
            recompute_less(model)
    decoder, head = model.base_model, model.get_output_embeddings()
    labels_N = shifted_labels(ids_BT).flatten()
    predicted = ids_BT.shape[0] * (ids_BT.shape[1] - 1)

    def ours(ids_BT: torch.Tensor) -> torch.Tensor:
        with whole_rows():
            hidden_NH = decoder(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        return linear_cross_entropy(hidden_NH, head.weight, labels_N, bias_V=head.bias).nats / predicted

    def ligers(ids_BT: torch.Tensor) -> torch.Tensor:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        hidden_NH = decoder(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        return LigerFusedLinearCrossEntropyLoss()(head.weight, hidden_NH, labels_N, head.bias)

    model.forward = ligers if variant.library == "peft" else ours
    return lambda called: called(ids_BT)


def average(trained: list[Any], count: int) -> None:
    if count > 1:
        from theodora.train.processes import Processes
        from theodora.train.sharding import average_gradients

        average_gradients(trained, Processes(count=count, index=int(os.environ["RANK"])))


def timed(step: Callable[[], Any], device: str) -> float:
    import torch

    def wait() -> None:
        if device == "cuda":
            torch.cuda.synchronize()

    wait()
    began = time.perf_counter()
    step()
    wait()
    return time.perf_counter() - began


def peak(device: str) -> int:
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Sent:
    """Counts what this process sends: at the collectives that FSDP2 and we call, and at DDP's buckets."""

    def __init__(self, count: int) -> None:
        self.count, self.bytes = count, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        import torch.distributed as dist

        share = (self.count - 1) / self.count
        # Which argument is the whole message, and how much of it goes out.
        collectives = {
            "all_reduce": (0, 2 * share),
            "all_gather_into_tensor": (0, share),
            "reduce_scatter_tensor": (1, share),
            "all_gather_single": (0, share),  # what FSDP2 calls from torch 2.13 on
            "reduce_scatter_single": (1, share),
        }
        before = {name: getattr(dist, name) for name in collectives if hasattr(dist, name)}

        def counting(name: str) -> Callable[..., Any]:
            at, part = collectives[name]

            def call(*tensors: Any, **options: Any) -> Any:
                keywords = (
                    ("tensor",) if name == "all_reduce" else ("output_tensor", "output"),
                    ("input_tensor", "input"),
                )
                whole = tensors[at] if at < len(tensors) else next(options[k] for k in keywords[at] if k in options)
                self.bytes += part * whole.numel() * whole.element_size()
                return before[name](*tensors, **options)

            return call

        try:
            for name in before:
                setattr(dist, name, counting(name))
            yield
        finally:
            for name, function in before.items():
                setattr(dist, name, function)

    def hook(self, _, bucket):  # torch refuses annotations here that are no types
        """DDP's own all-reduce, counted."""
        import torch.distributed as dist
        from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

        before, message = self.bytes, bucket.buffer()
        future = allreduce_hook(dist.group.WORLD, bucket)
        self.bytes = before + 2 * (self.count - 1) / self.count * message.numel() * message.element_size()
        return future


if __name__ == "__main__":
    main()
