"""How a training step grows with the number of GPUs: DDP and FSDP2, with our adapter and with PEFT's.

    python benchmarks/scaling.py                                # Llama-3-8B's shape, 8 of 32 layers, on 1, 2, 4 … GPUs
    python benchmarks/scaling.py --processes 2 8 --layers 32 --gradient-checkpointing --ways dora-fsdp2 peft-dora-fsdp2
    python benchmarks/scaling.py --quantize nf4 --layers 32          # DDP alone: of ours, and PEFT's
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

DDP: PEFT's model in torch's DistributedDataParallel; ours without a wrapper, its gradients averaged in one message, as
`theodora train` does. FSDP2: torch's `fully_shard` on each decoder block and the whole, PEFT's adapter sharded with it
(in the base's dtype, which a group has to share); ours by `theodora.train.sharding`, whose adapter stays whole. The
model is built whole on its device before it is sharded, so it has to fit there. A way that fails has a row that says
so.
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
from theodora.files.trained_on import KINDS

RESULTS = Path("benchmarks/results/scaling.json")
WAYS: dict[str, tuple[Variant, str]] = {
    "lora-ddp": (Variant(label="Theodora LoRA, DDP", library="theodora", method="lora", accelerate=True), "ddp"),
    "dora-ddp": (Variant(label="Theodora DoRA, DDP", library="theodora", method="dora", accelerate=True), "ddp"),
    "peft-lora-ddp": (Variant(label="PEFT LoRA, DDP", library="peft", method="lora"), "ddp"),
    "peft-dora-ddp": (Variant(label="PEFT DoRA, DDP", library="peft", method="dora"), "ddp"),
    "lora-fsdp2": (Variant(label="Theodora LoRA, FSDP2", library="theodora", method="lora", accelerate=True), "fsdp2"),
    "dora-fsdp2": (Variant(label="Theodora DoRA, FSDP2", library="theodora", method="dora", accelerate=True), "fsdp2"),
    "peft-lora-fsdp2": (Variant(label="PEFT LoRA, FSDP2", library="peft", method="lora", bf16_adapter=True), "fsdp2"),
    "peft-dora-fsdp2": (Variant(label="PEFT DoRA, FSDP2", library="peft", method="dora", bf16_adapter=True), "fsdp2"),
}
COLUMNS = ("way", "N", "ms", "tokens/s", "× 1", "sent MB", "peak GiB", "loss")


def main() -> None:
    args = parse_args()
    if args.work is not None:
        work(args)
        return
    rows: list[dict[str, Any]] = []
    for way in args.ways:
        for count in args.processes:
            say(f"{way} in {count} process{'es' * (count > 1)}")
            rows.append({"way": way, "label": WAYS[way][0].label, "processes": count} | launch(args, way, count))
    for row in rows:
        one = next((r for r in rows if r["way"] == row["way"] and r["processes"] == 1), {})
        if "tokens_per_second" in row and "tokens_per_second" in one:
            row["speedup"] = row["tokens_per_second"] / one["tokens_per_second"]
    show(rows, args)
    settings = {name: value for name, value in vars(args).items() if name not in ("work", "output", "commit")}
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
    parser.add_argument("--quantize", choices=KINDS, help="store the frozen linear layers so; default: in bf16")
    parser.add_argument("--cpu-offload", action="store_true", help="FSDP2 keeps the shards in the host's memory")
    parser.add_argument("--warm-up", type=int, default=3, help="untimed steps; default: 3")
    parser.add_argument("--steps", type=int, default=10, help="timed steps; default: 10")
    parser.add_argument("--seconds", type=float, default=900, help="for one row, until it is given up; default: 900")
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
    if args.ways is None:  # a sharded base is not quantised in every library
        args.ways = [way for way in WAYS if args.quantize is None or way.endswith("ddp")]
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
    for name in ("device", "backend", "layers", "hidden", "vocabulary", "batch", "length", "rank", "quantize"):
        if (value := getattr(args, name)) is not None:
            yield from (f"--{name}", str(value))
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
            f"{row['tokens_per_second']:,.0f}",
            f"{row['speedup']:.2f}" if "speedup" in row else "",
            f"{row['bytes_sent'] / 1e6:,.2f}",
            f"{row['peak'] / 2**30:.2f}",
            f"{row['loss']:.4f}",
        )
    console = Console()
    (console if console.is_terminal else Console(width=120)).print(table)


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
        base_workload(args), device=args.device, dtype="bfloat16" if args.device == "cuda" else "float32"
    )
    sent = Sent(dist.get_world_size())
    with sent.counted():
        step = build(args, workload, *WAYS[way], sent)
        loss = float(step())
        for _ in range(args.warm_up):
            step()
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
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
    from theodora.bench.models import load_base

    ours, model = variant.library == "theodora", load_base(workload)
    # What makes it fast goes on last: onto what is sharded, not under it.
    prepare(model, workload, replace(variant, accelerate=False))
    if how == "fsdp2":
        shard(model, ours, args.cpu_offload)
    loss = own_forward(model, workload, ours)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    called: Any = model
    if how == "ddp" and not ours and sent.count > 1:
        called = DistributedDataParallel(
            model, device_ids=[torch.cuda.current_device()] if args.device == "cuda" else None
        )
        called.register_comm_hook(None, sent.hook)

    def step() -> Any:
        value = loss(called)
        value.backward()
        if ours:
            average(trained, sent.count)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value.detach()

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


def own_forward(model: Any, workload: Any, ours: bool) -> Callable[[Any], Any]:
    """The mean loss of the batch. Ours has the fused cross entropy inside the model's forward pass, so that whatever
    wraps the model or hooks into it (FSDP2 gathers the head there) sees one call."""
    import torch

    from theodora.bench.build import random_batch, shifted_labels
    from theodora.fastpath.accelerate import accelerate, recompute_less
    from theodora.fastpath.masks import whole_rows
    from theodora.kernels.cross_entropy import linear_cross_entropy

    ids_BT = random_batch(workload, model.config.get_text_config().vocab_size)
    if not ours:
        return lambda called: called(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss
    accelerate(model)
    if workload.gradient_checkpointing:
        recompute_less(model)
    decoder, head = model.base_model, model.get_output_embeddings()
    labels_N = shifted_labels(ids_BT).flatten()
    predicted = ids_BT.shape[0] * (ids_BT.shape[1] - 1)

    def forward(ids_BT: torch.Tensor) -> torch.Tensor:
        with whole_rows():
            hidden_NH = decoder(input_ids=ids_BT, use_cache=False)[0].flatten(0, 1)
        return linear_cross_entropy(hidden_NH, head.weight, labels_N, bias_V=head.bias).nats / predicted

    model.forward = forward
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
