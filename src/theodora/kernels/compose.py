"""Adding the low-rank update and scaling the rows: DoRA's own work on the output of the base product, in one pass.

    forward     y = g ⊙ (z + s·xa Bᵀ) + bias,  g = m / norm                        z = x Wᵀ, xa = x Aᵀ
    backward    dz = g ⊙ dy      dzb = s·dz B      dB = s·dzᵀ xa      dm = Σ_T dy ⊙ (z + s·xa Bᵀ) / norm

Where the output is kept instead of z (see `shared_outputs.py`), dm is Σ_T dy ⊙ y / m.

Without magnitude and norm this is LoRA (g = 1, dz = dy). T tokens, O out features, R rank. xa and dzb are (T, R) in the
dtype of z; m and norm are (O,) float32, and the gradients of B and m come in float32.

The operators run Triton kernels on a GPU. Their references below are what runs elsewhere and what they are tested
against.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from theodora.functional import dora_scale, wide_dtype
from theodora.kernels.operators import operator, runs_triton
from theodora.kernels.parts import LEAST_SCALE


def compose_reference(
    z_TO: Tensor,
    xa_TR: Tensor | None,
    b_OR: Tensor | None,
    scale: float,
    magnitude_O: Tensor | None,
    norm_O: Tensor | None,
    bias_O: Tensor | None,
) -> Tensor:
    """y = g ⊙ (z + s·xa Bᵀ) + bias, (T, O), in the dtype of z."""
    y = _updated(z_TO, xa_TR, b_OR, scale)
    if magnitude_O is not None and norm_O is not None:
        y = (y * dora_scale(magnitude_O, norm_O)).to(z_TO.dtype)
    y = y if bias_O is None else y + bias_O
    return y.clone() if y is z_TO else y


def compose_backward_reference(
    dy_TO: Tensor,
    z_TO: Tensor | None,
    xa_TR: Tensor | None,
    b_OR: Tensor | None,
    scale: float,
    magnitude_O: Tensor | None,
    norm_O: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dzb, dB, dm); what does not exist for lack of an update or a magnitude is empty. Without a magnitude dz is
    dy, and empty here."""
    dz, dm = dy_TO, dy_TO.new_empty(0)
    if magnitude_O is not None and norm_O is not None and z_TO is not None:
        dz = (dy_TO * dora_scale(magnitude_O, norm_O)).to(dy_TO.dtype)
        dm = _magnitude_gradient(dy_TO, _updated(z_TO, xa_TR, b_OR, scale), norm_O)
    dzb, db = dy_TO.new_empty(0), dy_TO.new_empty(0)  # not one: outputs of an operator must not alias
    if xa_TR is not None and b_OR is not None:
        dzb = dz @ (scale * b_OR).to(dz.dtype)
        db = (dz.T @ xa_TR).to(wide_dtype(dz.dtype)) * scale
    return dy_TO.new_empty(0) if dz is dy_TO else dz, dzb, db, dm


