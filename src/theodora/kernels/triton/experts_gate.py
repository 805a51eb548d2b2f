"""Between the products of a mixture's experts, in Triton: the update of gate and up, the gate, and what it leaves.

    y = g ⊙ (z + s·xa Bᵀ) + bias        (gate, up) = y        h = act(gate) ⊙ (up + offset)

Gate and up lie one after the other in z, or in turns. With a limit the gate is cut off above it, and up on both sides.
Shapes as in `experts.py`; I features of h, of which z has 2·I columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.parts import Gate
from theodora.kernels.triton.common import load_scaled_b, precision, product, rank_block
from theodora.kernels.triton.experts import TILE, Rows
from theodora.kernels.triton.gated import activate


@triton.jit
def _load_pair(z, t, i, inside, I, TURNS: tl.constexpr, PACKED: tl.constexpr):
    """Gate and up of z, float32. In turns they are read as one number of 32 bits, of which each is a half."""
    row = t.to(tl.int64)[:, None]
    if PACKED:
        both = tl.load(z.to(tl.pointer_type(tl.int32)) + row * I + i[None, :], mask=inside, other=0)
        return (both << 16).to(tl.float32, bitcast=True), (both & -65536).to(tl.float32, bitcast=True)
    else:
        at = z + row * (2 * I) + (2 * i if TURNS else i)[None, :]
        step = 1 if TURNS else I
        one = tl.load(at, mask=inside, other=0.0).to(tl.float32)
        return one, tl.load(at + step, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def _store_pair(z, one, other, t, i, inside, I, TURNS: tl.constexpr, PACKED: tl.constexpr):
    """The inverse of `_load_pair`, of tiles in the dtype of z."""
    row = t.to(tl.int64)[:, None]
    if PACKED:
        low = one.to(tl.int16, bitcast=True).to(tl.int32) & 65535
        both = low | (other.to(tl.int16, bitcast=True).to(tl.int32) << 16)
        tl.store(z.to(tl.pointer_type(tl.int32)) + row * I + i[None, :], both, mask=inside)
    else:
        at = z + row * (2 * I) + (2 * i if TURNS else i)[None, :]
        step = 1 if TURNS else I
        tl.store(at, one, mask=inside)
        tl.store(at + step, other, mask=inside)


@triton.jit
def _through(gate, up, alpha, limit, offset, ACT: tl.constexpr, LIMITED: tl.constexpr):
    """h, and its derivatives by gate and up."""
    x, u = gate, up
    if LIMITED:
        x, u = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    value, slope = activate(x * alpha, ACT)
    value, u = value / alpha, u + offset
    by_gate, by_up = slope * u, value
    if LIMITED:
        by_gate = tl.where(gate <= limit, by_gate, 0.0)
        by_up = tl.where((up >= -limit) & (up <= limit), by_up, 0.0)
    return value * u, by_gate, by_up


@triton.jit
def _gate(z, xa, b, g, bias, h, tiles, I, R, scale, alpha, limit, offset,
          TURNS: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
          ACT: tl.constexpr, LIMITED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
          BR: tl.constexpr):  # fmt: skip
    """One tile, one block of features."""
    tile = tiles + tl.program_id(0) * 3
    e, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    t, r = start + tl.arange(0, BT), tl.arange(0, BR)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    o1, o2 = (2 * i, 2 * i + 1) if TURNS else (i, I + i)
    O = 2 * I
    dtype = z.dtype.element_ty
    inside = (t[:, None] < stop) & (i[None, :] < I)
    gate, up = _load_pair(z, t, i, inside, I, TURNS, PACKED)
    if LOW:
        at = xa + t.to(tl.int64)[:, None] * R + r[None, :]
        xa_tile = tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
        own = b + e * O * R
        gate += product(xa_tile, tl.trans(load_scaled_b(own, o1, r, O, R, R, 1, scale, dtype)), PRECISION)
        up += product(xa_tile, tl.trans(load_scaled_b(own, o2, r, O, R, R, 1, scale, dtype)), PRECISION)
    if SCALED:
        gate *= tl.load(g + e * O + o1, mask=i < I, other=0.0)[None, :]
        up *= tl.load(g + e * O + o2, mask=i < I, other=0.0)[None, :]
    if BIASED:
        gate += tl.load(bias + e * O + o1, mask=i < I, other=0.0).to(tl.float32)[None, :]
        up += tl.load(bias + e * O + o2, mask=i < I, other=0.0).to(tl.float32)[None, :]
    value, _, _ = _through(gate, up, alpha, limit, offset, ACT, LIMITED)
    tl.store(h + t.to(tl.int64)[:, None] * I + i[None, :], value.to(dtype), mask=inside)


def gate(
    z_SO: Tensor,
    rows: Rows,
    xa_SR: Tensor | None,
    b_EOR: Tensor | None,
    scale: float,
    g_EO: Tensor | None,
    bias_EO: Tensor | None,
    form: Gate,
) -> Tensor:
    """h, (S, I)."""
    chosen, features = z_SO.shape[0], z_SO.shape[1] // 2
    h = z_SO.new_empty(chosen, features)
    rank = 1 if b_EOR is None else b_EOR.shape[2]
    block = _features(features, 64)
    _gate[(len(rows.tiles_N3), triton.cdiv(features, block))](
        z_SO, xa_SR, None if b_EOR is None else b_EOR.contiguous(), g_EO, bias_EO, h, rows.tiles_N3, features, rank,
        scale, form.alpha, form.limit, form.offset, TURNS=form.in_turns, PACKED=_packed(z_SO, form),
        LOW=b_EOR is not None, SCALED=g_EO is not None, BIASED=bias_EO is not None, ACT=form.activation,
        LIMITED=form.limited, PRECISION=precision(z_SO.dtype), BT=TILE, BI=block, BR=rank_block(rank),
        num_warps=4, num_stages=2,
    )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["S"])
def _gate_backward(dh, low, a, weights, z, xa, b, g, bias, dz, dw, db_parts, dg_parts, da_parts, h_out, order, chunks,
                   S, I, R, RA, scale, alpha, limit, offset,
                   TURNS: tl.constexpr, PACKED: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr,
                   BIASED: tl.constexpr, JOINS: tl.constexpr, KEEP: tl.constexpr, ACT: tl.constexpr,
                   LIMITED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr,
                   STAGES: tl.constexpr):  # fmt: skip
    """One chunk, one block of features. JOINS: the down projection has an adapter, whose A is `a`. KEEP: write h."""
    n = tl.program_id(0).to(tl.int64)
    e, start, stop = tl.load(chunks + n * 3).to(tl.int64), tl.load(chunks + n * 3 + 1), tl.load(chunks + n * 3 + 2)
    if start >= stop:
        return
    r = tl.arange(0, BR)
    i = tl.program_id(1) * BI + tl.arange(0, BI)
    o1, o2 = (2 * i, 2 * i + 1) if TURNS else (i, I + i)
    O = 2 * I
    dtype = z.dtype.element_ty
    here = (i[:, None] < I) & (r[None, :] < RA)
    if JOINS:
        a_tile = tl.load(a + (e * RA + r[None, :]) * I + i[:, None], mask=here, other=0.0).to(dtype)
    if LOW:
        b1_tile = load_scaled_b(b + e * O * R, o1, r, O, R, R, 1, scale, dtype)
        b2_tile = load_scaled_b(b + e * O * R, o2, r, O, R, R, 1, scale, dtype)
    if SCALED:
        g1 = tl.load(g + e * O + o1, mask=i < I, other=0.0)
        g2 = tl.load(g + e * O + o2, mask=i < I, other=0.0)
    if BIASED:
        bias1 = tl.load(bias + e * O + o1, mask=i < I, other=0.0).to(tl.float32)
        bias2 = tl.load(bias + e * O + o2, mask=i < I, other=0.0).to(tl.float32)
    db1_sum = tl.zeros((BI, BR), tl.float32)
    db2_sum = tl.zeros((BI, BR), tl.float32)
    da_sum = tl.zeros((BI, BR), tl.float32)
    # Summed over the rows of a tile after the loop: within it the threads would wait for one another each time.
    dg1_sum = tl.zeros((BT, BI), tl.float32)
    dg2_sum = tl.zeros((BT, BI), tl.float32)
    for begin in tl.range(start, stop, BT, num_stages=STAGES):
        t = begin + tl.arange(0, BT)
        wide = t.to(tl.int64)
        there = t[:, None] < stop
        inside = there & (i[None, :] < I)
        choice = tl.load(order + t, mask=t < stop, other=0)
        weight = tl.load(weights + choice, mask=t < stop, other=0.0).to(tl.float32)
        d = tl.load(dh + wide[:, None] * I + i[None, :], mask=inside, other=0.0).to(tl.float32)
        v1, v2 = _load_pair(z, t, i, inside, I, TURNS, PACKED)
        if LOW:
            xa_tile = tl.load(xa + wide[:, None] * R + r[None, :], mask=there & (r[None, :] < R), other=0.0)
            v1 += product(xa_tile, tl.trans(b1_tile), PRECISION)
            v2 += product(xa_tile, tl.trans(b2_tile), PRECISION)
        if JOINS:
            low_tile = tl.load(low + wide[:, None] * RA + r[None, :], mask=there & (r[None, :] < RA), other=0.0)
            d += product(low_tile, tl.trans(a_tile), PRECISION)
        gate, up = v1, v2
        if SCALED:
            gate = gate * g1[None, :]
            up = up * g2[None, :]
        if BIASED:
            gate = gate + bias1[None, :]
            up = up + bias2[None, :]
        h, by_gate, by_up = _through(gate, up, alpha, limit, offset, ACT, LIMITED)
        if KEEP:
            tl.store(h_out + wide[:, None] * I + i[None, :], h.to(dtype), mask=inside)
        # Columns and rows that are not there have d = 0.
        tl.store(dw + tl.program_id(1).to(tl.int64) * S + t, tl.sum(h * d, axis=1), mask=t < stop)
        d *= weight[:, None]
        if JOINS:
            low_tile = (low_tile.to(tl.float32) * weight[:, None]).to(dtype)
            da_sum += product(tl.trans(h.to(dtype)), low_tile, PRECISION)
        d1, d2 = d * by_gate, d * by_up
        if SCALED:
            dg1_sum += d1 * v1
            dg2_sum += d2 * v2
            d1 *= g1[None, :]
            d2 *= g2[None, :]
        d1_tile, d2_tile = d1.to(dtype), d2.to(dtype)
        _store_pair(dz, d1_tile, d2_tile, t, i, inside, I, TURNS, PACKED)
        if LOW:
            db1_sum += product(tl.trans(d1_tile), xa_tile, PRECISION)
            db2_sum += product(tl.trans(d2_tile), xa_tile, PRECISION)
    if LOW:
        to, there = db_parts + n * O * R, (i[:, None] < I) & (r[None, :] < R)
        tl.store(to + o1[:, None] * R + r[None, :], db1_sum, mask=there)
        tl.store(to + o2[:, None] * R + r[None, :], db2_sum, mask=there)
    if SCALED:
        tl.store(dg_parts + n * O + o1, tl.sum(dg1_sum, axis=0), mask=i < I)
        tl.store(dg_parts + n * O + o2, tl.sum(dg2_sum, axis=0), mask=i < I)
    if JOINS:
        tl.store(da_parts + n * RA * I + i[:, None] + r[None, :] * I, da_sum, mask=here)


def gate_backward(
    dh_SI: Tensor,
    rows: Rows,
    weights_TK: Tensor,
    low_SR: Tensor | None,
    a_ERI: Tensor | None,
    z_SO: Tensor,
    xa_SR: Tensor | None,
    b_EOR: Tensor | None,
    scale: float,
    g_EO: Tensor | None,
    bias_EO: Tensor | None,
    form: Gate,
    *,
    keep_h: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """(dz (S, O), dw (S,) float32, for `sum_chunks` those of dB / s (N, O, R), dg (N, O) and dA (N, R, I), h (S, I)).

    Args:
        dh_SI: the gradient of h for a weight of 1, without the part that goes through the down projection's adapter.
        rows: who has which.
        weights_TK: what each row counts; dw is its gradient, in the order of the rows, without any bias's part.
        low_SR: that adapter's s·dz B, for a weight of 1.
        a_ERI: that adapter's A, whose dA it is.
        z_SO: x Wᵀ.
        xa_SR: x Aᵀ.
        b_EOR: B.
        scale: s.
        g_EO: m / norm, float32.
        bias_EO: the bias.
        form: of the gate.
        keep_h: whether to give h, too.
    """
    chosen, features = dh_SI.shape
    count = len(rows.chunks_N3)
    rank, rank_a = (1 if t is None else t.shape[at] for t, at in ((b_EOR, 2), (a_ERI, 1)))
    wide = {"dtype": torch.float32, "device": dh_SI.device}
    dz = torch.empty_like(z_SO)
    db = None if b_EOR is None else torch.empty(count, 2 * features, rank, **wide)
    dg = None if g_EO is None else torch.empty(count, 2 * features, **wide)
    da = None if a_ERI is None else torch.empty(count, rank_a, features, **wide)
    h = torch.empty_like(dh_SI) if keep_h else None
    br = rank_block(max(rank, rank_a))
    block = _features(features, 32 if br >= 64 else 64)
    blocks = triton.cdiv(features, block)
    dw = torch.zeros(blocks, chosen, **wide)
    _gate_backward[(count, blocks)](
        dh_SI, low_SR, None if a_ERI is None else a_ERI.contiguous(), weights_TK, z_SO, xa_SR,
        None if b_EOR is None else b_EOR.contiguous(), g_EO, bias_EO, dz, dw, db, dg, da, h, rows.order_S,
        rows.chunks_N3, chosen, features, rank, rank_a, scale, form.alpha, form.limit, form.offset,
        TURNS=form.in_turns, PACKED=_packed(z_SO, form), LOW=b_EOR is not None, SCALED=g_EO is not None,
        BIASED=bias_EO is not None, JOINS=a_ERI is not None, KEEP=keep_h, ACT=form.activation,
        LIMITED=form.limited, PRECISION=precision(dh_SI.dtype), BT=32, BI=block, BR=br, STAGES=3,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return dz, dw.sum(0), db, dg, da, h


def _packed(z: Tensor, form: Gate) -> bool:
    return form.in_turns and z.dtype.itemsize == 2


def _features(features: int, most: int) -> int:
    """Features of a block: no more than there are."""
    return min(max(16, triton.next_power_of_2(features)), most)
