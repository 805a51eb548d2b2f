"""`theodora.kernels.rms_norm` in Triton. A program holds ROWS whole rows, padded to WIDTH, in registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit(do_not_specialize=["rows"])
def _forward(x_ptr, w_ptr, y_ptr, rstd_ptr, rows, width, eps, offset, ROUND_H: tl.constexpr,
             ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    x = tl.load(x_ptr + at, mask=inside, other=0.0)
    w = tl.load(w_ptr + column, mask=column < width, other=0.0)
    h = x.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(h * h, 1) / width + eps)
    h *= rstd[:, None]
    shifted = w.to(tl.float32) + offset
    if ROUND_H:
        h = h.to(x.dtype).to(tl.float32)
        shifted = shifted.to(w.dtype).to(tl.float32)
    y = h * shifted[None, :]
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(rstd_ptr + row, rstd, mask=row < rows)


@triton.jit(do_not_specialize=["rows"])
def _backward(dy_ptr, x_ptr, rstd_ptr, w_ptr, dx_ptr, rows, width, offset,
              ROWS: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    inside = (row < rows)[:, None] & (column < width)[None, :]
    at = row[:, None] * width + column[None, :]
    dy = tl.load(dy_ptr + at, mask=inside, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    w = tl.load(w_ptr + column, mask=column < width, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=row < rows, other=0.0)[:, None]
    h = x * rstd
    dh = dy * (w + offset)[None, :]
    mean = tl.sum(dh * h, 1)[:, None] / width
    dx = (dh - h * mean) * rstd
    tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=inside)


def _launch(x: Tensor) -> tuple[tuple[int], int, int, dict[str, int]]:
    """Grid, rows, width, and the constants of a launch."""
    width = x.shape[-1]
    rows, padded = x.numel() // width, triton.next_power_of_2(width)
    together = max(1, 2048 // padded)
    warps = min(16, max(1, together * padded // 512))  # two loads of 16 bytes for each thread, in half precision
    return (triton.cdiv(rows, together),), rows, width, {"ROWS": together, "WIDTH": padded, "num_warps": warps}


def forward(x: Tensor, weight: Tensor, y: Tensor, rstd: Tensor, eps: float, offset: float, round_h: bool) -> None:
    """Write y and rstd. All contiguous."""
    grid, rows, width, constants = _launch(x)
    _forward[grid](x, weight, y, rstd, rows, width, eps, offset, ROUND_H=round_h, **constants)


def backward(dy: Tensor, x: Tensor, rstd: Tensor, weight: Tensor, offset: float) -> Tensor:
    """The gradient of x. All contiguous."""
    dx = torch.empty_like(x)
    grid, rows, width, constants = _launch(x)
    _backward[grid](dy, x, rstd, weight, dx, rows, width, offset, **constants)
    return dx
