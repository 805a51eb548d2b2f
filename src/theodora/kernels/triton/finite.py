"""`theodora.kernels.finite` in Triton: one program for each token, which writes only where something is wrong."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


@triton.jit
def _too_large(x, most, N, D, x_h, x_d, BLOCK: tl.constexpr):
    """How many of a token's numbers are no finite ones of usual size."""
    found = tl.zeros([BLOCK], dtype=tl.int32)
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        values = tl.load(x + (n // D) * x_h + (n % D) * x_d, mask=n < N, other=0.0).to(tl.float32)
        found += tl.where(tl.abs(values) <= most, 0, 1)  # NaN is not less than anything
    return tl.sum(found, 0)


@triton.jit
def _zero(x, N, D, x_h, x_d, BLOCK: tl.constexpr):
    for first in range(0, N, BLOCK):
        n = first + tl.arange(0, BLOCK)
        tl.store(x + (n // D) * x_h + (n % D) * x_d, tl.zeros([BLOCK], dtype=x.dtype.element_ty), mask=n < N)


@triton.jit
def _keep_finite(k, v, ruined, most, KN, KD, k_h, k_t, k_d, VN, VD, v_h, v_t, v_d, BLOCK: tl.constexpr):
    t = tl.program_id(0).to(tl.int64)
    k += t * k_t
    v += t * v_t
    found = _too_large(k, most, KN, KD, k_h, k_d, BLOCK) + _too_large(v, most, VN, VD, v_h, v_d, BLOCK)
    if found > 0:
        _zero(k, KN, KD, k_h, k_d, BLOCK)
        _zero(v, VN, VD, v_h, v_d, BLOCK)
        tl.store(ruined + t, 1)


def keep_finite(key: Tensor, value: Tensor, ruined: Tensor, most: float) -> None:
    """Zeros in place, and marks, for the tokens with numbers that are not finite or larger than `most`."""
    if key.is_cuda and key.device.index != torch.cuda.current_device():  # Triton launches on the current device
        with torch.cuda.device(key.device):
            return keep_finite(key, value, ruined, most)
    (_, heads, tokens, width), (_, v_heads, _, v_width) = key.shape, value.shape
    _, k_h, k_t, k_d = key.stride()
    _, v_h, v_t, v_d = value.stride()
    _keep_finite[(tokens,)](
        key, value, ruined, most, heads * width, width, k_h, k_t, k_d, v_heads * v_width, v_width, v_h, v_t, v_d,
        BLOCK=min(_BLOCK, triton.next_power_of_2(max(heads * width, v_heads * v_width))), num_warps=4,
    )  # fmt: skip
    return None
