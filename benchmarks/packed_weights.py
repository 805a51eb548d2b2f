"""The kernels that read packed weights (NF4, FP4, int8): how far from float64, and how long they take.

    python benchmarks/packed_weights.py                     # layers of Llama-3-8B's shapes on a GPU, a few minutes
    python benchmarks/packed_weights.py --only errors       # or: times
    python benchmarks/packed_weights.py --sweep             # tiles of the kernels, to choose by; nothing is written

Errors are those of the DoRA norm (the worst row, and one whose terms cancel) and of decoding, against float64 on the
weight as bitsandbytes dequantises it, with that of our kernels on the dequantised weight beside them.

A time is that of one call of several in one CUDA graph, over as many copies of a weight as do not fit in the L2 cache,
by the device's clock: the median of --rounds replays. × is against what people would do without: bitsandbytes'
dequantisation and the kernel for plain weights (norm), or the base's product alone (decoding). With --tiny a CPU does
the same on small weights, where products and norms are the library's, row by row.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from theodora import functional
from theodora.kernels import decode, weight_norm
from theodora.kernels.formats import Bits4, Bits8
from theodora.kernels.library_weight import LibraryWeight

RESULTS = Path("benchmarks/results/packed_weights.json")
SIZES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336)]
TINY = [(96, 128), (64, 256)]
TOKENS = [1, 2, 4, 8]
CACHE = 256e6
"""Bytes of weights between two uses of one: more than an L2 cache holds."""
BF16, SCALE = torch.bfloat16, 2.0
Call = Callable[[], Any]


def main() -> None:
    args = parse_args()
    import bitsandbytes  # registers the operators

    from theodora.bench.machine import describe_machine

    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    if args.device == "cuda":
        decode.prepare(torch.device(args.device, torch.cuda.current_device()))
    if args.sweep:
        for size in args.sizes:
            sweep(size, args)
        return
    errors = [row for size in args.sizes for row in errors_of(size, args)] if args.only != "times" else []
    times = [row for size in args.sizes for row in times_of(size, args)] if args.only != "errors" else []
    show(errors, times, args)
    chosen = {name: value for name, value in vars(args).items() if name != "output"}
    machine = describe_machine() | {"bitsandbytes": bitsandbytes.__version__}
    report = {"setting": chosen, "machine": machine, "errors": errors, "times": times}
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    print(f"written to {args.output}", file=sys.stderr)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", type=size_of, help="as 4096x14336; default: Llama-3-8B's")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    parser.add_argument("--tokens", type=int, nargs="+", default=TOKENS, help="of decoding; default: 1 2 4 8")
    parser.add_argument("--rounds", type=int, default=20, help="timed replays; default: 20")
    parser.add_argument("--only", choices=("errors", "times"), help="default: both")
    parser.add_argument("--sweep", action="store_true", help="time tiles of the kernels, best first")
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--tiny", action="store_true", help="small weights, to try the script out on a CPU")
    parser.add_argument("--output", type=Path, default=RESULTS, help=f"JSON file; default: {RESULTS}")
    args = parser.parse_args()
    args.sizes = args.sizes or (TINY if args.tiny else SIZES)
    if args.sweep and args.device != "cuda":
        parser.error("--sweep is of kernels on a GPU")
    return args


def size_of(word: str) -> tuple[int, int]:
    outputs, inputs = word.split("x")
    return int(outputs), int(inputs)


# Weights --------------------------------------------------------------------------------------------------------------


def four_bits(
    size: tuple[int, int],
    device: str,
    dtype: torch.dtype = BF16,
    table: str = "nf4",
    block: int = 64,
    nested: int = 256,
) -> LibraryWeight:
    from bitsandbytes.functional import quantize_4bit

    w = (0.02 * torch.randn(size, device=device)).to(dtype)
    packed, state = quantize_4bit(w, blocksize=block, compress_statistics=nested > 0, quant_type=table)
    outer: Any = state.state2
    rest = (outer.absmax, outer.code, state.offset) if nested else ()
    tensors: Any = (packed, state.absmax, *rest)
    return LibraryWeight(Bits4(size, dtype, table, block, nested, dtype), *tensors)


def eight_bits(size: tuple[int, int], device: str) -> LibraryWeight:
    w = 0.02 * torch.randn(size, device=device)
    scale = w.abs().amax(1)
    numbers = (w * (127 / scale[:, None])).round().to(torch.int8)
    return LibraryWeight(Bits8(size, BF16, threshold=0.0, int8_product=device == "cuda"), numbers, scale)


KINDS: dict[str, Callable[[tuple[int, int], str], LibraryWeight]] = {
    "nf4, double": four_bits,
    "nf4": lambda size, device: four_bits(size, device, nested=0),
    "fp4, double": lambda size, device: four_bits(size, device, table="fp4"),
    "nf4, blocks of 128": lambda size, device: four_bits(size, device, block=128, nested=0),
    "nf4, double, float16": lambda size, device: four_bits(size, device, torch.float16),
    "nf4, double, float32": lambda size, device: four_bits(size, device, torch.float32),
    "int8": eight_bits,
}


def factors(size: tuple[int, int], rank: int, device: str) -> tuple[Tensor, Tensor]:
    """A (R, I) and B (O, R), float32."""
    outputs, inputs = size
    return torch.randn(rank, inputs, device=device) / inputs**0.5, 0.02 * torch.randn(outputs, rank, device=device)


def decoded(x_TI: Tensor, weight: LibraryWeight, a_RI: Tensor, b_OR: Tensor, g_O: Tensor) -> Tensor:
    """By the kernel if it runs here, the packed one where there is one; else as the library multiplies, and on."""
    if decode.runs(weight):
        return decode.decode(x_TI, weight, a_RI, b_OR, g_O, None)
    return ((weight.product(x_TI) + (x_TI @ a_RI.T) @ b_OR.T) * g_O).to(x_TI.dtype)


# Errors ---------------------------------------------------------------------------------------------------------------


def errors_of(size: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind, make in KINDS.items():
        weight = make(size, args.device)
        w = weight.dense()
        row: dict[str, Any] = {"size": size, "kind": kind, **norm_errors(weight, w, args)}
        if w.dtype != torch.float32:
            row["decoding"] = {tokens: decoding_errors(weight, w, tokens, args) for tokens in args.tokens}
        rows.append(row)
        print(f"errors: {size[0]}x{size[1]} {kind}", file=sys.stderr)
    return rows


def norm_errors(weight: LibraryWeight, w: Tensor, args: argparse.Namespace) -> dict[str, float]:
    """The worst row's, ours and of the kernel for plain weights, and that of a row that the update nearly cancels."""
    a, b = factors(weight.shape, args.rank, args.device)
    squared = weight.norm_squared()
    exact = exact_norm(w, a, b)
    found = {"norm": worst(weight.dora_norm(a, b, SCALE, squared), exact)}
    found["norm_of_plain"] = worst(weight_norm.dora_norm(w, a, b, SCALE, squared, None), exact)
    a[0], b[7] = -0.4999 * w[7].float(), 0
    b[7, 0] = 1
    found["norm_of_cancelled_row"] = worst(weight.dora_norm(a, b, SCALE, squared), exact_norm(w, a, b))
    return found


