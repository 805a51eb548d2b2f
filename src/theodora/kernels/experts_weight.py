"""The frozen weights of a mixture's experts, one parameter of three dimensions: E weights W (O, I) of one shape.

What rows of an expert are multiplied by goes through `grouped`: the rows lie one expert after the other, and one
product serves all experts.

Shapes: E experts, S rows (a token once for each expert that it is sent to), I in features, O out features, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora import functional
from theodora.functional import wide_dtype
from theodora.kernels import weight_norm
from theodora.kernels.base_weight import BaseWeight


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsWeight(BaseWeight):
    """A tensor of a floating point dtype. Everything that `BaseWeight` says of (O, I) is of (E, O, I) here."""

    stored = "plain"

    tensor: Tensor
    """As the module holds it: (E, O, I), or (E, I, O)."""
    transposed: bool = False
    """Whether it is (E, I, O), as gpt-oss has it."""

    @property
    def weight_EOI(self) -> Tensor:
        """The tensor, (E, O, I)."""
        return self.tensor.mT if self.transposed else self.tensor

    @property
    def shape(self) -> tuple[int, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(E, O, I)."""
        return tuple(self.weight_EOI.shape)

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.tensor.dtype

    @property
    def device(self) -> torch.device:
        """The tensor's."""
        return self.tensor.device

    def takes(self, dtype: torch.dtype) -> bool:
        """Only its own."""
        return dtype == self.dtype

    def to(self, dtype: torch.dtype) -> ExpertsWeight:
        """Itself, or rounded."""
        return self if dtype == self.dtype else ExpertsWeight(self.tensor.to(dtype), self.transposed)

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """x Wᵀ + bias, (E, T, O), of as many rows for each expert, (E, T, I), and a bias (E, O)."""
        z = x_TI @ self.weight_EOI.mT
        return z if bias_O is None else z + bias_O[:, None]

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """dz W, (E, T, I), of dz (E, T, O)."""
        dx = dz_TO @ self.weight_EOI
        return dx if onto is None else onto + dx

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Of a slice the weights of these experts, (…, O, I); of a mask (E, O) its rows, (N, I)."""
        return self.weight_EOI[at].to(wide_dtype(self.dtype))

    def times_a(self, a_RI: Tensor) -> Tensor:
        """W Aᵀ, (E, O, R), of A (E, R, I)."""
        a = a_RI.to(wide_dtype(self.dtype))
        return torch.cat([self.rows(at) @ a[at].mT for at in functional.slices_of(self.shape)])

    def norm_squared(self) -> Tensor:
        """‖W‖² of each output row, (E, O)."""
        return functional.row_norm_squared(self.weight_EOI)

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """Of all experts, (E, O), from A (E, R, I), B (E, O, R) and ‖W‖² (E, O), by one product on a GPU."""
        return weight_norm.stack_norms(self.weight_EOI, a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O)

    def split(self, outputs: int) -> list[BaseWeight]:
        """Views."""
        return [ExpertsWeight(rows) for rows in self.weight_EOI.split(outputs, dim=1)]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor itself, (E, O, I), or rounded."""
        return self.weight_EOI if dtype is None else self.weight_EOI.to(dtype)

    def plain(self) -> Tensor | None:
        """The tensor, (E, O, I)."""
        return self.weight_EOI

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of the tensor."""
        return partial(ExpertsWeight, transposed=self.transposed)


def grouped_product(x_SI: Tensor, w_EIO: Tensor, ends_E: Tensor) -> Tensor:
    """Each expert's rows times its weight, (S, O), in the dtype of the weight; differentiable in both.

    Args:
        x_SI: rows, those of expert 0 first, then those of expert 1, …
        w_EIO: the weights.
        ends_E: where the rows of each expert end, int32. Rows behind the last end belong to no expert and give zeros.
    """
    x = x_SI.to(w_EIO.dtype)
    if _runs_grouped(x, w_EIO):
        return F.grouped_mm(x, w_EIO, offs=ends_E)
    if x.is_meta:  # only sizes are asked for
        return x @ w_EIO[0]
    ends = [0, *ends_E.tolist()]
    rows = [x[start:end] @ w for start, end, w in zip(ends, ends[1:], w_EIO, strict=False)]
    return torch.cat([*rows, x.new_zeros(len(x) - ends[-1], w_EIO.shape[-1])])


def _runs_grouped(x_SI: Tensor, w_EIO: Tensor) -> bool:
    """Whether torch's grouped product takes these: bfloat16, rows and columns of 16 bytes, on GPUs from Ampere on."""
    if not hasattr(F, "grouped_mm") or x_SI.dtype != torch.bfloat16 or not x_SI.is_cuda:
        return False
    aligned = not any(size % 8 for size in w_EIO.shape[1:])
    return aligned and len(x_SI) > 0 and torch.cuda.get_device_capability(x_SI.device) >= (8, 0)
