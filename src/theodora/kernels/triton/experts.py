"""The passes of a mixture's experts beside their products, in Triton: gathering, adapters, weighting, sums.

Rows lie sorted by expert, and a program has rows of one expert alone: a tile of at most `TILE` rows where each row is
worked on for itself, a chunk of at most `CHUNK` where rows are added up. Which these are stands in a tensor on the GPU
whose length depends on the number of rows and experts alone, so that nobody waits for the router and a CUDA graph can
be replayed. Sums are taken in a fixed order: chunk by chunk of each expert, choice by choice of each token.

Shapes: T tokens, K experts for each, S = T·K rows, E experts, C columns, R rank, N tiles or chunks.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.parts import EXPERT_CHUNK, EXPERT_TILE
from theodora.kernels.triton.common import precision, product, rank_block

TILE, CHUNK = EXPERT_TILE, EXPERT_CHUNK


class Rows(NamedTuple):
    """Which rows belong to whom."""

    order_S: Tensor
    """Of each sorted row where its choice stands among those of all tokens, t·K + k; int32."""
    back_S: Tensor
    """Of each choice its row; int32."""
    ends_E: Tensor
    """Where the rows of each expert end; int32. Rows behind the last end belong to no expert."""
    tiles_N3: Tensor
    """Expert, first row and end of each tile; int32. Tiles that are not needed are empty."""
    chunks_N3: Tensor
    firsts_E: Tensor
    """Which chunk is the first of each expert, and how many there are; (E + 1,) int32."""

    @property
    def chosen(self) -> int:
        """S."""
        return len(self.order_S)


class Factors(NamedTuple):
    """A low-rank factor of each expert as the kernels read it: at `expert`·e + `column`·c + `rank`·r, times a scale."""

    tensor: Tensor
    expert: int
    column: int
    rank: int
    ranks: int
    scale: float


def columns_of_a(a_ERC: Tensor, scale: float = 1.0) -> Factors:
    """A, whose columns are the input's."""
    a = a_ERC.contiguous()
    return Factors(a, a.stride(0), 1, a.stride(1), a.shape[1], scale)


def columns_of_b(b_ECR: Tensor, scale: float) -> Factors:
    """B, whose columns are the output's."""
    b = b_ECR.contiguous()
    return Factors(b, b.stride(0), b.stride(1), 1, b.shape[2], scale)


@triton.jit(do_not_specialize=["COUNT"])
def _split_rows(ends, tiles, firsts, E, COUNT, SIZE, BE: tl.constexpr, BN: tl.constexpr):
    """The tiles of one expert; the last program's are the empty ones."""
    e = tl.program_id(0)
    every = tl.arange(0, BE)
    end = tl.load(ends + every, mask=every < E, other=0)
    start = tl.load(ends + every - 1, mask=(every > 0) & (every < E), other=0)
    counts = (tl.maximum(end - start, 0) + SIZE - 1) // SIZE
    first = tl.sum(tl.where(every < e, counts, 0), axis=0)
    own_start = tl.sum(tl.where(every == e, start, 0), axis=0)
    own_end = tl.sum(tl.where(every == e, end, 0), axis=0)
    own = tl.sum(tl.where(every == e, counts, 0), axis=0)
    own = tl.where(e == E, COUNT - first, own)
    tl.store(firsts + e, first)
    for begin in range(0, own, BN):
        n = begin + tl.arange(0, BN)
        row = own_start + n * SIZE
        at = tiles + (first + n) * 3
        tl.store(at, tl.minimum(e, E - 1) + n * 0, mask=n < own)
        tl.store(at + 1, row, mask=n < own)
        tl.store(at + 2, tl.minimum(row + SIZE, own_end), mask=n < own)


def split_rows(ends_E: Tensor, rows: int, size: int) -> tuple[Tensor, Tensor]:
    """(tiles (N, 3), firsts (E + 1,)) of at most `size` rows, see `Rows`."""
    experts = len(ends_E)
    count = triton.cdiv(rows, size) + experts
    tiles = torch.empty(count, 3, dtype=torch.int32, device=ends_E.device)
    firsts = torch.empty(experts + 1, dtype=torch.int32, device=ends_E.device)
    _split_rows[(experts + 1,)](
        ends_E, tiles, firsts, experts, count, size, BE=triton.next_power_of_2(experts), BN=64, num_warps=1
    )
    return tiles, firsts


