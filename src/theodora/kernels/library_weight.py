"""A frozen weight that another library stores, quantised: its tensors, and their `Format`.

It is dequantised for a product and let go of at once: the forward pass does so once, and so does the backward pass for
dx. ‖W‖² is summed over blocks of rows.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from theodora.functional import wide_dtype
from theodora.kernels import weight_norm
from theodora.kernels.base_weight import BaseWeight, PlainWeight, Stack
from theodora.kernels.formats import Format, Part
from theodora.kernels.packed import Packed
from theodora.kernels.recompute import in_a_block

_FEW_TOKENS = 1536
"""Up to so many bitsandbytes multiplies by kernels of its own, which do not dequantise into memory."""


class LibraryWeight(BaseWeight):
    """W (O, I) as a library stores it. Its products take an x of any dtype, and give outputs of that dtype."""

    __slots__ = ("_tensors", "format")

    stored = "library"

    def __init__(self, form: Format, *tensors: Tensor) -> None:
        """Of what the module holds.

        Args:
            form: how it is stored.
            tensors: what the format's docstring lists.
        """
        self.format, self._tensors = form, tensors

    @property
    def captures(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """The format's."""
        return self.format.captures

    @property
    def rounds_input(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether `product` rounds x to fewer bits than its dtype has."""
        return self.format.rounds_input

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        return self.format.shape

    @property
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for: the module's compute dtype."""
        return self.format.dtype

    @property
    def device(self) -> torch.device:
        """Where the packed numbers lie."""
        return self._tensors[0].device

    def takes(self, dtype: torch.dtype) -> bool:
        """Any floating point dtype but float64."""
        return self.format.takes(dtype)

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """Itself."""
        return self

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """The library's own."""
        if not x_TI.numel():
            return x_TI.new_empty(*x_TI.shape[:-1], self.shape[0])
        return self.format.product(self._tensors, x_TI, bias_O)

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """Of W, dequantised in the dtype that it is multiplied in."""
        dtype = self.format.computes_in(dz_TO.dtype)
        weight = PlainWeight(self.format.dense(self._tensors, dtype))
        if dtype == dz_TO.dtype:
            return weight.product_backward(dz_TO, onto)
        dx = weight.product_backward(dz_TO.to(dtype)).to(dz_TO.dtype)
        return dx if onto is None else onto.add_(dx)

    def held(self, dtype: torch.dtype) -> BaseWeight:
        """Dequantised, where it is multiplied in `dtype`."""
        return PlainWeight(self.dense(dtype)) if self.format.computes_in(dtype) == dtype else self

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Dequantised, and widened."""
        if isinstance(at, slice) and len(range(*at.indices(self.shape[0]))) == 0:
            return torch.empty(0, self.shape[1], dtype=wide_dtype(self.dtype), device=self.device)
        return self.format.rows(self._tensors, at, wide_dtype(self.dtype))

    def times_a(self, a_RI: Tensor) -> Tensor:
        """W Aᵀ: some rows at a time, or dequantised once where rows cannot be had alone."""
        return super().times_a(a_RI) if self.format.cuts else PlainWeight(self.dense()).times_a(a_RI)

    def norm_squared(self) -> Tensor:
        """‖W‖² of each output row: some rows at a time, or dequantised once where rows cannot be had alone."""
        return super().norm_squared() if self.format.cuts else PlainWeight(self.dense()).norm_squared()

    def packed(self) -> Packed | None:
        """The weight as our own kernels read it, if they can, where it lies."""
        packed = self.format.packed(self._tensors)
        return packed if packed is not None and packed.runs else None

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """By a kernel that reads the packed numbers, if it can.

        Else of half a precision in one pass over the dequantised weight; a wide one some rows at a time.
        """
        if (packed := self.packed()) is not None:
            return weight_norm.dora_norm_packed(packed, a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O)
        if wide_dtype(self.dtype) == self.dtype and self.format.cuts:
            return super().dora_norm(a_RI, b_OR, scale, w_norm_sq_O)
        return weight_norm.dora_norm(self.dense(), a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O, None)

    @classmethod
    def dora_norms(
        cls, weights: Sequence[LibraryWeight], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
    ) -> Tensor:
        """In few launches, where a kernel reads them all."""
        all_packed = [weight.packed() for weight in weights]
        packed = [one for one in all_packed if one is not None]
        if len(packed) < len(weights) or len({(one.form[:-1], one.table, one.dtype) for one in packed}) > 1:
            return super().dora_norms(weights, a_NRI, b_NOR, scale, w_norm_sq_NO)
        return weight_norm.dora_norms_packed(packed, a_NRI, b_NOR, scale, w_norm_sq_NO)

    def split(self, outputs: int) -> list[BaseWeight]:
        """Rows of the same tensors."""
        rows = self.shape[0]
        ends = [(start, min(start + outputs, rows)) for start in range(0, rows, outputs)]
        return [LibraryWeight(Part.of(self.format, start, stop), *self._tensors) for start, stop in ends]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantised."""
        return self.format.dense(self._tensors, dtype or self.dtype)

    def plain(self) -> Tensor | None:
        """None."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """What the module holds."""
        return self._tensors

    def watched(self) -> tuple[Tensor, ...]:
        """The plain tensors behind these."""
        return self.format.watched(self._tensors)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of the same format."""
        return partial(LibraryWeight, self.format)


class LibraryStack(Stack):
    """A stack of weights that are dequantised into it, each time that it is asked for.

    It holds nothing but the weights' own tensors, and is made anew in each pass.
    """

    __slots__ = ("_weights", "outputs")

    def __init__(self, weights: Sequence[LibraryWeight]) -> None:
        self._weights, self.outputs = list(weights), sum(weight.shape[0] for weight in weights)

    @classmethod
    def of(cls, weights: Sequence[BaseWeight], x_TI: Tensor) -> LibraryStack | None:
        """Of weights that our kernels can read packed, where x (T, I) is worth their copies in memory; else None.

        Not in a checkpointed block, whose memory is what a step takes at most.
        """
        if x_TI.shape[0] <= _FEW_TOKENS or in_a_block() or torch.compiler.is_compiling():
            return None
        found = [weight for weight in weights if isinstance(weight, LibraryWeight) and weight.packed() is not None]
        if len(found) < len(weights) or len({weight.shape[1] for weight in found}) > 1:
            return None
        own = all(not w.rounds_input and w.dtype == w.format.computes_in(x_TI.dtype) == x_TI.dtype for w in found)
        return cls(found) if own else None

    def holds(self, weights: Sequence[BaseWeight], ranks: int) -> bool:
        """Whether they are the very ones."""
        return len(weights) == len(self._weights) and all(map(operator.is_, weights, self._weights))

    def _top(self, rows: int) -> Tensor:
        first = self._weights[0]
        buffer, at = torch.empty(rows, first.shape[1], dtype=first.dtype, device=first.device), 0
        for weight in self._weights:
            weight.format.dense_into(weight.tensors(), buffer[at : at + weight.shape[0]])
            at += weight.shape[0]
        return buffer
