"""`theodora.kernels.float8` in Triton."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from theodora.kernels.operators import interpreted
from theodora.kernels.triton.common import row_contiguous

_IN_REGISTERS = 16384  # longest row that one program holds; longer ones are read twice
_WIDENED = 8192  # values that one program widens
_TILE = 128  # rows and columns of a tile of the transpose


def quantize_rows(x_TI: Tensor, times_I: Tensor | None, smallest: float) -> tuple[Tensor, Tensor]:
    """See `float8.quantize_rows`."""
    x = row_contiguous(x_TI)
    tokens, width = x.shape
    x8, scale_T = x.new_empty(tokens, width, dtype=torch.float8_e4m3fn), x.new_empty(tokens, dtype=torch.float32)
    if not x.numel():
        return x8, scale_T.fill_(1)
    block = min(triton.next_power_of_2(width), _IN_REGISTERS)
    # With a factor for each column a program takes several rows, and reads the factors once.
    rows = 1 if times_I is None or tokens < 1024 else 4
    kernel: Any = _quantize_rows if width <= block else _quantize_long_rows
    times = x if times_I is None else times_I.contiguous()
    kernel[(triton.cdiv(tokens, rows),)](
        x,
        times,
        x8,
        scale_T,
        tokens,
        width,
        x.stride(0),
        smallest,
        TIMES=times_I is not None,
        ROWS=rows,
        ROUND=interpreted(),
        BLOCK=block,
        num_warps=max(1, min(16, block // 1024)),
    )
    return x8, scale_T


def transpose(w8_OI: Tensor) -> Tensor:
    """See `float8.transpose`; both sizes multiples of 4, the rows contiguous."""
    rows, columns = w8_OI.shape
    w8_IO = w8_OI.new_empty(columns, rows)
    kernel: Any = _transpose
    grid = (triton.cdiv(rows, _TILE), triton.cdiv(columns, _TILE))
    kernel[grid](
        w8_OI.view(torch.int32), w8_IO.view(torch.int32), rows // 4, columns // 4, WORDS=_TILE // 4, num_warps=4
    )
    return w8_IO


def widen(w8: Tensor) -> Tensor:
    """W8 as bfloat16, which holds it exactly: torch's own conversion moves a third of the bytes a second."""
    wide = torch.empty_like(w8, dtype=torch.bfloat16)  # of the same strides, where those leave no gaps
    if wide.stride() != w8.stride():
        return wide.copy_(w8)
    kernel: Any = _widen
    kernel[(triton.cdiv(w8.numel(), _WIDENED),)](w8, wide, w8.numel(), BLOCK=_WIDENED, num_warps=8)
    return wide


@triton.jit
def _widen(w8_ptr, wide_ptr, numel, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    w = tl.load(w8_ptr + at, mask=at < numel, other=0.0)
    # The GPU converts e4m3 to float16, which holds it exactly, too.
    tl.store(wide_ptr + at, w.to(tl.float16).to(tl.float32).to(tl.bfloat16), mask=at < numel)


@triton.jit
def _scale(largest_bits, smallest):
    """The scale of a row, and its reciprocal, from the largest bit pattern of its absolute values."""
    # As whole numbers, the bits of NaN are above those of infinity, and those above all others: NaN is not lost.
    largest = largest_bits.to(tl.float32, bitcast=True)
    scale = tl.where(largest < smallest, 1.0, tl.div_rn(largest, 448.0))
    return scale, tl.div_rn(1.0, scale)


@triton.jit
def _to_e4m3(x, ROUND: tl.constexpr):
    """x, at most 448, to the nearest e4m3, ties to even."""
    if ROUND:  # Triton's interpreter rounds wrongly: give it numbers that need no rounding
        bits = x.to(tl.int32, bitcast=True)
        normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)
        x = tl.where(tl.abs(x) < 0.015625, (x + 24576.0) - 24576.0, normal)  # below 2⁻⁶ the steps are all 2⁻⁹
    return x.to(tl.float8e4nv)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_rows(
    x_ptr, times_ptr, x8_ptr, scale_ptr, tokens, width, stride, smallest,
    TIMES: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    column = tl.arange(0, BLOCK)
    inside = column < width
    if TIMES:
        times = tl.load(times_ptr + column, mask=inside, other=0.0).to(tl.float32)
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        if row < tokens:
            x = tl.load(x_ptr + row * stride + column, mask=inside, other=0.0).to(tl.float32)
            if TIMES:
                x *= times
            scale, inverse = _scale(tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0), smallest)
            tl.store(x8_ptr + row * width + column, _to_e4m3(x * inverse, ROUND), mask=inside)
            tl.store(scale_ptr + row, scale)


@triton.jit(do_not_specialize=["tokens"])
def _quantize_long_rows(
    x_ptr, times_ptr, x8_ptr, scale_ptr, tokens, width, stride, smallest,
    TIMES: tl.constexpr, ROWS: tl.constexpr, ROUND: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    for i in range(ROWS):
        row = tl.program_id(0).to(tl.int64) * ROWS + i
        if row < tokens:
            largest = tl.zeros((BLOCK,), tl.int32)
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
                if TIMES:
                    x *= tl.load(times_ptr + column, mask=column < width, other=0.0).to(tl.float32)
                largest = tl.maximum(largest, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF)
            scale, inverse = _scale(tl.max(largest, 0), smallest)
            tl.store(scale_ptr + row, scale)
            for start in range(0, width, BLOCK):
                column = start + tl.arange(0, BLOCK)
                x = tl.load(x_ptr + row * stride + column, mask=column < width, other=0.0).to(tl.float32)
                if TIMES:
                    x *= tl.load(times_ptr + column, mask=column < width, other=0.0).to(tl.float32)
                tl.store(x8_ptr + row * width + column, _to_e4m3(x * inverse, ROUND), mask=column < width)


@triton.jit
def _transpose(w_ptr, out_ptr, row_words, column_words, WORDS: tl.constexpr):
    """Bytes move in words of four: 4 × 4 bytes are transposed within registers, and the words as a tile."""
    r = tl.program_id(0).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    c = tl.program_id(1).to(tl.int64) * WORDS + tl.arange(0, WORDS)
    inside = (r[:, None] < row_words) & (c[None, :] < column_words)
    # Word (4r + i, c) holds bytes (4r + i, 4c … 4c + 3); in the result word (4c + j, r) holds (4r … 4r + 3, 4c + j).
    source = w_ptr + 4 * r[:, None] * column_words + c[None, :]
    w0 = tl.load(source, mask=inside, other=0)
    w1 = tl.load(source + column_words, mask=inside, other=0)
    w2 = tl.load(source + 2 * column_words, mask=inside, other=0)
    w3 = tl.load(source + 3 * column_words, mask=inside, other=0)
    target = out_ptr + 4 * c[:, None] * row_words + r[None, :]
    into = (c[:, None] < column_words) & (r[None, :] < row_words)
    for j in tl.static_range(4):
        low = ((w0 >> 8 * j) & 255) | (((w1 >> 8 * j) & 255) << 8)
        high = ((w2 >> 8 * j) & 255) | (((w3 >> 8 * j) & 255) << 8)
        tl.store(target + j * row_words, tl.trans(low | (high << 16)), mask=into)
