"""`theodora.kernels.compose` in Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.packed import Packed
from theodora.kernels.parts import LEAST_SCALE
from theodora.kernels.triton.common import (
    chunks_of_tokens,
    fitting,
    load_scaled_b,
    load_xa,
    precision,
    product,
    rank_block,
    rounded_b,
    row_contiguous,
    row_scale,
    sum_rows,
)
from theodora.kernels.triton.packed import UNPACKED, argument, constants, load_packed

# (tokens, features, warps, stages) of a program, by padded rank; measured on an H100 and, at rank 16, on an H200.
_FORWARD = {16: (16, 128, 4, 3), 32: (16, 128, 4, 3), 64: (32, 64, 4, 3), 128: (32, 64, 4, 2)}
_BACKWARD = {16: (16, 128, 4, 3), 32: (16, 128, 4, 3), 64: (64, 64, 8, 3), 128: (32, 128, 8, 3)}
_BACKWARD_FROM_OUTPUT = {**_BACKWARD, 16: (32, 64, 4, 3), 32: (32, 64, 4, 3)}
_PROGRAMS = {"forward": 1056, "backward": 528, "from output": 384}
"""How many share the work."""
_LEAST_SCALE = tl.constexpr(LEAST_SCALE)
REDUCES = 64
"""Padded ranks up to which the backward kernel also makes dB; beyond it, a product of its own is faster."""


@triton.jit(do_not_specialize=["T", "CHUNK"])
def _compose(z, other1, other2, xa, b, magnitude, norm, bias, residual, y, T, O, R, CHUNK,
             z_row, row1, row2, xa_row, b_row, b_col, residual_row, y_row, scale,
             OTHERS: tl.constexpr, LOW: tl.constexpr, SCALED: tl.constexpr, BIASED: tl.constexpr,
             ONTO: tl.constexpr, PRECISION: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
             STAGES: tl.constexpr):  # fmt: skip
    """One block of output features over one chunk of tokens."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    o = block * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    if LOW:
        b_tile = load_scaled_b(b, o, r, O, R, b_row, b_col, scale, z.dtype.element_ty)
    if SCALED:
        g = row_scale(magnitude, norm, o, o < O)
    if BIASED:
        bias_tile = tl.load(bias + o, mask=o < O, other=0.0).to(tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BT, num_stages=STAGES):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t[:, None] < T) & (o[None, :] < O)
        v = tl.load(z + t[:, None] * z_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if OTHERS > 0:
            v += tl.load(other1 + t[:, None] * row1 + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if OTHERS > 1:
            v += tl.load(other2 + t[:, None] * row2 + o[None, :], mask=inside, other=0.0).to(tl.float32)
        if LOW:
            v += product(load_xa(xa, t, r, T, R, xa_row), tl.trans(b_tile), PRECISION)
        if SCALED:
            v *= g[None, :]
        if BIASED:
            v += bias_tile[None, :]
        if ONTO:  # y is rounded first, as where it is written and added afterwards
            v = v.to(y.dtype.element_ty).to(tl.float32)
            v += tl.load(residual + t[:, None] * residual_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(y + t[:, None] * y_row + o[None, :], v.to(y.dtype.element_ty), mask=inside)


def compose(
    z: Tensor,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    y: Tensor,
    others: Sequence[Tensor] = (),
    residual: Tensor | None = None,
) -> Tensor:
    """Write g ⊙ (z + Σ others + s·xa Bᵀ) + bias into y, which may be z itself; rounded, and added to the residual."""
    z = row_contiguous(z)
    if residual is not None:
        residual = row_contiguous(residual)
    for other in others[2:]:
        z = z + other
    other1, other2 = [*(row_contiguous(other) for other in others[:2]), None, None][:2]
    low = xa is not None and b is not None
    if low:
        xa = row_contiguous(xa)
    tokens, outputs = z.shape
    rank = b.shape[1] if low else 1
    block = rank_block(rank)
    bt, bo, warps, stages = fitting(_FORWARD[block], z.dtype)
    blocks = triton.cdiv(outputs, bo)
    chunks, size = chunks_of_tokens(tokens, blocks, bt, _PROGRAMS["forward"])
    _compose[(blocks, chunks)](
        z, other1, other2, xa, b, magnitude, norm, bias, residual, y, tokens, outputs, rank, size,
        z.stride(0), _row(other1), _row(other2), _row(xa), b.stride(0) if low else 0, b.stride(1) if low else 0,
        _row(residual), y.stride(0), scale, OTHERS=min(len(others), 2), LOW=low, SCALED=norm is not None,
        BIASED=bias is not None, ONTO=residual is not None, PRECISION=precision(z.dtype),
        BT=bt, BO=bo, BR=block, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return y


def _row(tensor: Tensor | None) -> int:
    """From one row to the next."""
    return 0 if tensor is None else tensor.stride(0)


@triton.jit(do_not_specialize=["T", "CHUNK"])
def _compose_backward(dy, z, xa, b, magnitude, norm, dz, db_parts, dg_parts, T, O, R, CHUNK,
                      dy_row, z_row, xa_row, b_row, b_col, dz_row, scale,
                      LOW: tl.constexpr, SCALED: tl.constexpr, OUTPUT: tl.constexpr, REDUCE: tl.constexpr,
                      PRECISION: tl.constexpr, BT: tl.constexpr, BO: tl.constexpr, BR: tl.constexpr,
                      STAGES: tl.constexpr):  # fmt: skip
    """One block of output features over one chunk of tokens; its shares of dB and dm are added up afterwards."""
    block, chunk = tl.program_id(0), tl.program_id(1)
    o = block * BO + tl.arange(0, BO)
    r = tl.arange(0, BR)
    dtype = dy.dtype.element_ty
    if LOW:
        b_tile = load_scaled_b(b, o, r, O, R, b_row, b_col, scale, dtype)
    if SCALED:
        g = row_scale(magnitude, norm, o, o < O)
    if OUTPUT:  # z holds y
        small = tl.abs(g) < _LEAST_SCALE
        inverse = tl.where(small, 0.0, 1.0 / tl.where(small, 1.0, g))
    db_sum = tl.zeros((BO, BR), tl.float32)
    # Summed over the tokens of a tile after the loop: within it the threads would wait for one another each time.
    dg_sum = tl.zeros((BT, BO), tl.float32)
    for start in tl.range(chunk * CHUNK, tl.minimum(chunk * CHUNK + CHUNK, T), BT, num_stages=STAGES):
        t = (start + tl.arange(0, BT)).to(tl.int64)
        inside = (t[:, None] < T) & (o[None, :] < O)
        dy_tile = tl.load(dy + t[:, None] * dy_row + o[None, :], mask=inside, other=0.0)
        dz_tile = dy_tile
        if LOW:
            xa_tile = load_xa(xa, t, r, T, R, xa_row)
        if SCALED:
            v = tl.load(z + t[:, None] * z_row + o[None, :], mask=inside, other=0.0).to(tl.float32)
            if OUTPUT:
                v *= inverse[None, :]
            elif LOW:
                v += product(xa_tile, tl.trans(b_tile), PRECISION)
            wide = dy_tile.to(tl.float32)
            dg_sum += wide * v
            dz_tile = (wide * g[None, :]).to(dtype)
            tl.store(dz + t[:, None] * dz_row + o[None, :], dz_tile, mask=inside)
        if REDUCE:
            db_sum += product(tl.trans(dz_tile), xa_tile, PRECISION)
    if REDUCE:
        at = (chunk * O + o[:, None]) * R + r[None, :]
        tl.store(db_parts + at, db_sum, mask=(o[:, None] < O) & (r[None, :] < R))
    if SCALED:
        tl.store(dg_parts + chunk * O + o, tl.sum(dg_sum, axis=0), mask=o < O)


def compose_backward(
    dy: Tensor,
    z: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dzb, dB, dm) as in `compose_backward_reference`."""
    dy, scaled = row_contiguous(dy), norm is not None
    dz = torch.empty_like(dy, memory_format=torch.contiguous_format) if scaled else dy.new_empty(0)
    db, dm = compose_backward_into(dy, z, xa, b, scale, magnitude, norm, dz)
    if xa is None or b is None:
        return dz, dy.new_empty(0), db, dm
    # A product of its own reads dz again, and is still faster than one whose shares cross all programs.
    return dz, (dz if scaled else dy) @ rounded_b(b, scale, dy.dtype), db, dm


def compose_backward_into(
    dy: Tensor,
    z: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
    dz: Tensor,
    from_output: bool = False,
) -> tuple[Tensor, Tensor]:
    """(dB, dm) as in `compose_backward_reference`; dz goes where it is told to.

    With `from_output`, z is the output, as in `compose_backward_from_output_reference`.
    """
    dy = row_contiguous(dy)
    low, scaled = xa is not None and b is not None, norm is not None
    tokens, outputs = dy.shape
    rank = b.shape[1] if low else 1
    block = rank_block(rank)
    bt, bo, warps, stages = fitting((_BACKWARD_FROM_OUTPUT if from_output else _BACKWARD)[block], dy.dtype)
    blocks = triton.cdiv(outputs, bo)
    chunks, size = chunks_of_tokens(tokens, blocks, bt, _PROGRAMS["from output" if from_output else "backward"])
    if z is not None:
        z = row_contiguous(z)
    if low:
        xa = row_contiguous(xa)
    wide = {"dtype": torch.float32, "device": dy.device}
    reduce = low and block <= REDUCES
    db_parts = torch.empty(chunks, outputs, rank, **wide) if reduce else None
    dg_parts = torch.empty(chunks, outputs, **wide) if scaled else None
    _compose_backward[(blocks, chunks)](
        dy, z, xa, b, magnitude, norm, dz, db_parts, dg_parts, tokens, outputs, rank, size,
        dy.stride(0), _row(z), _row(xa), b.stride(0) if low else 0, b.stride(1) if low else 0, dz.stride(0), scale,
        LOW=low, SCALED=scaled, OUTPUT=from_output, REDUCE=reduce, PRECISION=precision(dy.dtype),
        BT=bt, BO=bo, BR=block, STAGES=stages, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    db, dm = sum_rows(db_parts, dg_parts, norm, scale) if reduce or scaled else (dy.new_empty(0), dy.new_empty(0))
    if low and not reduce:
        db = ((dz if scaled else dy).T @ xa).float() * scale
    return db, dm


@triton.jit(do_not_specialize=["T"])
def _zero_scale_gradient(dm, dy, h, rstd, weight, w, xa, b, magnitude, norm, T, O, I, R,
                         dy_row, h_row, w_row, xa_row, b_row, b_col, scale,
                         NORMED: tl.constexpr, ROWS: tl.constexpr, BT: tl.constexpr, BI: tl.constexpr,
                         BR: tl.constexpr, BITS: tl.constexpr, BLOCK: tl.constexpr, NESTED: tl.constexpr,
                         DTYPE: tl.constexpr):  # fmt: skip
    """Some output rows, whose program ends at once unless a scale among them is zero: there are hardly ever any."""
    first_row = tl.program_id(0) * ROWS
    rows = first_row + tl.arange(0, ROWS)
    ns = tl.load(norm + rows, mask=rows < O, other=0.0).to(tl.float32)
    ms = tl.load(magnitude + rows, mask=rows < O, other=0.0).to(tl.float32)
    if tl.max(((ns != 0) & (tl.abs(ms) < _LEAST_SCALE * ns)).to(tl.int32), axis=0) > 0:
        for row in range(first_row, tl.minimum(first_row + ROWS, O)):
            n = tl.load(norm + row).to(tl.float32)
            m = tl.load(magnitude + row).to(tl.float32)
            if n != 0 and tl.abs(m) < _LEAST_SCALE * n:
                total = 0.0
                r = tl.arange(0, BR)
                b_tile = tl.load(b + row * b_row + r * b_col, mask=r < R, other=0.0).to(tl.float32) * scale
                for first in range(0, I, BI):
                    i = first + tl.arange(0, BI)
                    if BITS > 0:
                        own = row + tl.arange(0, 1)
                        w_tile = load_packed(w, own, first, O, I, BITS, BLOCK, NESTED, DTYPE, 1, BI).reshape(BI)
                        w_tile = w_tile.to(tl.float32)
                    else:
                        w_at = w + tl.cast(row, tl.int64) * w_row + i
                        w_tile = tl.load(w_at, mask=i < I, other=0.0).to(tl.float32)
                    if NORMED:
                        w_tile *= tl.load(weight + i, mask=i < I, other=0.0).to(tl.float32)
                    for start in range(0, T, BT):
                        t = (start + tl.arange(0, BT)).to(tl.int64)
                        share = tl.load(dy + t * dy_row + row, mask=t < T, other=0.0).to(tl.float32)
                        inside = (t[:, None] < T) & (i[None, :] < I)
                        tile = tl.load(h + t[:, None] * h_row + i[None, :], mask=inside, other=0.0).to(tl.float32)
                        z = tl.sum(tile * w_tile[None, :], axis=1)
                        if NORMED:
                            z *= tl.load(rstd + t, mask=t < T, other=0.0).to(tl.float32)
                        if first == 0:
                            z += tl.sum(load_xa(xa, t, r, T, R, xa_row).to(tl.float32) * b_tile[None, :], axis=1)
                        total += tl.sum(share * z, axis=0)
                tl.store(dm + row, (total / n).to(dm.dtype.element_ty))


def zero_scale_gradient(
    dm: Tensor,
    dy: Tensor,
    h: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    w: Tensor | Packed,
    xa: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
) -> None:
    """`zero_scale_gradient_reference` on the GPU, which alone knows whether there are such rows."""
    dy, h, xa = (row_contiguous(t) for t in (dy, h, xa))
    if isinstance(w, Packed):
        w_row, w_argument, form = 0, argument(w), constants(w)
    else:
        w = w_argument = row_contiguous(w)
        w_row, form = w.stride(0), UNPACKED
    tokens, inputs = h.shape
    rank = b.shape[1]
    _zero_scale_gradient[(triton.cdiv(dm.shape[0], 64),)](
        dm, dy, h, rstd, weight, w_argument, xa, b, magnitude, norm, tokens, dm.shape[0], inputs, rank,
        dy.stride(0), h.stride(0), w_row, xa.stride(0), b.stride(0), b.stride(1), scale,
        NORMED=rstd is not None, ROWS=64, BT=16, BI=256, BR=rank_block(rank), **form,
        num_warps=4, num_stages=1,
    )  # fmt: skip
