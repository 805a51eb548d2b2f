"""`theodora.kernels.gated` in Triton: the middle of a gated MLP with adapters on all its products, in one pass."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.parts import Update
from theodora.kernels.triton.common import (
    chunks_of_tokens,
    fitting,
    load_scaled_b,
    load_xa,
    precision,
    product,
    rank_block,
    row_contiguous,
    row_scale,
    sum_chunks,
    sum_rows,
)

# (tokens, features, warps, stages) of a program, by padded rank; measured on an H100. Small tiles and three stages,
# which load what comes next while one computes: with two, most of the time goes into waiting for memory.
_FORWARD = {16: (32, 64, 4, 3), 32: (32, 64, 4, 3), 64: (16, 64, 4, 3), 128: (32, 128, 4, 2)}
_BACKWARD = {16: (16, 64, 4, 3), 32: (32, 64, 4, 3), 64: (16, 32, 2, 3), 128: (16, 64, 4, 3)}
_FORWARD_PROGRAMS, _BACKWARD_PROGRAMS = 2112, 1568
REDUCES = 64
"""Padded ranks up to which the backward kernel also makes dB and dA; beyond it, products of their own do."""


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activation and its derivative, float32."""
    if ACT == "silu":
        s = 1 / (1 + tl.exp(-x))
        return x * s, s + x * s * (1 - s)
    elif ACT == "gelu_tanh":
        # tanh(u) = 2·sigmoid(2u) − 1, which does not overflow
        u = 0.7978845608028654 * (x + 0.044715 * x * x * x)
        th = 2 / (1 + tl.exp(-2 * u)) - 1
        slope = 0.7978845608028654 * (1 + 0.134145 * x * x)
        return 0.5 * x * (1 + th), 0.5 * (1 + th) + 0.5 * x * (1 - th * th) * slope
    elif ACT == "gelu":
        phi = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
        return x * phi, phi + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    else:
        tl.static_assert(ACT == "relu")
        return tl.maximum(x, 0.0), (x > 0).to(tl.float32)


