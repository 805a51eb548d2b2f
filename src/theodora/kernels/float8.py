"""A frozen weight in float8 (e4m3) with one float32 scale for each output row, and its products.

    W ≈ scale_O ⊙ W8                       W8 = round(W / scale), scale = max|W| of the row / 448
    z  = (x8 W8ᵀ) ⊙ scale_T ⊙ scale_O      x8 = round(x / scale_T): x is quantised as it comes, token by token
    dx = (d8 W8) ⊙ scale_T                 d8 = round(dz ⊙ scale_O / scale_T): the sum runs over O, and takes scale_O in

Where the GPU multiplies float8 (compute capability 8.9 on) it does. Anywhere else the same numbers come from x8 and W8
widened for the product, which is slower than a product with W itself, and said once. Hopper wants the summed dimension
contiguous in both factors, so that dx needs W8 transposed: that is done on the fly, because keeping both would take the
memory that float8 saves.

Shapes: T tokens (rows), I in features, O out features. Weights and scales get no gradient.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.functional import wide_dtype
from theodora.kernels.operators import interpreted, operator, runs_triton

_log = logging.getLogger(__name__)

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
# Smaller rows are zero to any model, and get the scale 1; the bound keeps 1 / scale finite.
_SMALLEST = 2.0**-100
_MULTIPLE = 16  # cuBLAS and CUTLASS take float8 factors whose sizes are multiples of this


def quantize_rows(x_TI: Tensor, times_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row of x, or of x ⊙ times, in float8, and its scale: row ≈ scale · row8.

    A row with NaN or infinite values has a scale that is NaN or infinite, and every product with it is NaN.

    Args:
        x_TI: (T, I), any floating point dtype.
        times_I: (I,), multiplied into x first, in float32.

    Returns:
        x8 (T, I) float8_e4m3fn, and the scales (T,) float32.
    """
    return _quantize_rows_op(x_TI, times_I)


def transpose(w8_OI: Tensor) -> Tensor:
    """A contiguous copy of W8ᵀ, (I, O)."""
    return _transpose_op(w8_OI)


def float8_product(
    x8_TI: Tensor, x_scale_T: Tensor, w8_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype = torch.bfloat16
) -> Tensor:
    """(x8 W8ᵀ) ⊙ scale_T ⊙ scale_O, (T, O), in `dtype`: for x that was quantised once and meets several weights.

    Any factor for each output feature, as DoRA's g, can be multiplied into `w_scale_O` at no cost.
    """
    return _product_op(x8_TI, x_scale_T, w8_OI, w_scale_O, dtype)


