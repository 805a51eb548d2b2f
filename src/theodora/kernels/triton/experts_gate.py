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
from theodora.kernels.triton.gated import _activate


@triton.jit
def _composed(z, xa_tile, b, g, bias, e, t, o, r, stop, inside_o, O, R, scale,
              LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """(v, y) of some columns o of z: without the scale and the bias, and with them."""
    dtype = z.dtype.element_ty
    at = z + t.to(tl.int64)[:, None] * O + o[None, :]
    v = tl.load(at, mask=(t[:, None] < stop) & inside_o[None, :], other=0.0).to(tl.float32)
    if LOW:
        b_tile = load_scaled_b(b + e * O * R, o, r, O, R, R, 1, scale, dtype)
        v += product(xa_tile, tl.trans(b_tile), PRECISION)
    y = v
    if SCALED:
        y *= tl.load(g + e * O + o, mask=inside_o, other=0.0)[None, :]
    if BIASED:
        y += tl.load(bias + e * O + o, mask=inside_o, other=0.0).to(tl.float32)[None, :]
    return v, y


@triton.jit
def _through(gate, up, alpha, limit, offset, ACT: tl.constexpr, LIMITED: tl.constexpr):
    """h, and its derivatives by gate and up."""
    x, u = gate, up
    if LIMITED:
        x, u = tl.minimum(gate, limit), tl.minimum(tl.maximum(up, -limit), limit)
    value, slope = _activate(x * alpha, ACT)
    value, u = value / alpha, u + offset
    by_gate, by_up = slope * u, value
    if LIMITED:
        by_gate = tl.where(gate <= limit, by_gate, 0.0)
        by_up = tl.where((up >= -limit) & (up <= limit), by_up, 0.0)
    return value * u, by_gate, by_up


@triton.jit
def _gate(z, xa, b, g, bias, h, tiles, I, R, scale, alpha, limit, offset,
          TURNS: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr, ACT: tl.constexpr,
          LIMITED: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
          BR: tl.constexpr):  # fmt: skip
    """One tile, one block of features."""
    tile = tiles + tl.program_id(0) * 3
    e, start, stop = tl.load(tile).to(tl.int64), tl.load(tile + 1), tl.load(tile + 2)
    if start >= stop:
        return
    t, r = start + tl.arange(0, BT), tl.arange(0, BR)
    first = tl.program_id(1) * BI
    i = first + tl.arange(0, BI)
    xa_tile = tl.zeros((BT, BR), z.dtype.element_ty)
    if LOW:
        at = xa + t.to(tl.int64)[:, None] * R + r[None, :]
        xa_tile = tl.load(at, mask=(t[:, None] < stop) & (r[None, :] < R), other=0.0)
    if TURNS:
        o = 2 * first + tl.arange(0, 2 * BI)
        _, y = _composed(z, xa_tile, b, g, bias, e, t, o, r, stop, o < 2 * I, 2 * I, R, scale,
                         LOW, SCALED, BIASED, PRECISION)  # fmt: skip
        gate, up = tl.split(tl.reshape(y, (BT, BI, 2)))
    else:
        _, gate = _composed(z, xa_tile, b, g, bias, e, t, i, r, stop, i < I, 2 * I, R, scale,
                            LOW, SCALED, BIASED, PRECISION)  # fmt: skip
        _, up = _composed(z, xa_tile, b, g, bias, e, t, I + i, r, stop, i < I, 2 * I, R, scale,
                          LOW, SCALED, BIASED, PRECISION)  # fmt: skip
    value, _, _ = _through(gate, up, alpha, limit, offset, ACT, LIMITED)
    at = h + t.to(tl.int64)[:, None] * I + i[None, :]
    tl.store(at, value.to(h.dtype.element_ty), mask=(t[:, None] < stop) & (i[None, :] < I))


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
        scale, form.alpha, form.limit, form.offset, TURNS=form.in_turns, LOW=b_EOR is not None,
        SCALED=g_EO is not None, BIASED=bias_EO is not None, ACT=form.activation, LIMITED=form.limited,
        PRECISION=precision(z_SO.dtype), BT=TILE, BI=block, BR=rank_block(rank), num_warps=4, num_stages=2,
    )  # fmt: skip
    return h