@triton.jit(do_not_specialize=["T", "CHUNK"])
def _gated(z1, z2, xa1, xa2, b1, b2, m1, m2, n1, n2, bias1, bias2, act, T, O, R1, R2, CHUNK,
           z1_row, z2_row, xa1_row, xa2_row, b1_row, b1_col, b2_row, b2_col, scale1, scale2,
           LOW1: tl.constexpr, LOW2: tl.constexpr, SCALED1: tl.constexpr, SCALED2: tl.constexpr,
           BIASED1: tl.constexpr, BIASED2: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
           BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One block of features over one chunk of tokens."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    o = block * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    dtype = z1.dtype.element_ty
    if LOW1:
        b1_tile = load_scaled_b(b1, o, r, O, R1, b1_row, b1_col, scale1, dtype)
    if LOW2:
        b2_tile = load_scaled_b(b2, o, r, O, R2, b2_row, b2_col, scale2, dtype)
    if SCALED1:
        g1 = row_scale(m1, n1, o, o < O)
    if SCALED2:
        g2 = row_scale(m2, n2, o, o < O)
    if BIASED1:
        bias1_tile = tl.load(bias1 + o, mask=o < O, other=0.0).to(tl.float32)
    if BIASED2:
        bias2_tile = tl.load(bias2 + o, mask=o < O, other=0.0).to(tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BT, num_stages=STAGES):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t[:, None] < T) & (o[None, :] < O)
        gate = tl.load(z1 + t[:, None] * z1_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(z2 + t[:, None] * z2_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            gate += product(load_xa(xa1, t, r, T, R1, xa1_row), tl.trans(b1_tile), PRECISION)
        if LOW2:
            up += product(load_xa(xa2, t, r, T, R2, xa2_row), tl.trans(b2_tile), PRECISION)
        if SCALED1:
            gate *= g1[None, :]
        if SCALED2:
            up *= g2[None, :]
        if BIASED1:
            gate += bias1_tile[None, :]
        if BIASED2:
            up += bias2_tile[None, :]
        value, _ = activate(gate, ACT)
        tl.store(act + t[:, None] * O + o[None, :], (value * up).to(dtype), mask=inside)


def gated(z1: Tensor, z2: Tensor, gate: Update, up: Update, activation: str) -> Tensor:
    """act(gate) ⊙ up, (T, O)."""
    z1, z2 = row_contiguous(z1), row_contiguous(z2)
    tokens, outputs = z1.shape
    act = torch.empty(tokens, outputs, dtype=z1.dtype, device=z1.device)
    block = rank_block(max(gate.rank, up.rank))
    bt, bo, warps, stages = fitting(_FORWARD[block], z1.dtype)
    blocks = triton.cdiv(outputs, bo)
    chunks, size = chunks_of_tokens(tokens, blocks, bt, _FORWARD_PROGRAMS)
    _gated[(blocks, chunks)](
        z1, z2, gate.xa_TR, up.xa_TR, gate.b_OR, up.b_OR, gate.magnitude_O, up.magnitude_O, gate.norm_O, up.norm_O,
        gate.bias_O, up.bias_O, act, tokens, outputs, gate.rank, up.rank, size,
        z1.stride(0), z2.stride(0), *_low_strides(gate)[:1], *_low_strides(up)[:1],
        *_low_strides(gate)[1:], *_low_strides(up)[1:], gate.scale, up.scale,
        LOW1=gate.low, LOW2=up.low, SCALED1=gate.scaled, SCALED2=up.scaled,
        BIASED1=gate.bias_O is not None, BIASED2=up.bias_O is not None, ACT=activation,
        PRECISION=precision(z1.dtype), BT=bt, BO=bo, BR=block, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return act


def _low_strides(update: Update) -> tuple[int, int, int]:
    """Row stride of xa, row and column stride of B."""
    if update.xa_TR is None or update.b_OR is None:
        return 0, 0, 0
    return update.xa_TR.stride(0), update.b_OR.stride(0), update.b_OR.stride(1)


@triton.jit(do_not_specialize=["T", "CHUNK"])
def _gated_backward(dact, low, a, z1, z2, xa1, xa2, b1, b2, m1, m2, n1, n2, bias1, bias2,
                    dz1, dz2, act, db1, db2, da, dg1, dg2, T, O, R1, R2, R3, CHUNK,
                    dact_row, low_row, a_row, z1_row, z2_row, dz1_row, dz2_row, xa1_row, xa2_row,
                    b1_row, b1_col, b2_row, b2_col, scale1, scale2,
                    LOW1: tl.constexpr, LOW2: tl.constexpr, LOW3: tl.constexpr, JOINS: tl.constexpr,
                    SCALED1: tl.constexpr, SCALED2: tl.constexpr, BIASED1: tl.constexpr, BIASED2: tl.constexpr,
                    KEEP_ACT: tl.constexpr, REDUCE: tl.constexpr, ACT: tl.constexpr, PRECISION: tl.constexpr,
                    BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """One block of features over one chunk of tokens. 1 is the gate, 2 the up and 3 the down projection."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    o = block * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    dtype = z1.dtype.element_ty
    if LOW1:
        b1_tile = load_scaled_b(b1, o, r, O, R1, b1_row, b1_col, scale1, dtype)
    if LOW2:
        b2_tile = load_scaled_b(b2, o, r, O, R2, b2_row, b2_col, scale2, dtype)
    if JOINS:
        a_tile = tl.load(a + r[:, None] * a_row + o[None, :], mask=(r[:, None] < R3) & (o[None, :] < O), other=0.0).to(
            dtype
        )
    if SCALED1:
        g1 = row_scale(m1, n1, o, o < O)
    if SCALED2:
        g2 = row_scale(m2, n2, o, o < O)
    if BIASED1:
        bias1_tile = tl.load(bias1 + o, mask=o < O, other=0.0).to(tl.float32)
    if BIASED2:
        bias2_tile = tl.load(bias2 + o, mask=o < O, other=0.0).to(tl.float32)
    db1_sum = tl.zeros((BO, BR), tl.float32)
    db2_sum = tl.zeros((BO, BR), tl.float32)
    da_sum = tl.zeros((BO, BR), tl.float32)
    # Summed over the tokens of a tile after the loop: within it the threads would wait for one another each time.
    dg1_sum = tl.zeros((BT, BO), tl.float32)
    dg2_sum = tl.zeros((BT, BO), tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BT, num_stages=STAGES):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t[:, None] < T) & (o[None, :] < O)
        gate = tl.load(z1 + t[:, None] * z1_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        up = tl.load(z2 + t[:, None] * z2_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        dh = tl.load(dact + t[:, None] * dact_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if LOW1:
            xa1_tile = load_xa(xa1, t, r, T, R1, xa1_row)
            gate += product(xa1_tile, tl.trans(b1_tile), PRECISION)
        if LOW2:
            xa2_tile = load_xa(xa2, t, r, T, R2, xa2_row)
            up += product(xa2_tile, tl.trans(b2_tile), PRECISION)
        if LOW3:
            low_tile = load_xa(low, t, r, T, R3, low_row)
        if JOINS:
            dh += product(low_tile, a_tile, PRECISION)
        v1, v2 = gate, up
        if SCALED1:
            gate *= g1[None, :]
        if SCALED2:
            up *= g2[None, :]
        if BIASED1:
            gate += bias1_tile[None, :]
        if BIASED2:
            up += bias2_tile[None, :]
        value, slope = activate(gate, ACT)
        d1 = dh * up * slope
        d2 = dh * value
        if KEEP_ACT or (LOW3 and REDUCE):
            h = (value * up).to(dtype)
            if KEEP_ACT:
                tl.store(act + t[:, None] * O + o[None, :], h, mask=inside)
            if LOW3 and REDUCE:
                da_sum += product(tl.trans(h), low_tile, PRECISION)
        if SCALED1:
            dg1_sum += d1 * v1
            d1 *= g1[None, :]
        if SCALED2:
            dg2_sum += d2 * v2
            d2 *= g2[None, :]
        d1_tile, d2_tile = d1.to(dtype), d2.to(dtype)
        tl.store(dz1 + t[:, None] * dz1_row + o[None, :], d1_tile, mask=inside)
        tl.store(dz2 + t[:, None] * dz2_row + o[None, :], d2_tile, mask=inside)
        if LOW1 and REDUCE:
            db1_sum += product(tl.trans(d1_tile), xa1_tile, PRECISION)
        if LOW2 and REDUCE:
            db2_sum += product(tl.trans(d2_tile), xa2_tile, PRECISION)
    row = chunk * O + o[:, None]
    if LOW1 and REDUCE:
        tl.store(db1 + row * R1 + r[None, :], db1_sum, mask=(o[:, None] < O) & (r[None, :] < R1))
    if LOW2 and REDUCE:
        tl.store(db2 + row * R2 + r[None, :], db2_sum, mask=(o[:, None] < O) & (r[None, :] < R2))
    if LOW3 and REDUCE:
        tl.store(da + row * R3 + r[None, :], da_sum, mask=(o[:, None] < O) & (r[None, :] < R3))
    if SCALED1:
        tl.store(dg1 + chunk * O + o, tl.sum(dg1_sum, axis=0), mask=o < O)
    if SCALED2:
        tl.store(dg2 + chunk * O + o, tl.sum(dg2_sum, axis=0), mask=o < O)


def gated_backward(
    dact: Tensor,
    low: Tensor | None,
    a: Tensor | None,
    z1: Tensor,
    z2: Tensor,
    gate: Update,
    up: Update,
    activation: str,
    dz1: Tensor,
    dz2: Tensor,
    keep_act: bool,
) -> tuple[Tensor, ...]:
    """(act, dB1, dm1, dB2, dm2, dA3) as in `gated_backward_reference`; writes dz1 and dz2."""
    dact, z1, z2 = row_contiguous(dact), row_contiguous(z1), row_contiguous(z2)
    tokens, outputs = dact.shape
    rank3 = 0 if low is None else low.shape[1]
    block = rank_block(max(gate.rank, up.rank, rank3))
    bt, bo, warps, stages = fitting(_BACKWARD[block], dact.dtype)
    reduce = block <= REDUCES
    wants_act, keep_act = keep_act, keep_act or (low is not None and not reduce)
    blocks = triton.cdiv(outputs, bo)
    chunks, size = chunks_of_tokens(tokens, blocks, bt, _BACKWARD_PROGRAMS)
    wide = {"dtype": torch.float32, "device": dact.device}
    act = torch.empty(tokens, outputs, dtype=dact.dtype, device=dact.device) if keep_act else dact.new_empty(0)
    db1, db2 = (torch.empty(chunks, outputs, u.rank, **wide) if u.low and reduce else None for u in (gate, up))
    dg1, dg2 = (torch.empty(chunks, outputs, **wide) if u.scaled else None for u in (gate, up))
    da = torch.empty(chunks, outputs, rank3, **wide) if rank3 and reduce else None
    _gated_backward[(blocks, chunks)](
        dact, low, a, z1, z2, gate.xa_TR, up.xa_TR, gate.b_OR, up.b_OR, gate.magnitude_O, up.magnitude_O,
        gate.norm_O, up.norm_O, gate.bias_O, up.bias_O, dz1, dz2, act, db1, db2, da, dg1, dg2,
        tokens, outputs, gate.rank, up.rank, rank3, size,
        dact.stride(0), 0 if low is None else low.stride(0), 0 if a is None else a.stride(0),
        z1.stride(0), z2.stride(0), dz1.stride(0), dz2.stride(0), *_low_strides(gate)[:1], *_low_strides(up)[:1],
        *_low_strides(gate)[1:], *_low_strides(up)[1:], gate.scale, up.scale,
        LOW1=gate.low, LOW2=up.low, LOW3=low is not None, JOINS=a is not None, SCALED1=gate.scaled, SCALED2=up.scaled,
        BIASED1=gate.bias_O is not None, BIASED2=up.bias_O is not None, KEEP_ACT=keep_act, REDUCE=reduce,
        ACT=activation, PRECISION=precision(dact.dtype), BT=bt, BO=bo, BR=block, STAGES=stages,
        num_warps=warps, num_stages=stages,
    )  # fmt: skip
    results = [act if wants_act else _empty(dact)]
    for update, dz, db, dg in ((gate, dz1, db1, dg1), (up, dz2, db2, dg2)):
        rows = sum_rows(db, dg, update.norm_O, update.scale) if db is not None or dg is not None else None
        rows = rows or (_empty(dact), _empty(dact))
        large = update.xa_TR is not None and not reduce
        results += (dz.T @ update.xa_TR).float() * update.scale if large else rows[0], rows[1]
    if low is not None and not reduce:
        results.append((low.T @ act).float())
    else:
        results.append(_empty(dact) if da is None else sum_chunks(da, da.new_empty(da.shape[1:])).T.contiguous())
    return tuple(results)


def _empty(like: Tensor) -> Tensor:
    """One for each output that does not exist: those of an operator must not alias."""
    return like.new_empty(0)
