"""`theodora.kernels.decode` in Triton: one launch for each linear layer, which reads W once, packed or not.

The first programs of the grid multiply x with rows of A, all others with rows of W. Both split the I features where
there are too few rows to fill the GPU: each program writes its partial sums, and the one that arrives last adds them
up, in a fixed order, so that the result is the same in every run. Programs of W then wait until xa is whole (it has
long been, except for small W), add xa (sB)ᵀ, scale, and write y.

Waiting inside a grid is safe because programs start in the order of their numbers, as CUB's scans and stream-K products
rely on, too: whoever waits, waits for programs that have started and wait for nobody.

The counters behind this are zero between launches. Each weight has its own on each stream, from a pool that must be
there before a CUDA graph is captured (`prepare`). Without one, xa comes from a product of its own and nothing is split.

Shapes as in `theodora.functional`; within the kernel tiles lie as (rows, tokens).
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.packed import LEAST_BLOCK, Packed
from theodora.kernels.triton.common import precision, processors, product
from theodora.kernels.triton.lookup import aligned, chunk_of, instructions, partial_of_words
from theodora.kernels.triton.packed import EXACT, UNPACKED, argument, constants, dequantized, load_numbers

_A_ROWS = 16  # rows of A in one program, and ranks added in one step; `tl.dot` needs 16
_A_SPLITS = 8  # programs that share the features of a block of A: xa should be whole before the first block of W is
_A_TILE = 4096  # numbers of A that a program holds: fewer than of W, so that A takes no more registers
_POOL = 1 << 18  # counters of one device: a decoder layer of 8B shape uses some 600 on each stream


@triton.jit
def _partial(x, rows, o, count, start, stop, T, I, row, col,
             PRECISION: tl.constexpr, STAGES: tl.constexpr,
             BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """rows · xᵀ over features start..stop, (BO, BT) float32."""
    t = tl.arange(0, BT)
    row_start = rows + o.to(tl.int64)[:, None] * row
    x_start = x + t[:, None] * I
    sums = tl.zeros([BO, BI if BT == 1 else BT], dtype=tl.float32)
    for first in tl.range(start, stop, BI, num_stages=STAGES):
        i = first + tl.arange(0, BI)
        inside = i < stop
        w_tile = tl.load(row_start + i[None, :] * col, mask=(o[:, None] < count) & inside[None, :], other=0.0)
        if BT == 1:
            x_tile = tl.load(x + i, mask=inside, other=0.0)
            sums += w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
        else:
            x_tile = tl.load(x_start + i[None, :], mask=(t[:, None] < T) & inside[None, :], other=0.0)
            sums += product(w_tile, tl.trans(x_tile), PRECISION)
    if BT == 1:
        sums = tl.sum(sums, 1)[:, None]
    return sums


@triton.jit
def _partial_packed(x, w, o, O, start, stop, T, I,
                    BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
                    PRECISION: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """`_partial` of a packed weight (see `packed.py`)."""
    t = tl.arange(0, BT)
    sums = tl.zeros([BO, BI if BT == 1 else BT], dtype=tl.float32)
    q, scale = load_numbers(w, o, start, O, I, BITS, BLOCK, NESTED, BI)
    for first in tl.range(start, stop, BI, num_stages=1):
        i = first + tl.arange(0, BI)
        inside = i < stop
        if BT == 1:
            x_tile = tl.load(x + i, mask=inside, other=0.0)
        else:
            x_tile = tl.load(x + t[:, None] * I + i[None, :], mask=(t[:, None] < T) & inside[None, :], other=0.0)
        rows = tl.where(first + BI < stop, O, 0)
        next_q, next_scale = load_numbers(w, o, first + BI, rows, I, BITS, BLOCK, NESTED, BI)
        w_tile = dequantized(w, q, scale, BITS, DTYPE, BO, BI)
        if BT == 1:
            sums += w_tile.to(tl.float32) * x_tile.to(tl.float32)[None, :]
        else:
            sums += product(w_tile, tl.trans(x_tile), PRECISION)
        q, scale = next_q, next_scale
    if BT == 1:
        sums = tl.sum(sums, 1)[:, None]
    return sums


@triton.jit
def _gather(sums, parts, counter, split, splits, BT: tl.constexpr, BO: tl.constexpr):
    """(the sum of all splits' sums, True) for the program that arrives last, (its own, False) for the others."""
    place = tl.arange(0, BO)[:, None] * BT + tl.arange(0, BT)[None, :]
    tl.store(parts + split * BO * BT + place, sums)
    tl.debug_barrier()  # all threads' stores come before the one thread's arrival
    last = tl.atomic_add(counter, 1, sem="acq_rel") == splits - 1
    if last:
        tl.debug_barrier()
        sums = tl.zeros([BO, BT], dtype=tl.float32)
        for s in tl.range(0, splits, loop_unroll_factor=4):  # loads ahead of the sums
            sums += tl.load(parts + s * BO * BT + place, cache_modifier=".cg")
        tl.atomic_xchg(counter, 0)
    return sums, last


@triton.jit
def _low_rank(x, a, xa, parts, counters, ready, block, split, splits, features, T, I, R, xa_row, xa_col,
              PRECISION: tl.constexpr, STAGES: tl.constexpr,
              BT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """A program of A: BR ranks of xa, (R, T) float32."""
    r, t = block * BR + tl.arange(0, BR), tl.arange(0, BT)
    start = split * features
    sums = _partial(x, a, r, R, start, tl.minimum(start + features, I), T, I, I, 1,
                    PRECISION, STAGES, BT, BR, BI)  # fmt: skip
    sums, last = _gather(sums, parts + block * splits * (BR * BT), counters + block, split, splits, BT, BR)
    if last:
        tl.store(xa + r[:, None] * xa_row + t[None, :] * xa_col, sums)
        tl.debug_barrier()
        tl.atomic_add(ready, 1, sem="release")


@triton.jit
def _add_low_rank(sums, b, xa, o, T, O, R, xa_row, xa_col,
                  PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """sums + B xaᵀ, (BO, BT) float32."""
    t = tl.arange(0, BT)
    for first in range(0, R, BR):
        r = first + tl.arange(0, BR)
        b_tile = tl.load(b + o.to(tl.int64)[:, None] * R + r[None, :], mask=(o[:, None] < O) & (r[None, :] < R),
                         other=0.0)  # fmt: skip
        xa_tile = tl.load(xa + r[:, None] * xa_row + t[None, :] * xa_col, mask=(r[:, None] < R) & (t[None, :] < T),
                          other=0.0, cache_modifier=".cg")  # fmt: skip
        if BT == 1:
            sums += tl.sum(b_tile.to(tl.float32) * tl.trans(xa_tile).to(tl.float32), 1)[:, None]
        else:
            sums += product(b_tile, xa_tile.to(b_tile.dtype), PRECISION)
    return sums


@triton.jit(do_not_specialize=["T"])
def _decode(x, w, a, b, g, bias, xa, parts, sync, y, T, O, I, R, w_row, w_col, xa_row, xa_col, sync_start,
            a_blocks, a_splits, a_features, w_blocks, w_splits, w_features,
            OWN_XA: tl.constexpr, SPLIT: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
            PRECISION: tl.constexpr, STAGES: tl.constexpr,
            BT: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, AI: tl.constexpr,
            GIVEN: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
            DTYPE: tl.constexpr, CHUNK: tl.constexpr, TABLE: tl.constexpr, PRODUCT: tl.constexpr,
            ROWS: tl.constexpr):  # fmt: skip
    """With GIVEN, w is z = x Wᵀ, (T, O); with BITS a tuple, see `packed.py`, and with CHUNK, see `lookup.py`."""
    ready, done, counters = sync + sync_start, sync + sync_start + 1, sync + sync_start + 2
    a_programs = a_blocks * a_splits
    program = tl.program_id(0) - a_programs
    if OWN_XA:  # noqa: SIM102 (alone, so that Triton can leave the branch out)
        if program < 0:
            block, split = tl.program_id(0) // a_splits, tl.program_id(0) % a_splits
            _low_rank(x, a, xa, parts, counters, ready, block, split, a_splits, a_features, T, I, R, xa_row, xa_col,
                      PRECISION, STAGES, BT, AI, BR)  # fmt: skip
            return
    block, split = program // w_splits, program % w_splits
    o, t = block * BO + tl.arange(0, BO), tl.arange(0, BT)
    start = split * w_features
    stop = tl.minimum(start + w_features, I)
    if GIVEN:
        at = w + t[None, :].to(tl.int64) * O + o[:, None]
        sums = tl.load(at, mask=(o[:, None] < O) & (t[None, :] < T), other=0.0).to(tl.float32)
    elif CHUNK > 0:
        sums = partial_of_words(x, w, block * BO, O, start, stop, I, BLOCK, NESTED, DTYPE, CHUNK, TABLE, PRODUCT,
                                STAGES, ROWS, BO, BI)  # fmt: skip
    elif BITS > 0:
        sums = _partial_packed(x, w, o, O, start, stop, T, I, BITS, BLOCK, NESTED, DTYPE, PRECISION, BT, BO, BI)
    else:
        sums = _partial(x, w, o, O, start, stop, T, I, w_row, w_col, PRECISION, STAGES, BT, BO, BI)
    if SPLIT:
        w_parts = parts + a_programs * (BR * BT) + block.to(tl.int64) * w_splits * (BO * BT)
        sums, last = _gather(sums, w_parts, counters + a_blocks + block, split, w_splits, BT, BO)
        if not last:
            return
    if OWN_XA:
        whole = tl.atomic_add(ready, 0, sem="acquire")
        while whole < a_blocks:
            whole = tl.atomic_add(ready, 0, sem="acquire")
        tl.debug_barrier()
    sums = _add_low_rank(sums, b, xa, o, T, O, R, xa_row, xa_col, PRECISION, BT, BR)
    if SCALED:
        sums *= tl.load(g + o, mask=o < O, other=0.0)[:, None]
    if BIASED:
        sums += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[:, None]
    place = t[None, :].to(tl.int64) * O + o[:, None]
    tl.store(y + place, sums.to(y.dtype.element_ty), mask=(o[:, None] < O) & (t[None, :] < T))
    if OWN_XA:  # noqa: SIM102
        if tl.atomic_add(done, 1, sem="acq_rel") == w_blocks - 1:
            tl.atomic_xchg(ready, 0)
            tl.atomic_xchg(done, 0)


@dataclass(frozen=True)
class Plan:
    """How the work of one call is cut up: tiles of BO rows, BT tokens, BI features."""

    bo: int
    bt: int
    bi: int
    splits: int = 1
    """Programs that share the features of a block of W."""
    warps: int = 4
    stages: int = 1
    rows: int = 4
    """Of a weight of 4 bits: rows that are read at once."""


@lru_cache(maxsize=256)
def plan(tokens: int, outputs: int, inputs: int, processors: int) -> Plan:
    """Tiles and splits such that one or two programs fall on each of the GPU's `processors`; measured on an H100.

    One token: no tensor cores, and rows are cut so that each program has 8192 weights in flight. More: 64 rows, so that
    x, which each program reads anew, weighs little beside W.
    """
    if tokens == 1:
        bo = 16 if outputs >= 16 * processors else 8 if outputs >= 8 * processors else 4
        return Plan(bo, 1, min(8192 // bo, max(32, triton.next_power_of_2(inputs))))
    bi = min(128, max(32, triton.next_power_of_2(inputs)))
    bt = max(16, triton.next_power_of_2(tokens))
    splits = processors // triton.cdiv(outputs, 64)
    splits = max(1, min(splits, 4, inputs // (2 * bi)))
    return Plan(64, bt, bi, splits, stages=3 if bt == 64 else 4)


@lru_cache(maxsize=256)
def plan_packed(tokens: int, outputs: int, inputs: int, processors: int) -> Plan:
    """`plan` of a packed weight, whose programs must be more to have as many bytes in flight."""
    if tokens == 1:
        bo = 8 if outputs >= 16 * processors else 4
        return Plan(bo, 1, min(8192 // bo, max(LEAST_BLOCK, triton.next_power_of_2(inputs))))
    return replace(plan(tokens, outputs, inputs, processors), stages=1)


@lru_cache(maxsize=256)
def plan_words(outputs: int, inputs: int, processors: int) -> Plan:
    """`plan` of one token times a weight of 4 bits (see `lookup.py`): 64 features for each thread; for an H200."""
    bo, rows = (8, 4) if outputs >= 16 * processors else (4, 2)
    return Plan(bo, 1, min(4096, max(64, triton.next_power_of_2(inputs))), warps=2, rows=rows)


def _plan_given(tokens: int, outputs: int, inputs: int, processors: int) -> Plan:
    """Where xa and B are all there is to read."""
    return Plan(64, 1 if tokens == 1 else max(16, triton.next_power_of_2(tokens)), 256)


def decode(
    x: Tensor,
    w: Tensor | Packed,
    a: Tensor,
    b: Tensor,
    g: Tensor | None,
    bias: Tensor | None,
    cut: Plan | None = None,
    *,
    given: bool = False,
) -> Tensor:
    """`theodora.kernels.decode.decode_linear`, cut up as the plan says (by default by `plan`).

    `given`: w is z = x Wᵀ, (T, O), that another kernel has made.
    """
    if x.is_cuda and x.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(x.device):
            return decode(x, w, a, b, g, bias, cut, given=given)
    x, a, b = x.contiguous(), a.contiguous(), b.contiguous()
    (tokens, inputs), (outputs, rank) = x.shape, b.shape
    chunk = chunk_of(w) if isinstance(w, Packed) and tokens == 1 else 0
    if cut is None and chunk:
        cut = plan_words(outputs, inputs, processors(x.device))
    elif cut is None:
        how = _plan_given if given else plan_packed if isinstance(w, Packed) else plan
        cut = how(tokens, outputs, inputs, processors(x.device))
    bt, blocks = cut.bt, triton.cdiv(outputs, cut.bo)
    warps = min(cut.warps, 4)  # four of them hold a tile of A
    ai = min(cut.bi, _A_TILE // _A_ROWS * warps // 4)
    a_blocks, a_features = triton.cdiv(rank, _A_ROWS), _share(inputs, _A_SPLITS * 4 // warps, ai)
    a_splits = triton.cdiv(inputs, a_features)
    (row, column), form, owner, w_argument, ptx = (0, 0), UNPACKED, b, w, ("", "")
    if isinstance(w, Packed):
        form, owner, w_argument = constants(w), w.tensors[0], argument(w)
        if chunk:
            x, ptx = aligned(x), instructions(w)
    elif not given:
        (row, column), owner = w.stride(), w
    sync_start = _counters(x.device, owner, 2 + a_blocks + (blocks if cut.splits > 1 else 0))
    own_xa = sync_start is not None
    y = x.new_empty(tokens, outputs)
    if own_xa:
        sync, splits = _pools[x.device].counters, cut.splits
        xa_size, a_size = a_blocks * _A_ROWS * bt, a_blocks * a_splits * _A_ROWS * bt
        w_size = blocks * splits * cut.bo * bt if splits > 1 else 0
        workspace = x.new_empty(xa_size + a_size + w_size, dtype=torch.float32)
        xa, parts, xa_row, xa_col = workspace, workspace[xa_size:], bt, 1
    else:
        a_blocks, splits, sync, sync_start = 0, 1, y, 0
        xa = parts = x @ a.T
        xa_row, xa_col = 1, rank
    w_features = _share(inputs, splits, cut.bi)
    splits = triton.cdiv(inputs, w_features)
    _decode[(a_blocks * a_splits + blocks * splits,)](
        x, w_argument, a, b, y if g is None else g, y if bias is None else bias, xa, parts, sync, y,
        tokens, outputs, inputs, rank, row, column, xa_row, xa_col, sync_start,
        a_blocks, a_splits, a_features, blocks, splits, w_features,
        own_xa, splits > 1, g is not None, bias is not None,
        precision(x.dtype), cut.stages, bt, cut.bo, cut.bi, _A_ROWS, ai,
        GIVEN=given, **form, CHUNK=chunk, TABLE=ptx[0], PRODUCT=ptx[1], ROWS=min(cut.rows, cut.bo),
        num_warps=cut.warps, num_stages=cut.stages, **(EXACT if chunk else {}),
    )  # fmt: skip
    return y


def _share(features: int, splits: int, tile: int) -> int:
    """Features of one split: whole tiles, and at least one."""
    return triton.cdiv(triton.cdiv(features, splits), tile) * tile


class _Pool:
    """Counters of one device, all zero between launches."""

    def __init__(self, device: torch.device) -> None:
        self.counters = torch.zeros(_POOL, dtype=torch.int32, device=device)
        self.starts: dict[tuple[int, int, int], int] = {}
        self.used = 0
        self.lock = threading.Lock()

    def start(self, key: tuple[int, int, int]) -> int | None:
        """Where the counters of this stream, weight and count begin; None if the pool is used up."""
        with self.lock:
            if key not in self.starts:
                size = triton.cdiv(key[2], 16) * 16  # a start that is divisible by 16 compiles once
                if self.used + size > _POOL:
                    return None
                self.starts[key], self.used = self.used, self.used + size
            return self.starts[key]


_pools: dict[torch.device, _Pool] = {}


def prepare(device: torch.device) -> None:
    """Make the device's counters, unless they are there. Not within a CUDA graph, whose memory they would take.

    (And not on AMD's GPUs, where the order in which programs start was not looked into.)
    """
    within_graph = device.type == "cuda" and torch.cuda.is_current_stream_capturing()
    if device not in _pools and not within_graph and torch.version.hip is None:
        _pools[device] = _Pool(device)


def _counters(device: torch.device, w: Tensor, count: int) -> int | None:
    if device not in _pools:
        return None
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    return _pools[device].start((stream, w.data_ptr(), count))
