"""`theodora.kernels.cross_entropy` in Triton: one program for each row of logits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def _load_z(row_ptr, bias_ptr, column, vocabulary, scale, softcap, BIASED: tl.constexpr, CAPPED: tl.constexpr):
    """Scaled and capped logits."""
    z = tl.load(row_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)
    if BIASED:
        z += tl.load(bias_ptr + column, mask=column < vocabulary, other=0.0).to(tl.float32)
    z *= scale
    if CAPPED:
        z = softcap * (2 / (1 + tl.exp(-2 * z / softcap)) - 1)  # tanh
    return z


@triton.jit
def _settle(logits_ptr, labels_ptr, bias_ptr, sums_ptr, vocabulary, logits_row, sums_row, scale, softcap, ignore_index,
            BIASED: tl.constexpr, CAPPED: tl.constexpr, STATS: tl.constexpr, GRADIENT: tl.constexpr,
            BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_row
    label = tl.load(labels_ptr + row)
    if label == ignore_index:
        if GRADIENT:
            for start in range(0, vocabulary, BLOCK):
                column = start + tl.arange(0, BLOCK)
                zeros = tl.zeros((BLOCK,), logits_ptr.dtype.element_ty)
                tl.store(row_ptr + column, zeros, mask=column < vocabulary)
        return
    inside = (label >= 0) & (label < vocabulary)
    at_label = tl.load(row_ptr + label, mask=inside, other=0.0).to(tl.float32)
    if BIASED:
        at_label += tl.load(bias_ptr + label, mask=inside, other=0.0).to(tl.float32)
    at_label *= scale
    if CAPPED:
        at_label = softcap * (2 / (1 + tl.exp(-2 * at_label / softcap)) - 1)

    # Each lane keeps its own maximum and sums, so that a pass has one reduction, at its end.
    largest = tl.full((BLOCK,), -3.0e38, tl.float32)  # finite, so that a logit of −inf is no NaN
    total = tl.zeros((BLOCK,), tl.float32)
    weighted = tl.zeros((BLOCK,), tl.float32)  # Σ e·(z − largest)
    better = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, vocabulary, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z = _load_z(row_ptr, bias_ptr, column, vocabulary, scale, softcap, BIASED, CAPPED)
        z = tl.where(column < vocabulary, z, float("-inf"))
        new = tl.maximum(largest, z)
        shrink, e = tl.exp(largest - new), tl.exp(z - new)
        if STATS:
            weighted = (weighted + (largest - new) * total) * shrink + e * tl.where(e > 0, z - new, 0.0)
            better |= ((z > at_label) | ((z == at_label) & (column < label))).to(tl.int32)
        total = total * shrink + e
        largest = new
    top = tl.max(largest, 0)
    shrink = tl.exp(largest - top)
    total_sum = tl.sum(total * shrink, 0)
    lse = top + tl.log(total_sum)
    nats = tl.where(inside, lse - at_label, float("nan"))
    tl.store(sums_ptr + row, nats)
    tl.store(sums_ptr + 3 * sums_row + row, 1.0)
    if STATS:
        weighted_sum = tl.sum((weighted + (largest - top) * total) * shrink, 0)
        tl.store(sums_ptr + sums_row + row, tl.log(total_sum) - weighted_sum / total_sum)
        correct = tl.where(tl.max(better, 0) == 0, 1.0, 0.0)
        tl.store(sums_ptr + 2 * sums_row + row, tl.where(inside, correct, 0.0))
    if GRADIENT:
        for start in range(0, vocabulary, BLOCK):
            column = start + tl.arange(0, BLOCK)
            z = _load_z(row_ptr, bias_ptr, column, vocabulary, scale, softcap, BIASED, CAPPED)
            d = tl.exp(z - lse) - tl.where(column == label, 1.0, 0.0)
            if CAPPED:
                d *= 1 - (z / softcap) * (z / softcap)
            d *= scale
            tl.store(row_ptr + column, d.to(logits_ptr.dtype.element_ty), mask=column < vocabulary)


def settle(
    logits: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    sums: Tensor,
    with_stats: bool,
    with_gradient: bool,
) -> None:
    """As `_settle_reference` there; rows of the logits may lie apart."""
    rows, vocabulary = logits.shape
    block = min(4096, triton.next_power_of_2(vocabulary))
    _settle[(rows,)](
        logits, labels, bias, sums, vocabulary, logits.stride(0), sums.stride(0), scale, softcap or 1.0, ignore_index,
        BIASED=bias is not None, CAPPED=softcap is not None, STATS=with_stats, GRADIENT=with_gradient,
        BLOCK=block, num_warps=max(1, block // 512),
    )  # fmt: skip


@triton.jit
def _scale(x_ptr, factor_ptr, y_ptr, size, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + i, mask=i < size, other=0.0).to(tl.float32)
    y = x * tl.load(factor_ptr).to(tl.float32)
    tl.store(y_ptr + i, y.to(y_ptr.dtype.element_ty), mask=i < size)


def scaled(x: Tensor, factor: Tensor) -> Tensor:
    """x times a scalar that stays on the device, rounded once."""
    y = torch.empty_like(x)
    _scale[(triton.cdiv(x.numel(), 4096),)](x, factor, y, x.numel(), BLOCK=4096, num_warps=8)
    return y