def compose_backward_from_output_reference(
    dy_TO: Tensor,
    y_TO: Tensor,
    xa_TR: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    norm_O: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dz, dzb, dB, dm) from the output y = g ⊙ (z + s·xa Bᵀ).

    Where |g| < `LEAST_SCALE` dm is 0: see `zero_scale_gradient`.
    """
    g_O = dora_scale(magnitude_O, norm_O)
    dz, dzb, db, _ = compose_backward_reference(dy_TO, y_TO, xa_TR, b_OR, scale, magnitude_O, norm_O)
    v = torch.where(g_O.abs() < LEAST_SCALE, 0, y_TO / g_O)
    return dz, dzb, db, _magnitude_gradient(dy_TO, v, norm_O)


def _magnitude_gradient(dy_TO: Tensor, v_TO: Tensor, norm_O: Tensor) -> Tensor:
    """dm = Σ_T dy ⊙ v / norm. Where the norm is zero g is 1 by definition and does not depend on m."""
    return torch.where(norm_O == 0, 0, (dy_TO * v_TO).sum(0, dtype=norm_O.dtype) / norm_O)


def zero_scale_gradient_reference(
    dm_O: Tensor,
    dy_TO: Tensor,
    h_TI: Tensor,
    rstd_T: Tensor | None,
    weight_I: Tensor | None,
    w_OI: Tensor,
    xa_TR: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    norm_O: Tensor,
) -> None:
    """Write dm where |g| < `LEAST_SCALE` and the norm is not zero, from x = h · rstd · weight (or h alone) again."""
    rows = (dora_scale(magnitude_O, norm_O).abs() < LEAST_SCALE) & (norm_O != 0)
    x = h_TI if rstd_T is None or weight_I is None else h_TI * rstd_T[:, None] * weight_I
    dy = dy_TO[:, rows].to(norm_O.dtype)
    dg = (dy.T @ x.to(dy.dtype) * w_OI[rows]).sum(1) + scale * (dy.T @ xa_TR.to(dy.dtype) * b_OR[rows]).sum(1)
    dm_O[rows] = (dg / norm_O[rows]).to(dm_O.dtype)


def _updated(z_TO: Tensor, xa_TR: Tensor | None, b_OR: Tensor | None, scale: float) -> Tensor:
    # s goes in before rounding, so that it costs no precision.
    return z_TO if xa_TR is None or b_OR is None else torch.addmm(z_TO, xa_TR, (scale * b_OR).to(z_TO.dtype).T)


def _compose(
    z: Tensor,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
) -> Tensor:
    if not runs_triton(z):
        return compose_reference(z, xa, b, scale, magnitude, norm, bias)
    from theodora.kernels.triton import compose as triton

    return triton.compose(
        z, xa, b, scale, magnitude, norm, bias, torch.empty_like(z, memory_format=torch.contiguous_format)
    )


def _compose_onto(
    z: Tensor,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
    bias: Tensor | None,
    residual: Tensor,
) -> Tensor:
    """residual + y, y rounded before it is added: what `compose` and an addition after it give, to the bit."""
    if not runs_triton(z):
        return residual + compose_reference(z, xa, b, scale, magnitude, norm, bias)
    if (
        z.dtype == torch.float32
    ):  # nothing is rounded between, and a GPU's compiler would scale and add in one operation
        return _compose(z, xa, b, scale, magnitude, norm, bias).add_(residual)
    from theodora.kernels.triton import compose as triton

    y = torch.empty_like(z, memory_format=torch.contiguous_format)
    return triton.compose(z, xa, b, scale, magnitude, norm, bias, y, residual=residual)


def _compose_in_place(
    z: Tensor, xa: Tensor, b: Tensor, scale: float, bias: Tensor | None, others: Sequence[Tensor]
) -> None:
    """z + Σ others + s·xa Bᵀ + bias, over z."""
    if not runs_triton(z):
        for other in others:
            z.add_(other)
        z.addmm_(xa, (scale * b).to(z.dtype).T)
        if bias is not None:
            z.add_(bias)
        return
    from theodora.kernels.triton import compose as triton

    triton.compose(z, xa, b, scale, None, None, bias, z, others)


def _compose_backward(
    dy: Tensor,
    z: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if not runs_triton(dy):
        return compose_backward_reference(dy, z, xa, b, scale, magnitude, norm)
    from theodora.kernels.triton import compose as triton

    return triton.compose_backward(dy, z, xa, b, scale, magnitude, norm)


def _compose_backward_into(
    dy: Tensor,
    z: Tensor,
    xa: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dB, dm); dz is written to where it is wanted, and dzb is somebody else's."""
    if runs_triton(dy):
        from theodora.kernels.triton import compose as triton

        return triton.compose_backward_into(dy, z, xa, b, scale, magnitude, norm, dz)
    found_dz, _, db, dm = compose_backward_reference(dy, z, xa, b, scale, magnitude, norm)
    dz.copy_(found_dz)
    return db, dm


def _compose_backward_from_output(
    dy: Tensor,
    y: Tensor,
    xa: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
    dz: Tensor,
) -> tuple[Tensor, Tensor]:
    """(dB, dm); dz is written to where it is wanted, and dzb is somebody else's."""
    if runs_triton(dy):
        from theodora.kernels.triton import compose as triton

        return triton.compose_backward_into(dy, y, xa, b, scale, magnitude, norm, dz, from_output=True)
    found_dz, _, db, dm = compose_backward_from_output_reference(dy, y, xa, b, scale, magnitude, norm)
    dz.copy_(found_dz)
    return db, dm