@triton.jit(do_not_specialize=["S"])
def _gate_backward(dh, low, a, weights, z, xa, b, g, bias, dz, dw, db_parts, dg_parts, da_parts, order, chunks,
                   S, I, R, RA, scale, alpha, limit, offset,
                   TURNS: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
                   JOINS: tl.constexpr, ACT: tl.constexpr, LIMITED: tl.constexpr, PRECISION: tl.constexpr,
                   BT: tl.constexpr, BI: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One chunk, one block of features. JOINS: the down projection has an adapter, whose A is `a`."""
    n = tl.program_id(0).to(tl.int64)
    e, start, stop = tl.load(chunks + n * 3).to(tl.int64), tl.load(chunks + n * 3 + 1), tl.load(chunks + n * 3 + 2)
    if start >= stop:
        return
    r = tl.arange(0, BR)
    first = tl.program_id(1) * BI
    i = first + tl.arange(0, BI)
    dtype = z.dtype.element_ty
    O = 2 * I
    # Of columns in turns there is one block, twice as wide; else the second is up's.
    WIDTH: tl.constexpr = 2 * BI if TURNS else BI
    o1 = (2 * first if TURNS else first) + tl.arange(0, WIDTH)
    in1 = o1 < O if TURNS else o1 < I
    o2 = I + i
    xa_tile = tl.zeros((BT, BR), dtype)
    if JOINS:
        at = a + (e * RA + r[:, None]) * I + i[None, :]
        a_tile = tl.load(at, mask=(r[:, None] < RA) & (i[None, :] < I), other=0.0).to(dtype)
        da_sum = tl.zeros((BI, BR), tl.float32)
    if LOW:
        b1_tile = load_scaled_b(b + e * O * R, o1, r, O, R, R, 1, scale, dtype)
        db1_sum = tl.zeros((WIDTH, BR), tl.float32)
        if not TURNS:
            b2_tile = load_scaled_b(b + e * O * R, o2, r, O, R, R, 1, scale, dtype)
            db2_sum = tl.zeros((WIDTH, BR), tl.float32)
    if SCALED:
        g1 = tl.load(g + e * O + o1, mask=in1, other=0.0)
        dg1_sum = tl.zeros((BT, WIDTH), tl.float32)
        if not TURNS:
            g2 = tl.load(g + e * O + o2, mask=i < I, other=0.0)
            dg2_sum = tl.zeros((BT, WIDTH), tl.float32)
    if BIASED:
        bias1 = tl.load(bias + e * O + o1, mask=in1, other=0.0).to(tl.float32)
        if not TURNS:
            bias2 = tl.load(bias + e * O + o2, mask=i < I, other=0.0).to(tl.float32)
    for begin in tl.range(start, stop, BT, num_stages=STAGES):
        t = begin + tl.arange(0, BT)
        wide = t.to(tl.int64)
        there = t[:, None] < stop
        choice = tl.load(order + t, mask=t < stop, other=0)
        weight = tl.load(weights + choice, mask=t < stop, other=0.0).to(tl.float32)
        d = tl.load(dh + wide[:, None] * I + i[None, :], mask=there & (i[None, :] < I), other=0.0).to(tl.float32)
        v1 = tl.load(z + wide[:, None] * O + o1[None, :], mask=there & in1[None, :], other=0.0).to(tl.float32)
        if not TURNS:
            v2 = tl.load(z + wide[:, None] * O + o2[None, :], mask=there & (i[None, :] < I), other=0.0).to(tl.float32)
        if LOW:
            xa_tile = tl.load(xa + wide[:, None] * R + r[None, :], mask=there & (r[None, :] < R), other=0.0)
            v1 += product(xa_tile, tl.trans(b1_tile), PRECISION)
            if not TURNS:
                v2 += product(xa_tile, tl.trans(b2_tile), PRECISION)
        if JOINS:
            low_tile = tl.load(low + wide[:, None] * RA + r[None, :], mask=there & (r[None, :] < RA), other=0.0)
            d += product(low_tile, a_tile, PRECISION)
        y1 = v1
        if SCALED:
            y1 = y1 * g1[None, :]
        if BIASED:
            y1 = y1 + bias1[None, :]
        if TURNS:
            gate, up = tl.split(tl.reshape(y1, (BT, BI, 2)))
        else:
            gate, up = y1, v2
            if SCALED:
                up = up * g2[None, :]
            if BIASED:
                up = up + bias2[None, :]
        h, by_gate, by_up = _through(gate, up, alpha, limit, offset, ACT, LIMITED)
        # Columns and rows that are not there have d = 0.
        tl.store(dw + tl.program_id(1).to(tl.int64) * S + t, tl.sum(h * d, axis=1), mask=t < stop)
        d *= weight[:, None]
        if JOINS:
            low_tile = (low_tile.to(tl.float32) * weight[:, None]).to(dtype)
            da_sum += product(tl.trans(h.to(dtype)), low_tile, PRECISION)
        if TURNS:
            d1 = tl.reshape(tl.join(d * by_gate, d * by_up), (BT, WIDTH))
        else:
            d1 = d * by_gate
            d2 = d * by_up
        if SCALED:
            dg1_sum += d1 * v1
            d1 = d1 * g1[None, :]
            if not TURNS:
                dg2_sum += d2 * v2
                d2 = d2 * g2[None, :]
        d1_tile = d1.to(dtype)
        tl.store(dz + wide[:, None] * O + o1[None, :], d1_tile, mask=there & in1[None, :])
        if not TURNS:
            d2_tile = d2.to(dtype)
            tl.store(dz + wide[:, None] * O + o2[None, :], d2_tile, mask=there & (i[None, :] < I))
        if LOW:
            db1_sum += product(tl.trans(d1_tile), xa_tile, PRECISION)
            if not TURNS:
                db2_sum += product(tl.trans(d2_tile), xa_tile, PRECISION)
    if LOW:
        to = db_parts + n * O * R
        tl.store(to + o1[:, None] * R + r[None, :], db1_sum, mask=in1[:, None] & (r[None, :] < R))
        if not TURNS:
            tl.store(to + o2[:, None] * R + r[None, :], db2_sum, mask=(i[:, None] < I) & (r[None, :] < R))
    if SCALED:
        tl.store(dg_parts + n * O + o1, tl.sum(dg1_sum, axis=0), mask=in1)
        if not TURNS:
            tl.store(dg_parts + n * O + o2, tl.sum(dg2_sum, axis=0), mask=i < I)
    if JOINS:
        at = da_parts + n * RA * I + i[:, None] + r[None, :] * I
        tl.store(at, da_sum, mask=(i[:, None] < I) & (r[None, :] < RA))


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
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """(dz (S, O), dw (S,) float32, and for `sum_chunks` those of dB / s (N, O, R), dg (N, O) and dA (N, R, I)).

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
    """
    chosen, features = dh_SI.shape
    count = len(rows.chunks_N3)
    rank, rank_a = (1 if t is None else t.shape[at] for t, at in ((b_EOR, 2), (a_ERI, 1)))
    wide = {"dtype": torch.float32, "device": dh_SI.device}
    dz = torch.empty_like(z_SO)
    db = None if b_EOR is None else torch.empty(count, 2 * features, rank, **wide)
    dg = None if g_EO is None else torch.empty(count, 2 * features, **wide)
    da = None if a_ERI is None else torch.empty(count, rank_a, features, **wide)
    br = rank_block(max(rank, rank_a))
    block = _features(features, 32 if form.in_turns or br >= 64 else 64)
    blocks = triton.cdiv(features, block)
    dw = torch.zeros(blocks, chosen, **wide)
    _gate_backward[(count, blocks)](
        dh_SI, low_SR, None if a_ERI is None else a_ERI.contiguous(), weights_TK, z_SO, xa_SR,
        None if b_EOR is None else b_EOR.contiguous(), g_EO, bias_EO, dz, dw, db, dg, da, rows.order_S,
        rows.chunks_N3, chosen, features, rank, rank_a, scale, form.alpha, form.limit, form.offset,
        TURNS=form.in_turns, LOW=b_EOR is not None, SCALED=g_EO is not None, BIASED=bias_EO is not None,
        JOINS=a_ERI is not None, ACT=form.activation, LIMITED=form.limited, PRECISION=precision(dh_SI.dtype),
        BT=16 if br < 32 else 32, BI=block, BR=br, STAGES=3, num_warps=4, num_stages=3,
    )  # fmt: skip
    return dz, dw.sum(0), db, dg, da


def _features(features: int, most: int) -> int:
    """Features of a block: no more than there are."""
    return min(max(16, triton.next_power_of_2(features)), most)
