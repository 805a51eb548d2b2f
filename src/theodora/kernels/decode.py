"""An adapted linear layer on a few tokens, as when a model generates: bound by reading W, so W is read once.

    y = g ⊙ (x Wᵀ + xa (sB)ᵀ) + bias,  xa = x Aᵀ

Decoding repeats this with the same adapter thousands of times, so all that depends on the adapter alone comes
ready-made: A and s·B in the dtype of x, and g = m / norm in float32. The operator has no gradient.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.kernels.base_weight import BaseWeight
from theodora.kernels.operators import interpreted, operator, runs_triton

MOST_TOKENS = 64
"""Tokens up to which the kernel is meant: beyond, a product is no longer bound by reading W."""


def decode_linear_reference(
    x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """y = g ⊙ (x Wᵀ + (x Aᵀ) Bᵀ) + bias, (T, O), in the dtype of x; B holds the scale s."""
    y = F.linear(x_TI, w_OI) + F.linear(F.linear(x_TI, a_RI), b_OR)
    if g_O is not None:
        y = (y * g_O).to(x_TI.dtype)
    return y if bias_O is None else y + bias_O


def runs(weight: BaseWeight) -> bool:
    """Whether the kernel can run a layer of this weight."""
    w_OI = weight.plain()
    if w_OI is None or type(w_OI.data) is not Tensor:  # or a DTensor
        return False
    return w_OI.dtype in (torch.bfloat16, torch.float16) and runs_triton(w_OI)


def fits(x: Tensor) -> bool:
    """Whether x (…, I) is few enough tokens for the kernel, on a device and of a dtype that it knows."""
    tokens = x.numel() // max(1, x.shape[-1])
    known = x.dtype in (torch.bfloat16, torch.float16) and (x.is_cuda or interpreted())
    return known and 0 < tokens <= MOST_TOKENS


def prepare(device: torch.device) -> None:
    """Make what the kernel keeps on a device, before a CUDA graph is captured; without it the kernel is slower.

    (A graph's memory is its own, and what it holds may not outlive it.)
    """
    from theodora.kernels.triton.decode import prepare as make

    make(device)


def _implementation(
    x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    if not runs_triton(x_TI) or x_TI.numel() == 0 or x_TI.shape[0] > MOST_TOKENS:
        return decode_linear_reference(x_TI, w_OI, a_RI, b_OR, g_O, bias_O)
    from theodora.kernels.triton.decode import decode

    return decode(x_TI, w_OI, a_RI, b_OR, g_O, bias_O)


def _fake(x_TI: Tensor, w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None) -> Tensor:
    return x_TI.new_empty(x_TI.shape[0], w_OI.shape[0])


decode_linear = operator(
    "decode_linear(Tensor x, Tensor w, Tensor a, Tensor b, Tensor? g, Tensor? bias) -> Tensor", _implementation, _fake
)
"""`decode_linear_reference`, by the Triton kernel on a GPU."""
