"""LoRA and DoRA layers as one autograd step each: less memory than autograd's own trace, and fewer passes.

Plain autograd keeps or makes, for each layer, the low-rank output, the sum, the scaled sum and their float32 copies.
Here the forward adds the low-rank update into the base product in place and keeps only what the gradients need: x
(shared by all layers that read it), x Aᵀ (T, R) and, for DoRA, z = x Wᵀ + s·(x Aᵀ) Bᵀ.

    y  = g ⊙ z + bias          dz = g ⊙ dy          dm = Σ_T dy ⊙ z / norm
    dB = s·dzᵀ (x Aᵀ)          dA = s·(dz B)ᵀ x     dx = dz W + s·(dz B) A

Works on any device and dtype; the base weight and its bias get no gradient. Shapes as in `functional.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from theodora.functional import dora_scale


def lora_linear(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    *,
    x_lora_TI: Tensor | None = None,
) -> Tensor:
    """`functional.lora_linear` in one autograd step."""
    x, x_lora = _flat(x_TI), None if x_lora_TI is None else _flat(x_lora_TI)
    y: Any = _LoraLinear.apply(x, x_lora, w_OI, bias_O, a_RI, b_OR, scale)
    return y.view(*x_TI.shape[:-1], w_OI.shape[0])


def dora_linear(
    x_TI: Tensor,
    w_OI: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    norm_O: Tensor,
    *,
    x_lora_TI: Tensor | None = None,
) -> Tensor:
    """`functional.dora_linear` in one autograd step."""
    x, x_lora = _flat(x_TI), None if x_lora_TI is None else _flat(x_lora_TI)
    y: Any = _DoraLinear.apply(x, x_lora, w_OI, bias_O, a_RI, b_OR, scale, magnitude_O, norm_O)
    return y.view(*x_TI.shape[:-1], w_OI.shape[0])


class _LoraLinear(torch.autograd.Function):
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        x_lora_TI: Tensor | None,
        w_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
    ) -> Tensor:
        a, b = _low_rank(x_TI, a_RI, b_OR, scale)
        xa = (x_TI if x_lora_TI is None else x_lora_TI) @ a.T
        y = _add_product(F.linear(x_TI, w_OI, bias_O), xa, b.T)
        ctx.save_for_backward(x_TI, x_lora_TI, w_OI, a_RI, b_OR, xa)
        ctx.scale = scale
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # Attention hands its gradients back transposed, and the CPU's bfloat16 products are slow on those.
        dx, dx_lora, da, db = _low_rank_backward(ctx, dy_TO.contiguous(), *ctx.saved_tensors)
        return dx, dx_lora, None, None, da, db, None


class _DoraLinear(torch.autograd.Function):
    """y = g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias, g = m / norm, the norm a constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TI: Tensor,
        x_lora_TI: Tensor | None,
        w_OI: Tensor,
        bias_O: Tensor | None,
        a_RI: Tensor,
        b_OR: Tensor,
        scale: float,
        magnitude_O: Tensor,
        norm_O: Tensor,
    ) -> Tensor:
        a, b = _low_rank(x_TI, a_RI, b_OR, scale)
        xa = (x_TI if x_lora_TI is None else x_lora_TI) @ a.T
        z = _add_product(F.linear(x_TI, w_OI), xa, b.T)
        ctx.save_for_backward(x_TI, x_lora_TI, w_OI, a_RI, b_OR, xa, z, magnitude_O, norm_O)
        ctx.scale = scale
        return _scale_rows(z, dora_scale(magnitude_O, norm_O), bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *low_rank, z, magnitude, norm = ctx.saved_tensors
        dz, dg = _scale_rows_backward(dy_TO, z, dora_scale(magnitude, norm))
        dm = None
        if ctx.needs_input_grad[7]:
            # Where the norm is zero g is 1 by definition and does not depend on m.
            dm = torch.where(norm == 0, 0, dg / norm).to(magnitude.dtype)
        dx, dx_lora, da, db = _low_rank_backward(ctx, dz, *low_rank)
        return dx, dx_lora, None, None, da, db, None, dm, None


def _low_rank_backward(
    ctx: Any,
    dz_TO: Tensor,
    x_TI: Tensor,
    x_lora_TI: Tensor | None,
    w_OI: Tensor,
    a_RI: Tensor,
    b_OR: Tensor,
    xa_TR: Tensor,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, x_lora, A and B from that of z = x Wᵀ + s·(x_lora Aᵀ) Bᵀ."""
    needs_x, needs_x_lora, _, _, needs_a, needs_b = ctx.needs_input_grad[:6]
    a, b = _low_rank(dz_TO, a_RI, b_OR, ctx.scale)
    dz_b = dz_TO @ b
    da = db = dx = dx_lora = None
    if needs_a:
        da = (dz_b.T @ (x_TI if x_lora_TI is None else x_lora_TI)).to(a_RI.dtype)
    if needs_b:
        db = (dz_TO.T @ xa_TR).to(b_OR.dtype).mul_(ctx.scale)
    if needs_x:
        dx = dz_TO @ w_OI
        if x_lora_TI is None:
            dx = _add_product(dx, dz_b, a)
    if needs_x_lora:
        dx_lora = dz_b @ a
    return dx, dx_lora, da, db


def _low_rank(like: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """A and s·B in the dtype of the products. s goes in before rounding, so that it costs no precision."""
    return a_RI.to(like.dtype), (scale * b_OR).to(like.dtype)


def _add_product(onto: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """onto + left @ right, in place: one pass, and no memory.

    Not under torch.compile, which does such things itself: torch 2.11 loses the gradients, without a word, of an
    autograd function that returns a tensor it wrote to (2.13 does not).
    """
    return torch.addmm(onto, left, right) if torch.compiler.is_compiling() else onto.addmm_(left, right)


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


# y = g ⊙ z + bias, with g in float32 beside z in bfloat16, is what batch normalisation by fixed statistics (mean 0,
# variance 1) does in one pass on the CPU, and its backward gives g ⊙ dy and Σ_T dy ⊙ z in one more. Written with
# multiplications the CPU widens whole tensors to float32 first, at ten times the cost. (`F.batch_norm` itself refuses
# an epsilon of zero in torch 2.11.)


def _scale_rows(z_TO: Tensor, g_O: Tensor, bias_O: Tensor | None) -> Tensor:
    if z_TO.device.type == "cpu":
        zero, one = torch.zeros_like(g_O), torch.ones_like(g_O)
        bias = zero if bias_O is None else bias_O.to(g_O.dtype)
        return torch.native_batch_norm(z_TO, g_O, bias, zero, one, False, 0.0, 0.0)[0]
    y = z_TO * g_O
    return (y if bias_O is None else y + bias_O).to(z_TO.dtype)


def _scale_rows_backward(dy_TO: Tensor, z_TO: Tensor, g_O: Tensor) -> tuple[Tensor, Tensor]:
    """(g ⊙ dy, Σ_T dy ⊙ z)."""
    if z_TO.device.type == "cpu":
        zero, one = torch.zeros_like(g_O), torch.ones_like(g_O)
        dz, dg, _ = torch.ops.aten.native_batch_norm_backward(
            dy_TO.contiguous(), z_TO, g_O, zero, one, zero, one, False, 0.0, [True, True, False]
        )
        return dz, dg
    return (dy_TO * g_O).to(dy_TO.dtype), (dy_TO * z_TO).sum(0, dtype=g_O.dtype)


__all__ = ["dora_linear", "lora_linear"]
