"""`theodora.kernels.packed` in Triton.

Kernels take such a weight as one argument, a tuple: (numbers, the blocks' largest or the rows', the largest of those'
blocks, their table, their mean, the table of the numbers, the first row); what there is none of is any tensor. How it
is laid out they are told as constants: BITS (0: not a tuple but a plain tensor), BLOCK, NESTED, DTYPE. They are to be
launched with `EXACT`: a product and a sum that were fused would be rounded otherwise than in the library.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.operators import interpreted
from theodora.kernels.packed import Packed, table_on
from theodora.kernels.triton import weight_norm
from theodora.kernels.triton.common import precision, processors, product, rank_block

EXACT = {"enable_fp_fusion": False}
UNPACKED = {"BITS": 0, "BLOCK": 0, "NESTED": 0, "DTYPE": tl.float32}
"""The constants of a plain tensor."""
_INTERPRETED = tl.constexpr(interpreted())
_DTYPES = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
_PARTS = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}  # bfloat16 numbers that add up to one of these

TILES = {16: (128, 128, 8), 32: (128, 128, 8), 64: (64, 128, 4), 128: (64, 64, 4), 256: (64, 32, 8)}
"""(output features, input features, warps) of a program, by padded rank."""
_FORMED = {16: (16, 128), 32: (16, 128), 64: (16, 64), 128: (16, 64), 256: (16, 32)}
PROGRAMS = 3
"""For each processor, at least so many programs, if the input features can be shared out among them."""


@triton.jit
def load_numbers(w, o, start, O, I, BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
                 BI: tl.constexpr):  # fmt: skip
    """Of rows o and features start .. start + BI (a multiple of BI): the numbers, and their scales, as they lie."""
    numbers, largest, outer, code, mean, _, first = w
    row = (o + first).to(tl.int64)
    if BITS == 8:
        i = start + tl.arange(0, BI)
        q = tl.load(numbers + row[:, None] * I + i[None, :], mask=(o[:, None] < O) & (i[None, :] < I), other=0)
        scale = (tl.load(largest + row, mask=o < O, other=0.0) * 0.007874015718698502)[:, None]  # 1 / 127
    else:
        half = start // 2 + tl.arange(0, BI // 2)
        q = tl.load(numbers + (row * (I // 2))[:, None] + half[None, :],
                    mask=(o[:, None] < O) & (half[None, :] < I // 2), other=0)  # fmt: skip
        # Blocks that lie in the tile, or the one that the tile lies in.
        SIZE: tl.constexpr = BI if BLOCK > BI else BLOCK
        at = start + SIZE * tl.arange(0, BI // SIZE)
        block, inside = (row[:, None] * I + at[None, :]) // BLOCK, (o[:, None] < O) & (at[None, :] < I)
        if NESTED > 0:
            scale = tl.load(code + tl.load(largest + block, mask=inside, other=0).to(tl.int32))
            scale = scale * tl.load(outer + block // NESTED, mask=inside, other=0.0) + tl.load(mean)
            scale = tl.where(inside, scale, 0.0)
        else:
            scale = tl.load(largest + block, mask=inside, other=0.0)
    return q, scale


@triton.jit
def dequantized(w, q, scale, BITS: tl.constexpr, DTYPE: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr):
    """W, (BO, BI), rounded to DTYPE, from what `load_numbers` gives."""
    if BITS == 8:
        wide = q.to(tl.float32) * scale
    else:
        table, both = w[5], q.to(tl.int32)
        COUNT: tl.constexpr = scale.shape[1]
        scale = tl.broadcast_to(scale[:, :, None], (BO, COUNT, BI // 2 // COUNT)).reshape(BO, BI // 2)
        wide = tl.interleave(tl.load(table + (both >> 4)) * scale, tl.load(table + (both & 15)) * scale)
    return rounded(wide, DTYPE)


@triton.jit
def rounded(wide, DTYPE: tl.constexpr):
    """float32 to DTYPE, to nearest."""
    if _INTERPRETED and tl.bfloat16 == DTYPE:  # Triton's interpreter cuts digits off, and does not round
        bits = wide.to(tl.int32, bitcast=True)
        wide = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000).to(tl.float32, bitcast=True)
    return wide.to(DTYPE)


@triton.jit
def load_packed(w, o, start, O, I, BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
                BO: tl.constexpr, BI: tl.constexpr):  # fmt: skip
    """W of rows o and features start .. start + BI (a multiple of BI), dequantised and rounded; 0 beyond I."""
    q, scale = load_numbers(w, o, start, O, I, BITS, BLOCK, NESTED, BI)
    return dequantized(w, q, scale, BITS, DTYPE, BO, BI)


def argument(weight: Packed) -> tuple[Any, ...]:
    """The weight as kernels take it."""
    numbers, largest, *rest = weight.tensors
    table = largest if weight.table == "int8" else table_on(weight.table, numbers.device)
    outer, code, mean = rest if rest else (largest, largest, largest)
    return numbers, largest, outer, code, mean, table, weight.form[-1]


def constants(weight: Packed) -> dict[str, Any]:
    """How it is laid out."""
    _, _, bits, block, nested, _ = weight.form
    return {"BITS": bits, "BLOCK": block, "NESTED": nested, "DTYPE": _DTYPES[weight.dtype]}


@triton.jit
def _times_a(w, a3, products, O, I, R, SHARE,
             BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr, PARTS: tl.constexpr,
             SHARES: tl.constexpr, PRECISION: tl.constexpr,
             BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """W Aᵀ over a share of the features, (O, SHARES, R) float32."""
    o, r = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, BR)
    first = tl.program_id(1) * SHARE
    stop = tl.minimum(first + SHARE, I)
    w_a = tl.zeros((BO, BR), tl.float32)
    q, scale = load_numbers(w, o, first, O, I, BITS, BLOCK, NESTED, BI)
    # The compiler's own way to load ahead would put each number of the table into shared memory first.
    for start in tl.range(first, stop, BI, num_stages=1):
        k = start + tl.arange(0, BI)
        inside = (r[None, :] < R) & (k[:, None] < I)
        a_at = a3 + r[None, :] * I + k[:, None]
        a_high = tl.load(a_at, mask=inside, other=0.0)
        a_middle = tl.load(a_at + R * I, mask=inside, other=0.0)
        a_low = tl.load(a_at + 2 * R * I, mask=inside, other=0.0)
        rows = tl.where(start + BI < stop, O, 0)
        next_q, next_scale = load_numbers(w, o, start + BI, rows, I, BITS, BLOCK, NESTED, BI)
        rest = dequantized(w, q, scale, BITS, DTYPE, BO, BI)
        # W and A are sums of bfloat16 numbers; the products of the smallest of them are below float32's last digit.
        high = rest.to(tl.bfloat16)
        w_a += product(high, a_high, PRECISION)
        w_a += product(high, a_middle, PRECISION)
        w_a += product(high, a_low, PRECISION)
        if PARTS > 1:
            rest = rest.to(tl.float32) - high.to(tl.float32)
            high = rest.to(tl.bfloat16)
            w_a += product(high, a_high, PRECISION)
            w_a += product(high, a_middle, PRECISION)
        if PARTS > 2:
            w_a += product((rest - high.to(tl.float32)).to(tl.bfloat16), a_high, PRECISION)
        q, scale = next_q, next_scale
    at = products + (o[:, None].to(tl.int64) * SHARES + tl.program_id(1)) * R + r[None, :]
    tl.store(at, w_a, mask=(o[:, None] < O) & (r[None, :] < R))


@triton.jit
def _form(w, a, b, norm, O, I, R, a_row, scale,
          BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr, DTYPE: tl.constexpr,
          BO: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """The rows whose norms are at −1, because their terms cancel: by forming them. There are hardly ever any."""
    o, r = tl.program_id(0) * BO + tl.arange(0, BO), tl.arange(0, BR)
    cancelled = tl.load(norm + o, mask=o < O, other=0.0) < 0
    if tl.max(cancelled.to(tl.int32), axis=0) > 0:
        b_tile = tl.load(b + o[:, None] * R + r[None, :], mask=(o[:, None] < O) & (r[None, :] < R), other=0.0)
        total = tl.zeros((BO,), tl.float32)
        for start in range(0, I, BI):
            k = start + tl.arange(0, BI)
            a_tile = tl.load(a + r[:, None] * a_row + k[None, :], mask=(r[:, None] < R) & (k[None, :] < I), other=0.0)
            update = tl.dot(b_tile.to(tl.float32), a_tile.to(tl.float32), input_precision="ieee")
            adapted = load_packed(w, o, start, O, I, BITS, BLOCK, NESTED, DTYPE, BO, BI).to(tl.float32) + scale * update
            total += tl.sum(adapted * adapted, axis=1)
        tl.store(norm + o, tl.sqrt_rn(total), mask=cancelled)


def dora_norms(weights: Sequence[Packed], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor) -> Tensor:
    """See `weight_norm.dora_norms_packed`.

    A launch for the product of each weight with its A, one for all norms, and one for each weight where rows may have
    to be formed. Nothing waits for the GPU.
    """
    _, outputs, rank = b_NOR.shape
    a_NRI, b_NOR, inputs = a_NRI.contiguous(), b_NOR.contiguous(), a_NRI.shape[2]
    block = rank_block(rank)
    bo, bi, warps = TILES[min(block, 256)]
    blocks = triton.cdiv(outputs, bo)
    shares = shares_of(blocks, inputs // bi, a_NRI.device)
    share = triton.cdiv(triton.cdiv(inputs, shares), bi) * bi
    parts, gram = weight_norm.in_three_with_gram(a_NRI, b_NOR)
    products = a_NRI.new_empty(len(weights), outputs, shares, rank, dtype=torch.float32)
    for weight, a3, into in zip(weights, parts, products, strict=True):
        _times_a[(blocks, shares)](
            argument(weight), a3, into, outputs, inputs, rank, share, **constants(weight), PARTS=_PARTS[weight.dtype],
            SHARES=shares, PRECISION=precision(torch.bfloat16), BO=bo, BI=bi, BR=block,
            num_warps=warps, num_stages=1, **EXACT,
        )  # fmt: skip
    norm = weight_norm.norms_of_products(products, gram, b_NOR, scale, w_norm_sq_NO, None)
    bo, bi = _FORMED[min(block, 256)]
    for weight, a, b, found in zip(weights, a_NRI, b_NOR, norm, strict=True):
        _form[(triton.cdiv(outputs, bo),)](
            argument(weight), a, b, found, outputs, inputs, rank, inputs, scale, **constants(weight),
            BO=bo, BI=bi, BR=block, num_warps=4, num_stages=1, **EXACT,
        )  # fmt: skip
    return norm


def shares_of(blocks: int, most: int, device: torch.device) -> int:
    """Into how many shares, a power of two, the input features are cut."""
    if device.type != "cuda":
        return min(2, max(1, most))
    wanted = PROGRAMS * processors(device) // max(1, blocks)
    return min(8, 1 << max(0, min(wanted, most).bit_length() - 1))
