"""A frozen weight in float8 (e4m3) with one float32 scale for each output row, and its products.

    W ≈ scale_O ⊙ W8                 W8 = round(W / scale), scale = max|W| of the row / 448
    z  = (x8 W8ᵀ) ⊙ scale_T ⊙ scale_O      x8 = round(x / scale_T), quantised for each token as it comes
    dx = (d8 W8) ⊙ scale_T                  d8 = round(dz ⊙ scale_O / scale_T)

Where the GPU multiplies float8 (Hopper and later) it does; anywhere else the same numbers, from W8 and x8 widened for
the product, which is slower. Shapes: T tokens (rows), I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

FLOAT8 = torch.float8_e4m3fn
_LARGEST = 448.0  # of e4m3
# Rows smaller than this are zero to any model; the bound keeps 1 / scale finite.
_SMALLEST = 2.0**-100


def quantize_rows(x_TI: Tensor, times_I: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each row of x (or of x ⊙ times) in float8, (T, I), and its scale, (T,) float32: row ≈ scale · row8.

    A row with NaN or infinite values gets a scale that is NaN or infinite, and every product with it is NaN.
    """
    x = x_TI.float() if times_I is None else x_TI.float() * times_I.float()
    largest = x.abs().amax(1)
    scale_T = torch.where(largest < _SMALLEST, _SMALLEST, largest) / _LARGEST
    return (x * (1 / scale_T)[:, None]).to(FLOAT8), scale_T


def float8_product(x8_TI: Tensor, x_scale_T: Tensor, w8_OI: Tensor, w_scale_O: Tensor | None) -> Tensor:
    """(x8 W8ᵀ) ⊙ scale_T ⊙ scale_O, (T, O), bfloat16."""
    z = F.linear(x8_TI.float(), w8_OI.float()) * x_scale_T[:, None]
    return (z if w_scale_O is None else z * w_scale_O).to(torch.bfloat16)


def float8_linear(x_TI: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    """x Wᵀ, (T, O), in the dtype of x."""
    return float8_product(*quantize_rows(x_TI), w8_OI, w_scale_O).to(x_TI.dtype)


def float8_linear_backward(dz_TO: Tensor, w8_OI: Tensor, w_scale_O: Tensor) -> Tensor:
    """dz W, (T, I), in the dtype of dz."""
    return float8_product(*quantize_rows(dz_TO, w_scale_O), w8_OI.T, None).to(dz_TO.dtype)
