"""The frozen weight's own products, whatever it is stored in: the one place that knows how.

A base weight is a plain (O, I) tensor, or a float8 one with a scale for each output row (see `float8.py`). Shapes:
T tokens, I in features, O out features.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.float8 import float8_linear, float8_linear_backward


def base_product(x_TI: Tensor, w_OI: Tensor, w_scale_O: Tensor | None = None) -> Tensor:
    """x Wᵀ, (T, O), in the dtype of x."""
    return F.linear(x_TI, w_OI) if w_scale_O is None else float8_linear(x_TI, w_OI, w_scale_O)


def base_product_backward(dz_TO: Tensor, w_OI: Tensor, w_scale_O: Tensor | None = None) -> Tensor:
    """dz W, (T, I), in the dtype of dz: the gradient of x in `base_product`."""
    return dz_TO @ w_OI if w_scale_O is None else float8_linear_backward(dz_TO, w_OI, w_scale_O)


def dequantized(w_OI: Tensor, w_scale_O: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight as a plain tensor, (O, I); the weight itself where it is one of that dtype."""
    return w_OI.to(dtype) if w_scale_O is None else (w_OI.float() * w_scale_O[:, None]).to(dtype)
