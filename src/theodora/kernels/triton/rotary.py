"""`theodora.kernels.rotary` in Triton: a program turns some heads of one token."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_MOST = 2048  # pairs that a program holds at once


@triton.jit(do_not_specialize=["T"])
def _turn(x, cos, sin, y, H, T, HALF, BATCHED: tl.constexpr,
          x_b, x_h, x_t, cos_b, cos_t, sin_b, sin_t, y_b, y_h, y_t,
          BACK: tl.constexpr, BH: tl.constexpr, BD: tl.constexpr):  # fmt: skip
    batch, t = (tl.program_id(0) // T).to(tl.int64), (tl.program_id(0) % T).to(tl.int64)
    h = (tl.program_id(1) * BH + tl.arange(0, BH)).to(tl.int64)
    d = tl.arange(0, BD)
    inside = (h[:, None] < H) & (d[None, :] < HALF)
    at = x + batch * x_b + h[:, None] * x_h + t * x_t + d[None, :]
    x1 = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    x2 = tl.load(at + HALF, mask=inside, other=0.0).to(tl.float32)
    angle = batch if BATCHED else 0
    cos_at, sin_at = cos + angle * cos_b + t * cos_t + d, sin + angle * sin_b + t * sin_t + d
    c1 = tl.load(cos_at, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    c2 = tl.load(cos_at + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s1 = tl.load(sin_at, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    s2 = tl.load(sin_at + HALF, mask=d < HALF, other=0.0).to(tl.float32)[None, :]
    if BACK:
        y1, y2 = x1 * c1 + x2 * s2, x2 * c2 - x1 * s1
    else:
        y1, y2 = x1 * c1 - x2 * s1, x2 * c2 + x1 * s2
    to = y + batch * y_b + h[:, None] * y_h + t * y_t + d[None, :]
    tl.store(to, y1.to(y.dtype.element_ty), mask=inside)
    tl.store(to + HALF, y2.to(y.dtype.element_ty), mask=inside)


def turn(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, back: bool) -> Tensor:
    """As `rotate_reference`; the features of a head lie side by side."""
    batch, heads, tokens, features = x_BHTD.shape
    cos, sin = (t if t.stride(-1) == 1 else t.contiguous() for t in (cos_BTD, sin_BTD))
    y = torch.empty_like(x_BHTD)
    half = features // 2
    bd = triton.next_power_of_2(half)
    bh = min(triton.next_power_of_2(heads), max(1, _MOST // bd))
    _turn[(batch * tokens, triton.cdiv(heads, bh))](
        x_BHTD, cos, sin, y, heads, tokens, half, cos.shape[0] > 1,
        *x_BHTD.stride()[:3], *cos.stride()[:2], *sin.stride()[:2], *y.stride()[:3],
        BACK=back, BH=bh, BD=bd, num_warps=4,
    )  # fmt: skip
    return y
