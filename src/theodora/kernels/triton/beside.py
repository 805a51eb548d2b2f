"""`theodora.kernels.beside` in Triton: up to three factors a launch. What belongs to one layer has its number."""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.triton.common import row_contiguous


@triton.jit
def _copy_row(a, out, row, r, I, a_row, out_row, BLOCK: tl.constexpr):
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(a + r.to(tl.int64) * a_row + i, mask=i < I, other=0.0)
    tl.store(out + row.to(tl.int64) * out_row + i, value.to(out.dtype.element_ty), mask=i < I)


@triton.jit
def _stacked_rows(a0, a1, a2, out, I, R0, R1, R2, row0, row1, row2, out_row, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    if row < R0:
        _copy_row(a0, out, row, row, I, row0, out_row, BLOCK)
    elif row < R0 + R1:
        _copy_row(a1, out, row, row - R0, I, row1, out_row, BLOCK)
    elif row < R0 + R1 + R2:
        _copy_row(a2, out, row, row - R0 - R1, I, row2, out_row, BLOCK)
    else:
        i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out + row.to(tl.int64) * out_row + i, tl.zeros((BLOCK,), out.dtype.element_ty), mask=i < I)


def stacked_rows(into: Tensor, all_a: Sequence[Tensor]) -> None:
    """Write all A, rounded, one above the other into `into`, whose rows are contiguous; zeros below them."""
    if not into.numel():
        return
    rows, inputs = into.shape
    all_a = [row_contiguous(a) for a in all_a]
    every = [*all_a, *[into] * (3 - len(all_a))]
    ranks, strides = [a.shape[0] for a in all_a], [a.stride(0) for a in all_a]
    spare = [0] * (3 - len(all_a))
    _stacked_rows[(rows, triton.cdiv(inputs, 1024))](
        *every, into, inputs, *ranks, *spare, *strides, *spare, into.stride(0), BLOCK=1024, num_warps=4
    )


@triton.jit
def _block(b, out, first_row, first_column, block, O, R, C, b_row, b_col, out_row, scale,
           BO: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    o = block * BO + tl.arange(0, BO)
    c = tl.arange(0, BC)
    r = c - first_column
    there = (o[:, None] < O) & (r[None, :] >= 0) & (r[None, :] < R)
    value = tl.load(b + o[:, None].to(tl.int64) * b_row + r[None, :] * b_col, mask=there, other=0.0).to(tl.float32)
    at = out + (first_row + o[:, None]).to(tl.int64) * out_row + c[None, :]
    tl.store(at, (value * scale).to(out.dtype.element_ty), mask=(o[:, None] < O) & (c[None, :] < C))


@triton.jit
def _diagonal(b0, b1, b2, out, O0, O1, O2, R0, R1, R2, C, row0, row1, row2, col0, col1, col2, out_row,
              scale0, scale1, scale2, COUNT: tl.constexpr, BO: tl.constexpr, BC: tl.constexpr):  # fmt: skip
    """s·B of each layer, (O, R), in its rows and columns; zeros elsewhere."""
    block = tl.program_id(0)
    blocks0, blocks1 = tl.cdiv(O0, BO), tl.cdiv(O1, BO)
    if block < blocks0:
        _block(b0, out, 0, 0, block, O0, R0, C, row0, col0, out_row, scale0, BO, BC)
    if COUNT > 1:  # noqa: SIM102 - it is known when compiling, and what is inside is not
        if (block >= blocks0) & (block < blocks0 + blocks1):
            _block(b1, out, O0, R0, block - blocks0, O1, R1, C, row1, col1, out_row, scale1, BO, BC)
    if COUNT > 2:  # noqa: SIM102
        if block >= blocks0 + blocks1:
            _block(b2, out, O0 + O1, R0 + R1, block - blocks0 - blocks1, O2, R2, C, row2, col2, out_row, scale2,
                   BO, BC)  # fmt: skip


def diagonal(into: Tensor, all_b: Sequence[Tensor], scales: Sequence[float]) -> None:
    """Write s·B of each layer, rounded once, into its rows and columns of `into`; zeros elsewhere."""
    spare = 3 - len(all_b)
    every = [*all_b, *[into] * spare]
    outputs, ranks = ([b.shape[n] for b in all_b] + [0] * spare for n in (0, 1))
    rows, columns = ([b.stride(n) for b in all_b] + [0] * spare for n in (0, 1))
    bc = triton.next_power_of_2(into.shape[1])
    bo = max(1, 4096 // bc)
    _diagonal[(sum(triton.cdiv(b.shape[0], bo) for b in all_b),)](
        *every, into, *outputs, *ranks, into.shape[1], *rows, *columns, into.stride(0),
        *map(float, scales), *[1.0] * spare, COUNT=len(all_b), BO=bo, BC=bc, num_warps=4,
    )  # fmt: skip
