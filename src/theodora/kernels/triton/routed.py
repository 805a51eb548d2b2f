"""`theodora.kernels.routed` in Triton: two launches for up to three layers of one x, whatever the mix of adapters.

A tile is up to 16 tokens of one slot. The first launch computes xa = x Aᵀ of each tile and layer, the features split
among programs where there are too few tiles to fill the GPU; the second adds up the parts, multiplies with s·B, scales,
and writes y over z. Tiles of the base model return at once. Grids depend on the number of tokens and slots alone, and
who works on what stands in a tensor on the GPU, so that a CUDA graph of the launches can be replayed for any batch.

Shapes as in `theodora.kernels.routed`; P parts. What belongs to one layer has its number: up to three share a launch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.parts import MOST_LAYERS, TILE, SlottedWeights
from theodora.kernels.triton.common import precision, processors, product, row_contiguous

_MOST_RANKS = 64  # that a program holds at once


@triton.jit
def _down_one(x, a, parts, order, slot, start, stop, block, T, I, R, steps, x_row,
              PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """parts[p] = x Aᵀ of one layer over a share of the features, (P, T, R), the tokens in the order of their slots."""
    t, r = start + tl.arange(0, BT), block * BR + tl.arange(0, BR)
    token = tl.load(order + t, mask=t < stop, other=0)
    first = tl.program_id(1) * steps * BI  # by steps, so that the compiler sees that 16 bytes lie together
    x_start = x + token.to(tl.int64)[:, None] * x_row
    a_start = a + (slot.to(tl.int64) * R + r[:, None]) * I
    sums = tl.zeros([BT, BR], dtype=tl.float32)
    for step in range(steps):
        i = first + step * BI + tl.arange(0, BI)
        inside = i[None, :] < I
        x_tile = tl.load(x_start + i[None, :], mask=(t[:, None] < stop) & inside, other=0.0)
        a_tile = tl.load(a_start + i[None, :], mask=(r[:, None] < R) & inside, other=0.0)
        sums += product(x_tile, tl.trans(a_tile), PRECISION)
    place = (tl.program_id(1) * T + t[:, None]).to(tl.int64) * R + r[None, :]
    tl.store(parts + place, sums, mask=(t[:, None] < stop) & (r[None, :] < R))


@triton.jit(do_not_specialize=["T", "P", "steps"])
def _down(x, a0, a1, a2, parts, order, tiles, T, P, I, R0, R1, R2, steps, x_row,
          COUNT: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr,
          BI: tl.constexpr):  # fmt: skip
    """xa of every layer, (P, T, R) float32, one layer after the other."""
    tile = tiles + tl.program_id(0) * 3
    slot, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (slot == 0) | (start >= stop):
        return
    block = tl.program_id(2)
    blocks0, blocks1 = tl.cdiv(R0, BR), tl.cdiv(R1, BR)
    if block < blocks0:
        _down_one(x, a0, parts, order, slot, start, stop, block, T, I, R0, steps, x_row, PRECISION, BT, BR, BI)
    if COUNT > 1:  # noqa: SIM102 - it is known when compiling, and what is inside is not
        if (block >= blocks0) & (block < blocks0 + blocks1):
            _down_one(x, a1, parts + (P * T).to(tl.int64) * R0, order, slot, start, stop, block - blocks0, T, I, R1,
                      steps, x_row, PRECISION, BT, BR, BI)  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if block >= blocks0 + blocks1:
            _down_one(x, a2, parts + (P * T).to(tl.int64) * (R0 + R1), order, slot, start, stop,
                      block - blocks0 - blocks1, T, I, R2, steps, x_row, PRECISION, BT, BR, BI)  # fmt: skip


@triton.jit
def _up_one(z, parts, b, g, bias, order, slot, start, stop, block, T, O, R, P,
            SCALED: tl.constexpr, BIASED: tl.constexpr,
            PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """z = g ⊙ (z + xa (sB)) + bias of one layer, in place."""
    work = slot != 0
    if BIASED:
        work = start < stop
    if work:
        t, o = start + tl.arange(0, BT), block * BO + tl.arange(0, BO)
        token = tl.load(order + t, mask=t < stop, other=0)
        inside = (t[:, None] < stop) & (o[None, :] < O)
        place = z + token.to(tl.int64)[:, None] * O + o[None, :]
        sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
        if slot != 0:
            for first in range(0, R, BR):
                r = first + tl.arange(0, BR)
                b_start = b + (slot.to(tl.int64) * R + r[:, None]) * O + o[None, :]
                b_tile = tl.load(b_start, mask=(r[:, None] < R) & (o[None, :] < O), other=0.0)
                xa = tl.zeros([BT, BR], dtype=tl.float32)
                for p in range(P):
                    at = parts + (p * T + t[:, None]).to(tl.int64) * R + r[None, :]
                    xa += tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
                sums += product(xa.to(b_tile.dtype), b_tile, PRECISION)
            if SCALED:
                sums *= tl.load(g + slot.to(tl.int64) * O + o, mask=o < O, other=0.0)[None, :]
        if BIASED:
            sums += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
        tl.store(place, sums.to(z.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["T", "P"])
def _up(z0, z1, z2, parts, b0, b1, b2, g0, g1, g2, bias0, bias1, bias2, order, tiles,
        T, P, O0, O1, O2, R0, R1, R2, COUNT: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
        PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """y of every layer; SCALED and BIASED have a bit for each."""
    tile = tiles + tl.program_id(0) * 3
    slot, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    block = tl.program_id(1)
    blocks0, blocks1 = tl.cdiv(O0, BO), tl.cdiv(O1, BO)
    if block < blocks0:
        _up_one(z0, parts, b0, g0, bias0, order, slot, start, stop, block, T, O0, R0, P,
                (SCALED & 1) != 0, (BIASED & 1) != 0, PRECISION, BT, BR, BO)  # fmt: skip
    if COUNT > 1:  # noqa: SIM102 - it is known when compiling, and what is inside is not
        if (block >= blocks0) & (block < blocks0 + blocks1):
            _up_one(z1, parts + (P * T).to(tl.int64) * R0, b1, g1, bias1, order, slot, start, stop, block - blocks0,
                    T, O1, R1, P, (SCALED & 2) != 0, (BIASED & 2) != 0, PRECISION, BT, BR, BO)  # fmt: skip
    if COUNT > 2:  # noqa: SIM102
        if block >= blocks0 + blocks1:
            _up_one(z2, parts + (P * T).to(tl.int64) * (R0 + R1), b2, g2, bias2, order, slot, start, stop,
                    block - blocks0 - blocks1, T, O2, R2, P, (SCALED & 4) != 0, (BIASED & 4) != 0,
                    PRECISION, BT, BR, BO)  # fmt: skip


def routed(
    zs: Sequence[Tensor], x: Tensor, weights: Sequence[SlottedWeights], order: Tensor, tiles: Tensor
) -> list[Tensor]:
    """y of each layer, written over its z (contiguous)."""
    (tokens, inputs), count = x.shape, tiles.shape[0]
    x = row_contiguous(x)
    zs = [z.contiguous() for z in zs]
    ranks, outputs = [w.a_SRI.shape[1] for w in weights], [w.b_SRO.shape[2] for w in weights]
    br = min(_MOST_RANKS, max(16, triton.next_power_of_2(max(ranks))))
    bi, bo = _blocks(x.dtype, br)
    blocks = sum(triton.cdiv(rank, br) for rank in ranks)
    splits = splits_of(count * blocks, inputs, bi, processors(x.device))
    steps = triton.cdiv(triton.cdiv(inputs, splits), bi)
    splits = triton.cdiv(inputs, steps * bi)
    parts = torch.empty(splits * tokens * sum(ranks), dtype=torch.float32, device=x.device)
    how, layers, spare = precision(x.dtype), len(weights), range(MOST_LAYERS - len(weights))
    # The first layer stands in for those that there are not.
    every = [*weights, *(weights[0] for _ in spare)]
    z, r, o = [*zs, *(zs[0] for _ in spare)], [*ranks, *(1 for _ in spare)], [*outputs, *(1 for _ in spare)]
    _down[(count, splits, blocks)](
        x, *(w.a_SRI for w in every), parts, order, tiles, tokens, splits, inputs, *r, steps, x.stride(0),
        COUNT=layers, PRECISION=how, BT=TILE, BR=br, BI=bi, num_warps=4, num_stages=3,
    )  # fmt: skip
    _up[(count, sum(triton.cdiv(n, bo) for n in outputs))](
        *z, parts, *(w.b_SRO for w in every), *(x if w.g_SO is None else w.g_SO for w in every),
        *(x if w.bias_O is None else w.bias_O for w in every), order, tiles, tokens, splits, *o, *r, COUNT=layers,
        SCALED=sum((w.g_SO is not None) << n for n, w in enumerate(weights)),
        BIASED=sum((w.bias_O is not None) << n for n, w in enumerate(weights)),
        PRECISION=how, BT=TILE, BR=br, BO=bo, num_warps=4, num_stages=2,
    )  # fmt: skip
    return zs


def _blocks(dtype: torch.dtype, br: int) -> tuple[int, int]:
    """In and out features that a program takes at once."""
    wide = dtype == torch.float32
    return 64 if wide else 128, 64 if wide or br > 32 else 128


def splits_of(programs: int, inputs: int, bi: int, processors: int) -> int:
    """Programs that share the features, such that two or so fall on each of the GPU's `processors`."""
    return max(1, min(triton.cdiv(2 * processors, programs), inputs // (2 * bi), 16))
