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
from theodora.kernels.packed import Packed

MOST_TOKENS = 64
"""Tokens up to which the kernel is meant: beyond, a product is no longer bound by reading W."""
_DTYPES = (torch.bfloat16, torch.float16)


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
    if w_OI is None:
        return knows(weight) and weight.dtype in _DTYPES and runs_triton(weight.tensors()[0])
    if type(w_OI.data) is not Tensor:  # or a DTensor
        return False
    return w_OI.dtype in _DTYPES and runs_triton(w_OI)


def knows(weight: BaseWeight) -> bool:
    """Whether it is of a kind that the kernel runs on, on one device or another."""
    return weight.stored in ("plain", "library")


def fits(x: Tensor) -> bool:
    """Whether x (…, I) is few enough tokens for the kernel, on a device and of a dtype that it knows."""
    tokens = x.numel() // max(1, x.shape[-1])
    known = x.dtype in _DTYPES and (x.is_cuda or interpreted())
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


def _packed(
    x_TI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    g_O: Tensor | None,
    bias_O: Tensor | None,
    w: list[Tensor],
    form: list[int],
    table: str,
) -> Tensor:
    from theodora.kernels.triton.decode import decode

    return decode(x_TI, Packed(tuple(w), tuple(form), table, x_TI.dtype), a_RI, b_OR, g_O, bias_O)


decode_packed = operator(
    "decode_packed(Tensor x, Tensor a, Tensor b, Tensor? g, Tensor? bias, Tensor[] w, int[] form, str table) -> Tensor",
    _packed,
    lambda x, a, b, *_: x.new_empty(x.shape[0], b.shape[0]),
)
"""`decode_linear` of a packed weight, whose numbers are rounded to the dtype of x."""


def _onto(x_TI: Tensor, z_TO: Tensor, a_RI: Tensor, b_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None) -> Tensor:
    from theodora.kernels.triton.decode import decode

    return decode(x_TI, z_TO, a_RI, b_OR, g_O, bias_O, given=True)


decode_onto = operator(
    "decode_onto(Tensor x, Tensor z, Tensor a, Tensor b, Tensor? g, Tensor? bias) -> Tensor",
    _onto,
    lambda x, z, *_: torch.empty_like(z),
)
"""y = g ⊙ (z + (x Aᵀ) Bᵀ) + bias, (T, O), from z = x Wᵀ, in one launch."""


def decode(
    x_TI: Tensor, weight: BaseWeight, a_RI: Tensor, b_OR: Tensor, g_O: Tensor | None, bias_O: Tensor | None
) -> Tensor:
    """`decode_linear` of a weight that `runs`, for an x that `fits`, of the weight's dtype.

    A packed weight is read as it is; with any other of a library's, that library multiplies.
    """
    if (w_OI := weight.plain()) is not None:
        return decode_linear(x_TI, w_OI, a_RI, b_OR, g_O, bias_O)
    packed = None if weight.rounds_input else weight.packed()
    if packed is None:
        return decode_onto(x_TI, weight.product(x_TI), a_RI, b_OR, g_O, bias_O)
    rest = list(packed.tensors), list(packed.form), packed.table
    return decode_packed(x_TI, a_RI, b_OR, g_O, bias_O, *rest)