@triton.jit
def _project(source, factors, g, out, kept, order, tiles, C, R, K, row_stride, f_expert, f_column, f_rank, scale,
             GATHER: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, KEEP: tl.constexpr,
             PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """One tile, all columns."""
    tile = tiles + tl.program_id(0) * 3
    e, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    t, r = start + tl.arange(0, BT), tl.arange(0, BR)
    row = t
    if GATHER:
        row = tl.load(order + t, mask=t < stop, other=0) // K
    from_rows = source + row.to(tl.int64)[:, None] * row_stride
    dtype = source.dtype.element_ty
    sums = tl.zeros((BT, BR), tl.float32)
    for first in range(0, C, BC):
        c = first + tl.arange(0, BC)
        inside = (t[:, None] < stop) & (c[None, :] < C)
        values = tl.load(from_rows + c[None, :], mask=inside, other=0.0)
        if SCALED:
            g_tile = tl.load(g + e * C + c, mask=c < C, other=0.0)
            values = (values.to(tl.float32) * g_tile[None, :]).to(dtype)
        if KEEP:
            tl.store(kept + t.to(tl.int64)[:, None] * C + c[None, :], values, mask=inside)
        if LOW:
            at = factors + e * f_expert + c[:, None] * f_column + r[None, :] * f_rank
            f = tl.load(at, mask=(c[:, None] < C) & (r[None, :] < R), other=0.0).to(tl.float32)
            sums += product(values, (f * scale).to(dtype), PRECISION)
    if LOW:
        at = out + t.to(tl.int64)[:, None] * R + r[None, :]
        tl.store(at, sums.to(dtype), mask=(t[:, None] < stop) & (r[None, :] < R))


def project(
    values: Tensor,
    rows: Rows,
    factors: Factors | None,
    *,
    of_tokens: bool = False,
    g_EC: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """(g ⊙ values as sorted rows (S, C), that times each expert's factors (S, R)), where `keep`, and where there are.

    Args:
        values: sorted rows (S, C), or, `of_tokens`, what all rows of a token have in common, (T, C).
        rows: who has which.
        factors: of C columns.
        of_tokens: see there.
        g_EC: what the columns are scaled by, float32.
        keep: whether to write the rows, too.
    """
    values = values.contiguous()
    chosen, columns = rows.chosen, values.shape[1]
    kept = values.new_empty(chosen, columns) if keep else None
    f = factors or Factors(values, 0, 0, 0, 1, 1.0)
    out = None if factors is None else values.new_empty(chosen, f.ranks)
    _project[(len(rows.tiles_N3),)](
        values, f.tensor, g_EC, out, kept, rows.order_S, rows.tiles_N3, columns, f.ranks,
        max(1, chosen // max(1, len(values))), values.stride(0), f.expert, f.column, f.rank, f.scale,
        GATHER=of_tokens, LOW=factors is not None, SCALED=g_EC is not None, KEEP=keep,
        PRECISION=precision(values.dtype), BT=TILE, BC=_columns(values, 128), BR=rank_block(f.ranks),
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return kept, out


@triton.jit
def _add_low(z, low, factors, g, bias, y, tiles, C, R, f_expert, f_column, f_rank, scale,
             LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, SECOND: tl.constexpr,
             PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr):  # fmt: skip
    """One tile, one block of columns."""
    tile = tiles + tl.program_id(0) * 3
    e, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    t, r = start + tl.arange(0, BT), tl.arange(0, BR)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    dtype = z.dtype.element_ty
    inside = (t[:, None] < stop) & (c[None, :] < C)
    place = t.to(tl.int64)[:, None] * C + c[None, :]
    v = tl.load(z + place, mask=inside, other=0.0)
    if LOW:
        at = low + t.to(tl.int64)[:, None] * R + r[None, :]
        low_tile = tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
        at = factors + e * f_expert + c[None, :] * f_column + r[:, None] * f_rank
        f = tl.load(at, mask=(c[None, :] < C) & (r[:, None] < R), other=0.0).to(tl.float32)
        v = (v.to(tl.float32) + product(low_tile, (f * scale).to(dtype), PRECISION)).to(dtype)
        tl.store(z + place, v, mask=inside)
    if SECOND:
        value = v.to(tl.float32)
        if SCALED:
            value *= tl.load(g + e * C + c, mask=c < C, other=0.0)[None, :]
        if BIASED:
            value += tl.load(bias + e * C + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
        tl.store(y + place, value.to(dtype), mask=inside)


def add_low(z_SC: Tensor, rows: Rows, low_SR: Tensor, factors: Factors) -> Tensor:
    """z + low · each expert's factors, in place."""
    _launch_add_low(z_SC, rows, low_SR, factors, None, None, None)
    return z_SC


def scaled(v_SC: Tensor, rows: Rows, g_EC: Tensor | None, bias_EC: Tensor | None) -> Tensor:
    """g ⊙ v + bias of each row's expert, (S, C)."""
    y = torch.empty_like(v_SC)
    _launch_add_low(v_SC, rows, None, None, g_EC, bias_EC, y)
    return y


def _launch_add_low(
    z: Tensor,
    rows: Rows,
    low: Tensor | None,
    factors: Factors | None,
    g: Tensor | None,
    bias: Tensor | None,
    y: Tensor | None,
) -> None:
    columns, block = z.shape[1], _columns(z, 128)
    f = factors or Factors(z, 0, 0, 0, 1, 1.0)
    _add_low[(len(rows.tiles_N3), triton.cdiv(columns, block))](
        z, low, f.tensor, g, bias, y, rows.tiles_N3, columns, f.ranks, f.expert, f.column, f.rank, f.scale,
        LOW=low is not None, SCALED=g is not None, BIASED=bias is not None, SECOND=y is not None,
        PRECISION=precision(z.dtype), BT=TILE, BC=block, BR=rank_block(f.ranks), num_warps=4, num_stages=2,
    )  # fmt: skip


@triton.jit
def _combine(values, weights, g, bias, out, back, index, C, E,
             K: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
             BC: tl.constexpr):  # fmt: skip
    """One token, one block of columns."""
    t = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for k in tl.static_range(K):
        e = tl.load(index + t * K + k).to(tl.int64)
        row = tl.load(back + t * K + k).to(tl.int64)
        inside = c < tl.where(e < E, C, 0)  # rows of no expert were never written
        value = tl.load(values + row * C + c, mask=inside, other=0.0).to(tl.float32)
        if SCALED:
            value *= tl.load(g + e * C + c, mask=inside, other=0.0)
        if BIASED:
            value += tl.load(bias + e * C + c, mask=inside, other=0.0).to(tl.float32)
        if WEIGHTED:
            value *= tl.load(weights + t * K + k).to(tl.float32)
        total += value
    tl.store(out + t * C + c, total.to(out.dtype.element_ty), mask=c < C)


def combine(
    values_SC: Tensor,
    rows: Rows,
    index_TK: Tensor,
    weights_TK: Tensor | None,
    g_EC: Tensor | None,
    bias_EC: Tensor | None,
) -> Tensor:
    """Σ_K weight · (g ⊙ value + bias) of each token's rows, (T, C), rounded once."""
    (tokens, chosen), columns = index_TK.shape, values_SC.shape[1]
    out = values_SC.new_empty(tokens, columns)
    block = min(1024, triton.next_power_of_2(columns))
    _combine[(tokens, triton.cdiv(columns, block))](
        values_SC, weights_TK, g_EC, bias_EC, out, rows.back_S, index_TK, columns, len(rows.ends_E),
        K=chosen, WEIGHTED=weights_TK is not None, SCALED=g_EC is not None, BIASED=bias_EC is not None,
        BC=block, num_warps=max(1, min(4, block // 256)),
    )  # fmt: skip
    return out


@triton.jit
def _outer(values, low, v, weights, parts, dg_parts, order, chunks, C, R, K, row_stride, part_column, part_rank,
           GATHER: tl.constexpr, LOW: tl.constexpr, WEIGHTED: tl.constexpr, SCALED: tl.constexpr,
           PRECISION: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
           STAGES: tl.constexpr):  # fmt: skip
    """One chunk, one block of columns."""
    n = tl.program_id(0).to(tl.int64)
    start, stop = tl.load(chunks + n * 3 + 1), tl.load(chunks + n * 3 + 2)
    if start >= stop:
        return
    c, r = tl.program_id(1) * BC + tl.arange(0, BC), tl.arange(0, BR)
    dtype = values.dtype.element_ty
    total = tl.zeros((BC, BR), tl.float32)
    dg = tl.zeros((BT, BC), tl.float32)
    for first in tl.range(start, stop, BT, num_stages=STAGES):
        t = first + tl.arange(0, BT)
        wide = t.to(tl.int64)
        source = t
        if GATHER or WEIGHTED:
            choice = tl.load(order + t, mask=t < stop, other=0)
        if GATHER:
            source = choice // K
        inside = (t[:, None] < stop) & (c[None, :] < C)
        tile = tl.load(values + source.to(tl.int64)[:, None] * row_stride + c[None, :], mask=inside, other=0.0)
        if WEIGHTED:
            weight = tl.load(weights + choice, mask=t < stop, other=0.0).to(tl.float32)
        if LOW:
            at = low + wide[:, None] * R + r[None, :]
            low_tile = tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
            if WEIGHTED:
                low_tile = (low_tile.to(tl.float32) * weight[:, None]).to(dtype)
            total += product(tl.trans(tile), low_tile, PRECISION)
        if SCALED:
            share = tile.to(tl.float32)
            share *= tl.load(v + wide[:, None] * C + c[None, :], mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                share *= weight[:, None]
            dg += share
    if LOW:
        at = parts + n * C * R + c[:, None] * part_column + r[None, :] * part_rank
        tl.store(at, total, mask=(c[:, None] < C) & (r[None, :] < R))
    if SCALED:
        tl.store(dg_parts + n * C + c, tl.sum(dg, axis=0), mask=c < C)


def outer(
    values: Tensor,
    rows: Rows,
    low_SR: Tensor | None,
    *,
    of_tokens: bool = False,
    weights_TK: Tensor | None = None,
    v_SC: Tensor | None = None,
    ranks_first: bool = False,
) -> tuple[Tensor | None, Tensor | None]:
    """For `sum_chunks`: Σ weight · valuesᵀ low, (N, C, R), and Σ weight · values ⊙ v, (N, C), of each chunk's rows.

    Args:
        values: sorted rows (S, C), or, `of_tokens`, what all rows of a token have in common, (T, C).
        rows: who has which.
        low_SR: sorted rows.
        of_tokens: see there.
        weights_TK: what each row counts. Default: 1.
        v_SC: sorted rows.
        ranks_first: gives (N, R, C) instead.
    """
    values = values.contiguous()
    chosen, columns = rows.chosen, values.shape[1]
    count, rank = len(rows.chunks_N3), 1 if low_SR is None else low_SR.shape[1]
    wide = {"dtype": torch.float32, "device": values.device}
    size = (rank, columns) if ranks_first else (columns, rank)
    parts = None if low_SR is None else torch.empty(count, *size, **wide)
    dg_parts = None if v_SC is None else torch.empty(count, columns, **wide)
    br = rank_block(rank)
    bc = _columns(values, 128 if br < 64 else 64)
    _outer[(count, triton.cdiv(columns, bc))](
        values, low_SR, v_SC, weights_TK, parts, dg_parts, rows.order_S, rows.chunks_N3, columns, rank,
        max(1, chosen // max(1, len(values))), values.stride(0), *((1, columns) if ranks_first else (rank, 1)),
        GATHER=of_tokens, LOW=low_SR is not None, WEIGHTED=weights_TK is not None, SCALED=v_SC is not None,
        PRECISION=precision(values.dtype), BT=32, BC=bc, BR=br, STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip
    return parts, dg_parts


@triton.jit
def _sum_chunks(parts, g, norm, out, firsts, SIZE, COLUMNS, RANK, scale,
                SCALED: tl.constexpr, DIVIDED: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Some numbers of one expert."""
    e = tl.program_id(0).to(tl.int64)
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    first, stop = tl.load(firsts + e), tl.load(firsts + e + 1)
    at = parts + first.to(tl.int64) * SIZE + i
    for _ in range(first, stop):
        total += tl.load(at, mask=i < SIZE, other=0.0)
        at += SIZE
    total *= scale
    if SCALED:
        total *= tl.load(g + e * COLUMNS + i // RANK, mask=i < SIZE, other=0.0)
    if DIVIDED:
        by = tl.load(norm + e * COLUMNS + i, mask=i < SIZE, other=1.0).to(tl.float32)
        total = tl.where(by == 0, 0.0, total / tl.where(by == 0, 1.0, by))
    tl.store(out + e * SIZE + i, total.to(out.dtype.element_ty), mask=i < SIZE)


def sum_chunks(
    parts: Tensor,
    rows: Rows,
    dtype: torch.dtype,
    scale: float = 1.0,
    g_EC: Tensor | None = None,
    norm_EC: Tensor | None = None,
) -> Tensor:
    """scale · g ⊙ Σ parts / norm, (E, …), over the chunks of each expert; zeros where it has none.

    Args:
        parts: float32, (N, C, R) or (N, R, C), or (N, C) for a magnitude.
        rows: who has which.
        dtype: of the result.
        scale: a factor.
        g_EC: of (N, C, R) a factor of each column.
        norm_EC: of (N, C) a divisor of each column; where it is zero, so is the result.
    """
    experts, size = len(rows.ends_E), parts[0].numel()
    out = torch.empty(experts, *parts.shape[1:], dtype=dtype, device=parts.device)
    _sum_chunks[(experts, triton.cdiv(size, 1024))](
        parts, g_EC, norm_EC, out, rows.firsts_E, size, parts.shape[1], size // parts.shape[1], scale,
        SCALED=g_EC is not None, DIVIDED=norm_EC is not None, BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return out


def _columns(values: Tensor, most: int) -> int:
    """Columns of a block: no more than there are, and less of wide dtypes."""
    return min(max(16, triton.next_power_of_2(values.shape[1])), most if values.dtype.itemsize < 4 else 64)
