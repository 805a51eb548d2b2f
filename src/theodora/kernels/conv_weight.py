"""The weight of a convolution, (O, I / groups, k, …), seen as a matrix whose rows are all that makes one output.

Products are not its business: a convolution reads patches of its input, and runs by itself (`layers/conv.py`).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from theodora import functional
from theodora.kernels.base_weight import BaseWeight, PlainWeight


@dataclass(frozen=True, slots=True, eq=False)
class ConvWeight(PlainWeight):
    """A tensor of a floating point dtype, (O, I / groups, k, …). As a matrix it is a view, if it is contiguous."""

    @property
    def weight_OI(self) -> Tensor:
        """The matrix, (O, I / groups · k · …)."""
        return self.tensor.flatten(1)

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """Itself, or rounded."""
        return self if dtype == self.dtype else ConvWeight(self.tensor.to(dtype))

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """In plain torch."""
        return functional.dora_norm(self.weight_OI, a_RI, b_OR, scale, w_norm_sq_O)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of the tensor."""
        return ConvWeight