def float8_linear(x_TI: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    """x Wᵀ, (…, O), in the dtype of x, (…, I)."""
    return _linear_op(x_TI, w8_OI, w_scale_O)


def float8_linear_backward(dz_TO: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    """dz W, (…, I), in the dtype of dz, (…, O): the gradient of x in `float8_linear`."""
    return _linear_backward_op(dz_TO, w8_OI, w_scale_O)


def dequantized(w8_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers that W8 and its scales stand for, (O, I), rounded once, to `dtype`."""
    wide = wide_dtype(dtype)
    return (w8_OI.to(wide) * w_scale_O[:, None].to(wide)).to(dtype)


def reference_quantize_rows(x_TI: Tensor, times_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`quantize_rows` in plain torch."""
    x = x_TI.float() if times_I is None else x_TI.float() * times_I.float()
    if not x.numel():
        return x.to(FLOAT8), x.new_ones(len(x))
    largest = x.abs().amax(1)
    # By a tensor: on a GPU torch divides by a number by multiplying with its rounded reciprocal.
    scale_T = torch.where(largest < _SMALLEST, 1.0, largest / torch.full_like(largest, _LARGEST))
    return (x * (1 / scale_T)[:, None]).to(FLOAT8), scale_T


def reference_transpose(w8_OI: Tensor) -> Tensor:
    """`transpose` in plain torch."""
    return w8_OI.T.contiguous()


def reference_product(x8_TI: Tensor, x_scale_T: Tensor, w8_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """`float8_product` in plain torch. bfloat16 holds every value of e4m3, so that widening loses nothing."""
    wide = dtype if dtype in (torch.bfloat16, torch.float64) else torch.float32
    with torch.autocast(x8_TI.device.type, enabled=False):
        z = F.linear(x8_TI.to(wide), w8_OI.to(wide))
    return (z * x_scale_T[:, None] * w_scale_O).to(dtype)


def multiplies_float8(device: torch.device) -> bool:
    """Whether the device has instructions for products of e4m3."""
    return device.type == "cuda" and torch.version.hip is None and _capability(device.index) >= (8, 9)


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


@cache
def _say_once(reason: str) -> None:
    _log.warning("Products with float8 weights run on widened copies of them, which is slower: %s.", reason)


def _quantize_rows(x_TI: Tensor, times_I: Tensor | None) -> tuple[Tensor, Tensor]:
    if runs_triton(x_TI) and (interpreted() or multiplies_float8(x_TI.device)):
        from theodora.kernels.triton import float8 as triton

        return triton.quantize_rows(x_TI, times_I, _SMALLEST)
    return reference_quantize_rows(x_TI, times_I)


def _transpose(w8_OI: Tensor) -> Tensor:
    if runs_triton(w8_OI) and w8_OI.is_contiguous() and not any(size % _MULTIPLE for size in w8_OI.shape):
        from theodora.kernels.triton import float8 as triton

        return triton.transpose(w8_OI)
    return reference_transpose(w8_OI)


def _product(x8_TI: Tensor, x_scale_T: Tensor, w8_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    """The product, whatever way the factors lie in memory."""
    if w8_OI.dtype != FLOAT8:
        raise TypeError(f"the weight is {w8_OI.dtype}, and has a scale for each row; expected {FLOAT8}")
    odd = any(size % _MULTIPLE for size in w8_OI.shape)
    if odd or not multiplies_float8(w8_OI.device) or not x8_TI.numel():
        if odd:
            _say_once(f"sizes {tuple(w8_OI.shape)} are no multiples of {_MULTIPLE}")
        elif not multiplies_float8(w8_OI.device):
            _say_once(f"{w8_OI.device.type} has no products of float8")
        return reference_product(x8_TI, x_scale_T, w8_OI, w_scale_O, dtype)
    w8_OI = w8_OI if w8_OI.is_contiguous() else _transpose(w8_OI.T) if w8_OI.T.is_contiguous() else w8_OI.contiguous()
    # Fast accumulation costs about a thousandth, where rounding to e4m3 has cost a hundredth already.
    z = torch._scaled_mm(  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        x8_TI,
        w8_OI.T,
        x_scale_T[:, None],
        w_scale_O[None].float(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return z.to(dtype)


def _linear(x_TI: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    x8, x_scale = _quantize_rows(x_TI.reshape(-1, x_TI.shape[-1]), None)
    return _product(x8, x_scale, w8_OI, w_scale_O, x_TI.dtype).view(*x_TI.shape[:-1], w8_OI.shape[0])


def _linear_backward(dz_TO: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    d8, d_scale = _quantize_rows(dz_TO.reshape(-1, dz_TO.shape[-1]), w_scale_O)
    ones = w_scale_O.new_ones(w8_OI.shape[1])
    return _product(d8, d_scale, w8_OI.T, ones, dz_TO.dtype).view(*dz_TO.shape[:-1], w8_OI.shape[1])


def _fake_rows(x_TI: Tensor, times_I: Tensor | None) -> tuple[Tensor, Tensor]:
    return x_TI.new_empty(x_TI.shape, dtype=FLOAT8), x_TI.new_empty(x_TI.shape[:1], dtype=torch.float32)


def _fake_product(x8_TI: Tensor, x_scale_T: Tensor, w8_OI: Tensor, w_scale_O: Tensor, dtype: torch.dtype) -> Tensor:
    return x8_TI.new_empty(x8_TI.shape[0], w8_OI.shape[0], dtype=dtype)


_quantize_rows_op: Any = operator(
    "float8_quantize_rows(Tensor x, Tensor? times) -> (Tensor, Tensor)", _quantize_rows, _fake_rows
)
_transpose_op: Any = operator(
    "float8_transpose(Tensor w8) -> Tensor", _transpose, lambda w8: w8.new_empty(w8.shape[1], w8.shape[0])
)
_product_op: Any = operator(
    "float8_product(Tensor x8, Tensor x_scale, Tensor w8, Tensor w_scale, ScalarType dtype) -> Tensor",
    _product,
    _fake_product,
)
_linear_op: Any = operator(
    "float8_linear(Tensor x, Tensor w8, Tensor w_scale) -> Tensor",
    _linear,
    lambda x, w8, w_scale: x.new_empty(*x.shape[:-1], w8.shape[0]),
)
_linear_backward_op: Any = operator(
    "float8_linear_backward(Tensor dz, Tensor w8, Tensor w_scale) -> Tensor",
    _linear_backward,
    lambda dz, w8, w_scale: dz.new_empty(*dz.shape[:-1], w8.shape[1]),
)
