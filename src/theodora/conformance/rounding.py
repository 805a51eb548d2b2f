"""Numbers that know how far rounding may have moved them: where every bound of the suite comes from.

A bound is neither a guess nor a measurement. The formula is walked once more in the order in which any
implementation computes it, in float64, and each number that an implementation may round on the way is given the
variance of that rounding:

    rounding a number v to a dtype of unit roundoff u = eps / 2      (u v)² / 3, errors spread evenly over ± u v
    a sum of n terms, accumulated in float32                         n / 2 · u₃₂² · (sum of the terms' squares)

Roundings are independent, so variances add up along the way as for any other noise (running error analysis, Higham,
*Accuracy and Stability of Numerical Algorithms*, section 3.3, in its probabilistic form). A result must lie within
`SIGMAS` standard deviations of the exact one, as a whole, in the Frobenius norm.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

F64 = torch.float64
SIGMAS = 2.0
_FLOAT8 = torch.float8_e4m3fn


def roundoff(dtype: torch.dtype) -> float:
    """u: the largest relative error of rounding to `dtype`."""
    return torch.finfo(dtype).eps / 2


@dataclass(frozen=True)
class Rounded:
    """An exact value in float64 and, element by element, the variance of what rounding has added to it."""

    value: Tensor
    variance: Tensor

    @classmethod
    def exact(cls, value: Tensor) -> Rounded:
        """What was stored, and is taken as it is."""
        value = value.to(F64)
        return cls(value, torch.zeros_like(value))

    def to(self, dtype: torch.dtype) -> Rounded:
        """Rounded once to `dtype`."""
        smallest = torch.finfo(dtype).smallest_normal * roundoff(dtype)
        step = (roundoff(dtype) * self.value).square() + smallest**2
        stays = (self.variance == 0) & (self.value.to(dtype).to(F64) == self.value)
        return Rounded(self.value, self.variance + torch.where(stays, 0.0, step / 3))

    def to_float8_rows(self) -> Rounded:
        """Rounded to float8 e4m3, each row by its own scale, which maps its largest value to 448."""
        scale = self.value.abs().amax(-1, keepdim=True) / torch.finfo(_FLOAT8).max
        smallest = torch.finfo(_FLOAT8).smallest_normal * roundoff(_FLOAT8)
        step = (roundoff(_FLOAT8) * self.value).square() + (scale * smallest).square()
        return Rounded(self.value, self.variance + step / 3)

    def to_int8_rows(self) -> Rounded:
        """Rounded to whole numbers, each row by its own scale, which maps its largest value to 127."""
        step = (self.value.abs().amax(-1, keepdim=True) / 127 / 2).square().expand_as(self.value)
        return Rounded(self.value, self.variance + step / 3)

    def __add__(self, other: Rounded) -> Rounded:
        return Rounded(self.value + other.value, self.variance + other.variance)

    def __mul__(self, other: Rounded | Tensor | float) -> Rounded:
        if not isinstance(other, Rounded):
            return Rounded(self.value * other, self.variance * torch.as_tensor(other, dtype=F64).square())
        noise = self.variance * other.value.square() + self.value.square() * other.variance
        return Rounded(self.value * other.value, noise)

    def __truediv__(self, other: Rounded) -> Rounded:
        ratio = self.value / other.value
        return Rounded(ratio, (self.variance + ratio.square() * other.variance) / other.value.square())

    def __matmul__(self, other: Rounded) -> Rounded:
        mine, theirs = self.value.square(), other.value.square()
        terms = int((self.value != 0).sum(-1).max()) if self.value.numel() else 0
        summing = terms / 2 * roundoff(torch.float32) ** 2 * (mine @ theirs)
        return Rounded(self.value @ other.value, self.variance @ theirs + mine @ other.variance + summing)

    @property
    def T(self) -> Rounded:
        """Transposed."""
        return Rounded(self.value.T, self.variance.T)

    def column(self) -> Rounded:
        """(O,) as (O, 1)."""
        return Rounded(self.value[:, None], self.variance[:, None])

    def where(self, condition: Tensor, otherwise: float) -> Rounded:
        """This value where the condition holds; elsewhere a constant."""
        value = torch.where(condition, self.value, torch.full_like(self.value, otherwise))
        return Rounded(value, torch.where(condition, self.variance, torch.zeros_like(self.variance)))

    def row_norm(self) -> Rounded:
        """The norm of each row."""
        norm = self.value.square().sum(1).sqrt()
        square = (self.value.square() * self.variance).sum(1)
        summing = self.value.shape[1] / 2 * (roundoff(torch.float32) * norm).square()
        safe = torch.where(norm == 0, torch.ones_like(norm), norm)
        return Rounded(norm, square / safe.square() + summing)

    def sum(self, dim: int) -> Rounded:
        """Σ over a dimension."""
        summing = self.value.shape[dim] / 2 * roundoff(torch.float32) ** 2 * self.value.square().sum(dim)
        return Rounded(self.value.sum(dim), self.variance.sum(dim) + summing)

    def bound(self) -> float:
        """The largest relative error that a result may have, ‖found − exact‖ / ‖exact‖; absolute where exact is 0."""
        size, noise = float(self.value.norm()), SIGMAS * float(self.variance.sum().sqrt())
        return noise / size if size > 0 else noise


def distance(result: Tensor, exact: Tensor) -> float:
    """‖found − exact‖ / ‖exact‖ in float64, absolute where exact is zero; infinite for NaN or another shape."""
    if result.shape != exact.shape:
        return float("inf")
    result, exact = result.detach().to("cpu", F64), exact.detach().to("cpu", F64)
    size, gap = float(exact.norm()), float((result - exact).norm())
    if gap != gap:
        return float("inf")
    return gap / size if size > 0 else gap