def exact_norm(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor) -> Tensor:
    slices = functional.row_slices(*w_OI.shape)
    return torch.cat([(w_OI[at].double() + SCALE * b_OR[at].double() @ a_RI.double()).norm(dim=1) for at in slices])


def worst(found: Tensor, exact: Tensor) -> float:
    return float(((found.double() - exact).abs() / exact).max())


def decoding_errors(weight: LibraryWeight, w: Tensor, tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Ours, and that of the same formula on the dequantised weight."""
    a, b = (t.to(w.dtype) for t in factors(weight.shape, args.rank, args.device))
    g = torch.rand(weight.shape[0], device=args.device) + 0.5
    x = torch.randn(tokens, weight.shape[1], device=args.device).to(w.dtype)
    exact = (x.double() @ w.double().T + (x.double() @ a.double().T) @ b.double().T) * g
    plain = decode.decode_linear_reference(x, w, a, b, g, None)
    ours = decoded(x, weight, a, b, g)
    return {name: float((y.double() - exact).norm() / exact.norm()) for name, y in (("ours", ours), ("plain", plain))}


# Times ----------------------------------------------------------------------------------------------------------------


def times_of(size: tuple[int, int], args: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for kind in ("nf4, double", "int8"):
        weights = copies(KINDS[kind], size, args)
        row: dict[str, Any] = {"size": size, "kind": kind, "norm": norm_times(weights, args)}
        row["decoding"] = {tokens: decoding_times(weights, tokens, args) for tokens in args.tokens}
        rows.append(row)
        print(f"times: {size[0]}x{size[1]} {kind}", file=sys.stderr)
    return rows


def copies(
    make: Callable[[tuple[int, int], str], LibraryWeight], size: tuple[int, int], args: argparse.Namespace
) -> list[LibraryWeight]:
    first = make(size, args.device)
    held = sum(t.numel() * t.element_size() for t in first.tensors())
    more = 2 if args.tiny else min(48, math.ceil(CACHE / held))
    return [first, *(make(size, args.device) for _ in range(max(1, more - 1)))]


def norm_times(weights: Sequence[LibraryWeight], args: argparse.Namespace) -> dict[str, float]:
    """Microseconds: of the packed weight; dequantised, and then of the plain one; of dequantising alone."""
    a, b = factors(weights[0].shape, args.rank, args.device)
    squared = weights[0].norm_squared()

    def dequantised(weight: LibraryWeight) -> Tensor:
        return weight_norm.dora_norm(weight.dense(), a, b, SCALE, squared, None)

    ways: dict[str, Callable[[LibraryWeight], Any]] = {
        "ours": lambda weight: weight.dora_norm(a, b, SCALE, squared),
        "dequantised": dequantised,
        "dequantising_alone": lambda weight: weight.dense(),
    }
    return measure(weights, ways, args)


def decoding_times(weights: Sequence[LibraryWeight], tokens: int, args: argparse.Namespace) -> dict[str, float]:
    """Microseconds: with the adapter; the base's product alone; that, and the adapter in a launch of its own."""
    outputs, inputs = weights[0].shape
    a, b = (t.to(BF16) for t in factors((outputs, inputs), args.rank, args.device))
    g, x = torch.rand(outputs, device=args.device) + 0.5, torch.randn(tokens, inputs, device=args.device, dtype=BF16)
    ways: dict[str, Callable[[LibraryWeight], Any]] = {
        "ours": lambda weight: decoded(x, weight, a, b, g),
        "base": lambda weight: weight.product(x),
    }
    if decode.runs(weights[0]):
        ways["base_and_one_launch"] = lambda weight: decode.decode_onto(x, weight.product(x), a, b, g, None)
    return measure(weights, ways, args)


def measure(
    weights: Sequence[LibraryWeight], ways: dict[str, Callable[[LibraryWeight], Any]], args: argparse.Namespace
) -> dict[str, float]:
    return {
        name: timed([lambda weight=weight, way=way: way(weight) for weight in weights], args)
        for name, way in ways.items()
    }


def timed(calls: Sequence[Call], args: argparse.Namespace) -> float:
    """Microseconds of one of the calls, which run one after the other."""
    for call in calls:
        call()
    times = on_the_gpu(calls, args.rounds) if args.device == "cuda" else on_the_host(calls, args.rounds)
    return 1e6 * statistics.median(times) / len(calls)


def on_the_gpu(calls: Sequence[Call], rounds: int) -> list[float]:
    """Seconds of all calls, in one graph."""
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        for call in calls[:2]:
            call()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    times: list[float] = []
    for _ in range(rounds + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return times[3:]


def on_the_host(calls: Sequence[Call], rounds: int) -> list[float]:
    times: list[float] = []
    for _ in range(rounds):
        start = time.perf_counter()
        for call in calls:
            call()
        times.append(time.perf_counter() - start)
    return times


def sweep(size: tuple[int, int], args: argparse.Namespace) -> None:
    """Print the fastest tiles of the norm's kernel and of decoding."""
    from theodora.kernels.triton import decode as decoding
    from theodora.kernels.triton import packed as norms

    weights = copies(four_bits, size, args)
    all_packed: list[Any] = [weight.packed() for weight in weights]
    a, b = factors(size, args.rank, args.device)
    squared = weights[0].norm_squared()
    found: list[tuple[Any, ...]] = []
    block = norms.rank_block(args.rank)
    own, programs = dict(norms.TILES), norms.PROGRAMS
    for tile in ((128, 128, 8), (128, 64, 8), (128, 64, 4), (64, 128, 4), (64, 64, 4), (64, 128, 8), (64, 256, 8)):
        for norms.PROGRAMS in (1, 2, 3, 6):
            norms.TILES[block] = tile
            found.append((timed([lambda w=w: w.dora_norm(a, b, SCALE, squared) for w in weights], args), tile))
            found[-1] = (*found[-1], f"{norms.PROGRAMS} programs a processor")
    norms.TILES.update(own)
    norms.PROGRAMS = programs
    fastest(f"{size[0]}x{size[1]} norm", found)
    ah, bh, g = a.to(BF16), b.to(BF16), torch.rand(size[0], device=args.device) + 0.5
    for tokens in args.tokens:
        x, found = torch.randn(tokens, size[1], device=args.device, dtype=BF16), []
        for plan in plans(tokens, decoding.Plan):
            calls = [partial(decoding.decode, x, w, ah, bh, g, None, plan) for w in all_packed]
            try:
                found.append((timed(calls, args), asdict(plan)))
            except Exception as error:  # a tile too large
                print(f"left out: {plan} ({str(error)[:80]})", file=sys.stderr)
        fastest(f"{size[0]}x{size[1]} decoding {tokens}", found)


def plans(tokens: int, plan: Any) -> list[Any]:
    if tokens > 1:
        tiles = [(bo, bi) for bo in (16, 32, 64) for bi in (128, 256)]
        bt = max(16, 1 << (tokens - 1).bit_length())
        return [plan(bo, bt, bi, splits, warps) for bo, bi in tiles for splits in (1, 2, 4) for warps in (2, 4)]
    tiles = [(bo, bi) for bo in (2, 4, 8, 16) for bi in (256, 512, 1024, 2048)]
    return [plan(bo, 1, bi, splits, warps) for bo, bi in tiles for splits in (1, 2) for warps in (4, 8)]


def fastest(what: str, found: Sequence[tuple[Any, ...]]) -> None:
    for us, *how in sorted(found, key=lambda one: one[0])[:5]:
        print(f"{what}: {us:.1f} us {how}")


# The report -----------------------------------------------------------------------------------------------------------


def show(errors: Sequence[dict[str, Any]], times: Sequence[dict[str, Any]], args: argparse.Namespace) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console = console if console.is_terminal else Console(width=140)  # a pipe has no width of its own
    if errors:
        table = Table(title=f"Errors, rank {args.rank}: ours (that of the same on the dequantised weight)")
        for name in ("", "norm, worst row", "a row that cancels", *(f"decoding {tokens}" for tokens in args.tokens)):
            table.add_column(name)
        for row in errors:
            cells = [f"{row['norm']:.1e} ({row['norm_of_plain']:.1e})", f"{row['norm_of_cancelled_row']:.1e}"]
            cells += [f"{of['ours']:.1e} ({of['plain']:.1e})" for of in row.get("decoding", {}).values()]
            table.add_row(name_of(row), *cells)
        console.print(table)
    if times:
        table = Table(title=f"Microseconds, rank {args.rank} (× dequantised first; × the base's product)")
        for name in ("", "norm", *(f"decoding {tokens}" for tokens in args.tokens)):
            table.add_column(name)
        for row in times:
            cells = [ratio(row["norm"], "dequantised"), *(ratio(of, "base") for of in row["decoding"].values())]
            table.add_row(name_of(row), *cells)
        console.print(table)


def name_of(row: dict[str, Any]) -> str:
    return f"{row['size'][0]}×{row['size'][1]} {row['kind']}"


def ratio(of: dict[str, float], other: str) -> str:
    return f"{of['ours']:.1f} ({of['ours'] / of[other]:.2f})"


if __name__ == "__main__":
    main()
