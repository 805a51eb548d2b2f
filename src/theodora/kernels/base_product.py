"""The frozen weight's own products, whatever it is stored in: the one place that knows how.

A base weight is a plain (O, I) tensor, or a float8 one with a scale for each output row (see `float8.py`). Shapes:
T tokens, I in features, O out features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.float8 import float8_linear, float8_linear_backward, float8_product, quantize_rows


def base_product(x_TI: Tensor, w_OI: Tensor, w_scale_O: Tensor | None = None, bias_O: Tensor | None = None) -> Tensor:
    """x Wᵀ, (T, O), in the dtype of x; with the bias of a plain weight in it, rounded once as in `nn.Linear`."""
    return F.linear(x_TI, w_OI, bias_O) if w_scale_O is None else float8_linear(x_TI, w_OI, w_scale_O)


def shared_base_products(
    x_TI: Tensor, weights: Sequence[tuple[Tensor, Tensor | None]], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`base_product` of one x, (T, I), with several weights and their scales; x is quantised once for all."""
    each = list(zip(weights, [None] * len(weights) if biases is None else biases, strict=True))
    if x_TI.dim() != 2 or sum(w_scale is not None for _, w_scale in weights) < 2:
        return [base_product(x_TI, w, w_scale, bias) for (w, w_scale), bias in each]
    x8, x_scale = quantize_rows(x_TI)
    return [
        F.linear(x_TI, w, bias) if w_scale is None else float8_product(x8, x_scale, w, w_scale, x_TI.dtype)
        for (w, w_scale), bias in each
    ]


def base_product_backward(dz_TO: Tensor, w_OI: Tensor, w_scale_O: Tensor | None = None) -> Tensor:
    """dz W, (T, I), in the dtype of dz: the gradient of x in `base_product`."""
    return dz_TO @ w_OI if w_scale_O is None else float8_linear_backward(dz_TO, w_OI, w_scale_O)


def dequantized(w_OI: Tensor, w_scale_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a plain tensor, (O, I); the weight itself where it is one of that dtype."""
    return w_OI.to(dtype) if w_scale_O is None else (w_OI.float() * w_scale_O[:, None]).to(dtype)