def _zero_scale_gradient(
    dm: Tensor,
    dy: Tensor,
    h: Tensor,
    rstd: Tensor | None,
    weight: Tensor | None,
    w: Tensor,
    xa: Tensor,
    b: Tensor,
    scale: float,
    magnitude: Tensor,
    norm: Tensor,
) -> None:
    if not runs_triton(dy):
        zero_scale_gradient_reference(dm, dy, h, rstd, weight, w, xa, b, scale, magnitude, norm)
        return
    from theodora.kernels.triton import compose as triton

    triton.zero_scale_gradient(dm, dy, h, rstd, weight, w, xa, b, scale, magnitude, norm)


def _fake_compose_backward(
    dy: Tensor,
    z: Tensor | None,
    xa: Tensor | None,
    b: Tensor | None,
    scale: float,
    magnitude: Tensor | None,
    norm: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    wide = wide_dtype(dy.dtype)
    dz = dy.new_empty(0 if norm is None else dy.shape)
    dm = dy.new_empty(0) if norm is None else torch.empty_like(norm)
    if xa is None or b is None:
        return dz, dy.new_empty(0), dy.new_empty(0), dm
    return dz, xa.new_empty(xa.shape), b.new_empty(b.shape, dtype=wide), dm


compose = operator(
    "compose(Tensor z, Tensor? xa, Tensor? b, float scale, Tensor? magnitude, Tensor? norm, Tensor? bias) -> Tensor",
    _compose,
    lambda z, xa, b, scale, magnitude, norm, bias: z.new_empty(z.shape),
)
compose_onto = operator(
    "compose_onto(Tensor z, Tensor? xa, Tensor? b, float scale, Tensor? magnitude, Tensor? norm, Tensor? bias, "
    "Tensor residual) -> Tensor",
    _compose_onto,
    lambda z, xa, b, scale, magnitude, norm, bias, residual: z.new_empty(z.shape),
)
compose_in_place = operator(
    "compose_(Tensor(a!) z, Tensor xa, Tensor b, float scale, Tensor? bias, Tensor[] others) -> ()",
    _compose_in_place,
    lambda z, xa, b, scale, bias, others: None,
)
compose_backward = operator(
    "compose_backward(Tensor dy, Tensor? z, Tensor? xa, Tensor? b, float scale, Tensor? magnitude, Tensor? norm)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _compose_backward,
    _fake_compose_backward,
)
compose_backward_into = operator(
    "compose_backward_into(Tensor dy, Tensor z, Tensor xa, Tensor b, float scale, Tensor magnitude, Tensor norm, "
    "Tensor(a!) dz) -> (Tensor, Tensor)",
    _compose_backward_into,
    lambda dy, z, xa, b, scale, magnitude, norm, dz: (
        b.new_empty(b.shape, dtype=wide_dtype(dy.dtype)),
        torch.empty_like(norm),
    ),
)
compose_backward_from_output = operator(
    "compose_backward_from_output(Tensor dy, Tensor y, Tensor xa, Tensor b, float scale, Tensor magnitude, Tensor norm,"
    " Tensor(a!) dz) -> (Tensor, Tensor)",
    _compose_backward_from_output,
    lambda dy, y, xa, b, scale, magnitude, norm, dz: (
        b.new_empty(b.shape, dtype=wide_dtype(dy.dtype)),
        torch.empty_like(norm),
    ),
)
zero_scale_gradient = operator(
    "zero_scale_gradient(Tensor(a!) dm, Tensor dy, Tensor h, Tensor? rstd, Tensor? weight, Tensor w, Tensor xa, "
    "Tensor b, float scale, Tensor magnitude, Tensor norm) -> ()",
    _zero_scale_gradient,
    lambda dm, dy, h, rstd, weight, w, xa, b, scale, magnitude, norm: None,
)


def compose_backward_with_output(
    dy_TO: Tensor, y_TO: Tensor, xa_TR: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor, norm_O: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`compose_backward_from_output_reference`, by the kernel where it runs."""
    dz_TO = torch.empty_like(dy_TO, memory_format=torch.contiguous_format)
    db_OR, dm_O = compose_backward_from_output(dy_TO, y_TO, xa_TR, b_OR, scale, magnitude_O, norm_O, dz_TO)
    return dz_TO, dz_TO @ (scale * b_OR).to(dz_TO.dtype), db_OR, dm_O
