"""How far an adapter has moved the rows of one weight: in length (magnitude) and in direction.

Each output row w of the base becomes w + d, where d is the row of s·B·A; DoRA then gives it the length m. Measured are
the new length (|w + d|, or m) against |w|, and the angle between w and w + d. Neither needs B·A in full:

    ⟨w, d⟩ = s·rowsum(B ⊙ (W Aᵀ))        |d|² = s²·rowsum((B·(A Aᵀ)) ⊙ B)

Shapes: O out features, I in features, R rank; `w_OI` is (O, I).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theodora.files.adapter import AdapterTensors
from theodora.functional import row_angles, row_norm_squared, update_products

# Magnitudes that differ from the base's norms by less than this are also compared with the norms of the base rounded to
# bfloat16, from which training may have begun. Rounding moves a norm by far less.
_PERHAPS_ROUNDED = 5e-3
# Two ways of computing a float32 norm agree to about 1e-6.
_SAME = 1e-5


@dataclass(frozen=True)
class Movement:
    """The movement of each output row that is not zero in the base."""

    magnitude: Tensor
    """Relative change of the row's length, signed: 0.01 is one per cent longer. (rows,)"""
    angle: Tensor
    """Angle between the base row and the adapted row, in degrees. (rows,)"""
    relative_update: float
    """‖s·B·A‖ / ‖W‖, Frobenius norms."""
    magnitude_rests: bool
    """DoRA only: the magnitudes are still the norms of the base rows."""


def update_norm(tensors: AdapterTensors) -> float:
    """‖s·B·A‖, Frobenius norm, without forming B·A."""
    a_RI, b_OR = tensors.a.double(), tensors.b.double()
    square = ((b_OR.T @ b_OR) * (a_RI @ a_RI.T)).sum().clamp_min(0)
    return abs(tensors.scale) * float(square.sqrt())


def measure(w_OI: Tensor, tensors: AdapterTensors) -> Movement:
    """Compare the rows of a base weight, (O, I), with the rows after adaptation."""
    # In float64: of a row that changes nearly along itself the angle is a small difference of large squares.
    wide = torch.float64 if w_OI.device.type != "mps" else torch.float32
    wide_OI = w_OI.to(wide)
    norm_sq = row_norm_squared(wide_OI)
    alive = norm_sq > 0
    a_RI, b_OR, scale = tensors.a.to(wide), tensors.b.to(wide), tensors.scale
    dot, update_sq = update_products(wide_OI @ a_RI.T, a_RI, b_OR, scale)
    relative_update = float((update_sq.sum() / norm_sq.sum()).sqrt()) if bool(alive.any()) else float("nan")

    norm_sq, dot, update_sq = norm_sq[alive], dot[alive], update_sq[alive]
    norm = norm_sq.sqrt()
    angle = torch.rad2deg(row_angles(norm, dot, update_sq))
    if tensors.magnitude is None:
        adapted = (norm_sq + 2 * dot + update_sq).clamp_min(0).sqrt()
        # The difference of the squares over the sum of the roots: exact also where the lengths hardly differ.
        change = (2 * dot + update_sq) / (norm * (adapted + norm))
        return Movement(change, angle, relative_update, magnitude_rests=False)
    m = tensors.magnitude.to(wide)[alive]
    change = m.abs() / norm - 1
    angle = torch.where(m < 0, 180 - angle, angle)  # a negative magnitude turns the row round
    return Movement(change, angle, relative_update, _rests(w_OI[alive], m, norm, tensors.magnitude.dtype))


def _rests(w_OI: Tensor, m: Tensor, norm: Tensor, stored: torch.dtype) -> bool:
    """Whether the magnitudes are still those that training began with."""
    tolerance = max(_SAME, torch.finfo(stored).eps)
    change = float((m / norm - 1).abs().max()) if len(norm) else 0.0
    if change <= tolerance:
        return True
    if change > _PERHAPS_ROUNDED or w_OI.dtype == torch.bfloat16:
        return False
    rounded = row_norm_squared(w_OI.to(torch.bfloat16)).sqrt().to(norm.dtype)
    return bool(((m / rounded - 1).abs() <= tolerance).all())
