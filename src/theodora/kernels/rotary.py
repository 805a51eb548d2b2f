"""Rotary position embeddings in one pass, written to new memory.

    (x₁, x₂) ↦ (x₁·cos₁ − x₂·sin₁, x₂·cos₂ + x₁·sin₂)        x₁, x₂: the halves of each head      (arXiv 2104.09864)

Legend: B batch, H heads, T tokens, D features of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from theodora.functional import wide_dtype
from theodora.kernels.operators import operator, runs_triton


def rotate(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
    """Each head turned by the angles of its token, differentiable in x.

    Args:
        x_BHTD: heads, in any order in memory, which the result has as well.
        cos_BTD, sin_BTD: of the angles; B may be 1.
    """
    return _Rotate.apply(x_BHTD, cos_BTD, sin_BTD)  # pyright: ignore[reportReturnType]


def rotate_reference(x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor, back: bool = False) -> Tensor:
    """`rotate` in plain torch, rounded once; with `back`, what its gradient becomes on the way back."""
    wide = wide_dtype(x_BHTD.dtype)
    (x1, x2), (c1, c2), (s1, s2) = (t.to(wide).chunk(2, -1) for t in (x_BHTD, cos_BTD[:, None], sin_BTD[:, None]))
    turned = (x1 * c1 + x2 * s2, x2 * c2 - x1 * s1) if back else (x1 * c1 - x2 * s1, x2 * c2 + x1 * s2)
    return torch.empty_like(x_BHTD).copy_(torch.cat(turned, -1))


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> Tensor:
        ctx.save_for_backward(cos_BTD, sin_BTD)
        return turn(x_BHTD, cos_BTD, sin_BTD, False)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BHTD: Tensor) -> tuple[Tensor, None, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return turn(dy_BHTD, *ctx.saved_tensors, True), None, None


def _turn(x: Tensor, cos: Tensor, sin: Tensor, back: bool) -> Tensor:
    if not runs_triton(x) or x.stride(-1) != 1:
        return rotate_reference(x, cos, sin, back)
    from theodora.kernels.triton import rotary as triton

    return triton.turn(x, cos, sin, back)


turn = operator(
    "turn(Tensor x, Tensor cos, Tensor sin, bool back) -> Tensor", _turn, lambda x, cos, sin, back: torch.empty_like(x)
)
