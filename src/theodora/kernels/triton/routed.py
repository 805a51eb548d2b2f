"""`theodora.kernels.routed` in Triton: two launches for each linear layer, whatever the mix of adapters.

A tile is up to 16 tokens of one slot. The first launch computes xa = x Aᵀ of each tile, the features split among
programs where there are too few tiles to fill the GPU; the second adds up the parts, multiplies with s·B, scales, and
writes y over z. Tiles of the base model return at once. Grids depend on the number of tokens and slots alone, and who
works on what stands in a tensor on the GPU, so that a CUDA graph of the launches can be replayed for any batch.

Shapes as in `theodora.kernels.routed`; P parts.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.triton.common import precision, product, row_contiguous

TILE = 16  # tokens: the least that `tl.dot` takes
_MOST_RANKS = 64  # that a program holds at once


@triton.jit
def _down(x, a, parts, order, tiles, T, I, R, features, x_row, a_slot, a_row,
          PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """parts[p] = x Aᵀ over a share of the features, (P, T, R) float32, the tokens in the order of their slots."""
    tile = tiles + tl.program_id(0) * 3
    slot, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if (slot == 0) | (start >= stop):
        return
    t, r = start + tl.arange(0, BT), tl.program_id(2) * BR + tl.arange(0, BR)
    token = tl.load(order + t, mask=t < stop, other=0)
    first = tl.program_id(1) * features
    last = tl.minimum(first + features, I)
    x_start = x + token.to(tl.int64)[:, None] * x_row
    a_start = a + slot.to(tl.int64) * a_slot + r[:, None] * a_row
    sums = tl.zeros([BT, BR], dtype=tl.float32)
    for at in range(first, last, BI):
        i = at + tl.arange(0, BI)
        inside = i[None, :] < last
        x_tile = tl.load(x_start + i[None, :], mask=(t[:, None] < stop) & inside, other=0.0)
        a_tile = tl.load(a_start + i[None, :], mask=(r[:, None] < R) & inside, other=0.0)
        sums += product(x_tile, tl.trans(a_tile), PRECISION)
    place = (tl.program_id(1) * T + t[:, None]).to(tl.int64) * R + r[None, :]
    tl.store(parts + place, sums, mask=(t[:, None] < stop) & (r[None, :] < R))


@triton.jit
def _up(z, parts, b, g, bias, order, tiles, T, O, R, P, z_row, b_slot, b_row,
        SCALED: tl.constexpr, BIASED: tl.constexpr,
        PRECISION: tl.constexpr, BT: tl.constexpr, BR: tl.constexpr, BO: tl.constexpr):  # fmt: skip
    """z = g ⊙ (z + xa (sB)) + bias, in place."""
    tile = tiles + tl.program_id(0) * 3
    slot, start, stop = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    if (not BIASED) & (slot == 0):
        return
    t, o = start + tl.arange(0, BT), tl.program_id(1) * BO + tl.arange(0, BO)
    token = tl.load(order + t, mask=t < stop, other=0)
    inside = (t[:, None] < stop) & (o[None, :] < O)
    place = z + token.to(tl.int64)[:, None] * z_row + o[None, :]
    sums = tl.load(place, mask=inside, other=0.0).to(tl.float32)
    if slot != 0:
        b_start = b + slot.to(tl.int64) * b_slot + o[None, :]
        for first in range(0, R, BR):
            r = first + tl.arange(0, BR)
            xa = tl.zeros([BT, BR], dtype=tl.float32)
            for p in range(P):
                at = parts + (p * T + t[:, None]).to(tl.int64) * R + r[None, :]
                xa += tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
            b_tile = tl.load(b_start + r[:, None] * b_row, mask=(r[:, None] < R) & (o[None, :] < O), other=0.0)
            sums += product(xa.to(b_tile.dtype), b_tile, PRECISION)
        if SCALED:
            sums *= tl.load(g + slot.to(tl.int64) * O + o, mask=o < O, other=0.0)[None, :]
    if BIASED:
        sums += tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)[None, :]
    tl.store(place, sums.to(z.dtype.element_ty), mask=inside)


def routed(
    z: Tensor, x: Tensor, a: Tensor, b: Tensor, g: Tensor | None, bias: Tensor | None, order: Tensor, tiles: Tensor
) -> Tensor:
    """y, written over z (rows contiguous)."""
    (tokens, inputs), (rank, outputs), count = x.shape, b.shape[1:], tiles.shape[0]
    x = row_contiguous(x)
    br = min(_MOST_RANKS, max(16, triton.next_power_of_2(rank)))
    bi = 64 if x.dtype == torch.float32 else 128
    bo = 64 if x.dtype == torch.float32 or br > 32 else 128
    splits = splits_of(count, inputs, bi, _processors(x.device))
    features = triton.cdiv(triton.cdiv(inputs, splits), bi) * bi
    splits = triton.cdiv(inputs, features)
    parts = torch.empty(splits, tokens, rank, dtype=torch.float32, device=x.device)
    how = precision(x.dtype)
    _down[(count, splits, triton.cdiv(rank, br))](
        x, a, parts, order, tiles, tokens, inputs, rank, features, x.stride(0), a.stride(0), a.stride(1),
        PRECISION=how, BT=TILE, BR=br, BI=bi, num_warps=4, num_stages=3,
    )  # fmt: skip
    _up[(count, triton.cdiv(outputs, bo))](
        z, parts, b, z if g is None else g, z if bias is None else bias, order, tiles, tokens, outputs, rank, splits,
        z.stride(0), b.stride(0), b.stride(1), SCALED=g is not None, BIASED=bias is not None,
        PRECISION=how, BT=TILE, BR=br, BO=bo, num_warps=4, num_stages=2,
    )  # fmt: skip
    return z


def splits_of(tiles: int, inputs: int, bi: int, processors: int) -> int:
    """Programs that share the features, such that two or so fall on each of the GPU's `processors`."""
    return max(1, min(triton.cdiv(2 * processors, tiles), inputs // (2 * bi), 16))


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
