"""The frozen base weight W (O, I), whatever it is stored in: the one thing that layers, kernels and caches hold of it.

    z = weight.product(x)                  dx = weight.product_backward(dz)

`PlainWeight` is a tensor, `Float8Weight` one of float8 with a scale for each output row (see `float8.py`), and
`StackedWeight` several plain ones, one above the other in memory. A new kind is a class here and a line in
`theodora.layers.base_weights`, which recognises how a module stores its weight.

Shapes: T tokens, I in features, O out features, R rank, N weights.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodora import functional
from theodora.functional import row_norm_squared, wide_dtype
from theodora.kernels import onednn, weight_norm
from theodora.kernels.beside import stacked_rows
from theodora.kernels.float8 import (
    dequantized,
    float8_linear,
    float8_linear_backward,
    float8_product,
    quantize_rows,
)
from theodora.kernels.packed import Packed

_ALIGNED = 16  # columns; what the tensor cores read at once


class BaseWeight(ABC):
    """A frozen weight. It gets no gradient; what is multiplied by it does, in `product_backward`.

    An object is a view of tensors that a module owns: cheap to make, made anew in each pass, and never changed.
    """

    __slots__ = ()

    stored: ClassVar[str]
    """What the numbers lie in: "plain" (a tensor of a floating point dtype), "float8", or "library" (as another one
    quantises: `library_weight.py`)."""
    captures: ClassVar[bool] = True
    """Whether its products may run inside a CUDA graph."""
    lies_still: ClassVar[bool] = True
    """Whether the memory of `plain()` stays the weight's from pass to pass, so that it may lie in a stack."""
    rounds_input: ClassVar[bool] = False
    """Whether `product` rounds x to fewer bits than its dtype has."""
    product_takes_bias: ClassVar[bool] = True
    """Whether a bias that joins `product` is rounded once with it, as in `nn.Linear`."""
    backward_adds: ClassVar[bool] = True
    """Whether `product_backward` adds onto another tensor in the pass that makes it."""
    backward_in_slices: ClassVar[bool] = True
    """Whether `product_backward` of some tokens at a time costs no more than that of all at once."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(O, I)."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Of the numbers that it stands for, and of products with inputs of that dtype."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it lies."""

    @abstractmethod
    def takes(self, dtype: torch.dtype) -> bool:
        """Whether products take inputs of `dtype`, and give outputs of it."""

    @abstractmethod
    def to(self, dtype: torch.dtype) -> BaseWeight:
        """The same weight, whose products take inputs of `dtype`: for what runs under autocast."""

    @abstractmethod
    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """x Wᵀ + bias, (…, O), in the dtype of x, (…, I), without gradient.

        `shared` is what `shared_input` made of x, for several weights at once.
        """

    @abstractmethod
    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """dz W, (…, I), in the dtype of dz: the gradient of x in `product`. Where `backward_adds`, added `onto`."""

    def held(self, dtype: torch.dtype) -> BaseWeight:
        """The same weight for several products in a row with tensors of `dtype`: dequantised once, while it is held."""
        return self

    @staticmethod
    def shared_input(x_TI: Tensor) -> Any:
        """What products of one x with several weights of this kind need to make only once, if anything."""
        return None

    @abstractmethod
    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Rows of W, (…, I), float32 (float64 where the weight is): the numbers that it stands for."""

    def times_a(self, a_RI: Tensor) -> Tensor:
        """W Aᵀ, (O, R), as wide as `rows`, some rows at a time."""
        wide = wide_dtype(self.dtype)
        return torch.cat([self.rows(at) @ a_RI.to(wide).T for at in functional.row_slices(*self.shape)])

    def norm_squared(self) -> Tensor:
        """‖W‖² of each output row, (O,), as wide as `rows`."""
        return torch.cat([self.rows(at).square().sum(1) for at in functional.row_slices(*self.shape)])

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """‖W + s·B·A‖ of each output row, (O,), as wide as `rows`, without gradient; `w_norm_sq_O` is ‖W‖²."""
        with torch.no_grad():
            return functional.dora_norm_of(self.times_a, self.rows, a_RI, b_OR, scale, w_norm_sq_O)

    @classmethod
    def dora_norms(
        cls, weights: Sequence[Any], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
    ) -> Tensor:
        """`dora_norm` of several weights of this kind and of one shape, (N, O)."""
        each = zip(weights, a_NRI, b_NOR, w_norm_sq_NO, strict=True)
        return torch.stack([weight.dora_norm(a, b, scale, norm_sq) for weight, a, b, norm_sq in each])

    @abstractmethod
    def split(self, outputs: int) -> list[BaseWeight]:
        """The weight cut after each `outputs` rows, as weights of their own that share its memory."""

    @abstractmethod
    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """W as one tensor, (O, I); a plain one of that dtype is given itself. Without a dtype no number is rounded."""

    @abstractmethod
    def plain(self) -> Tensor | None:
        """The tensor, (O, I), that the weight is; None where it is stored otherwise.

        For what reads W itself (decoding, stacks): the module's own parameter, unless that is transposed.
        """

    def packed(self) -> Packed | None:
        """The weight as our own kernels read numbers of a few bits; None where it is none or they cannot."""
        return None

    @abstractmethod
    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that it is made of, as the module holds them: what autograd saves."""

    def watched(self) -> tuple[Tensor, ...]:
        """The memory behind them, by which caches notice a change."""
        return self.tensors()

    @abstractmethod
    def maker(self) -> Callable[..., BaseWeight]:
        """What makes the same weight of `tensors()`. It holds none of them: who saves and moves them is free to."""


class _TensorWeight(BaseWeight):
    """A weight that is a tensor of a floating point dtype."""

    __slots__ = ()

    stored = "plain"

    @property
    @abstractmethod
    def weight_OI(self) -> Tensor:
        """The tensor, (O, I)."""

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        outputs, inputs = self.weight_OI.shape
        return outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        """The tensor's."""
        return self.weight_OI.dtype

    @property
    def device(self) -> torch.device:
        """The tensor's."""
        return self.weight_OI.device

    def takes(self, dtype: torch.dtype) -> bool:
        """Only its own."""
        return dtype == self.dtype

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """Itself, or rounded."""
        return self if dtype == self.dtype else PlainWeight(self.weight_OI.to(dtype))

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """The library's own."""
        return F.linear(x_TI, self.weight_OI, bias_O)

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """The library's own, added in the same pass."""
        if (dx := onednn.input_gradient(dz_TO, self.weight_OI, onto)) is not None:
            return dx
        return dz_TO @ self.weight_OI if onto is None else add_product(onto, dz_TO, self.weight_OI)

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Widened."""
        return self.weight_OI[at].to(wide_dtype(self.dtype))

    def norm_squared(self) -> Tensor:
        """Of the tensor's rows."""
        return row_norm_squared(self.weight_OI)

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """By a kernel that reads W once."""
        return weight_norm.dora_norm(self.weight_OI, a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O, None)

    @classmethod
    def dora_norms(
        cls, weights: Sequence[_TensorWeight], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
    ) -> Tensor:
        """On a GPU in few launches."""
        return weight_norm.dora_norms([weight.weight_OI for weight in weights], a_NRI, b_NOR, scale, w_norm_sq_NO)

    def split(self, outputs: int) -> list[BaseWeight]:
        """Views."""
        return [PlainWeight(rows) for rows in self.weight_OI.split(outputs)]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The tensor itself, or rounded."""
        return self.weight_OI if dtype is None else self.weight_OI.to(dtype)

    def plain(self) -> Tensor | None:
        """The tensor."""
        return self.weight_OI


@dataclass(frozen=True, slots=True, eq=False)
class PlainWeight(_TensorWeight):
    """A tensor of a floating point dtype."""

    tensor: Tensor
    """As the module holds it: (O, I), or (I, O)."""
    transposed: bool = False
    """Whether it is (I, O), as in GPT-2's `Conv1D` and in embeddings."""

    @property
    def weight_OI(self) -> Tensor:
        """The tensor, (O, I)."""
        return self.tensor.T if self.transposed else self.tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensor."""
        return (self.tensor,)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of the tensor."""
        return partial(PlainWeight, transposed=self.transposed)


@dataclass(frozen=True, slots=True, eq=False)
class Float8Weight(BaseWeight):
    """W ≈ scale ⊙ W8, see `float8.py`. Its products round x to float8 as it comes, whatever its dtype."""

    stored = "float8"
    rounds_input = True
    product_takes_bias = False
    backward_adds = False
    backward_in_slices = False  # on a GPU W8 is transposed for each product

    tensor: Tensor
    """W8, float8_e4m3fn, as the module holds it: (O, I), or (I, O)."""
    scale_O: Tensor
    """Of each row, (O,), float32."""
    plain_dtype: torch.dtype
    """What the weight was stored in."""
    transposed: bool = False
    """Whether W8 is held as (I, O)."""

    @property
    def w8_OI(self) -> Tensor:
        """W8, (O, I)."""
        return self.tensor.T if self.transposed else self.tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(O, I)."""
        outputs, inputs = self.w8_OI.shape
        return outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        """What the weight was stored in."""
        return self.plain_dtype

    @property
    def device(self) -> torch.device:
        """Where W8 lies."""
        return self.tensor.device

    def takes(self, dtype: torch.dtype) -> bool:
        """Any."""
        return True

    def to(self, dtype: torch.dtype) -> BaseWeight:
        """Itself."""
        return self

    def product(self, x_TI: Tensor, bias_O: Tensor | None = None, shared: Any = None) -> Tensor:
        """Of x8 and W8, and the bias added to what was rounded."""
        if shared is None:
            z = float8_linear(x_TI, self.w8_OI, self.scale_O)
        else:
            x8_TI, x_scale_T = shared
            z = float8_product(x8_TI, x_scale_T, self.w8_OI, self.scale_O, x_TI.dtype)
        return z if bias_O is None else z + bias_O.to(z.dtype)

    def product_backward(self, dz_TO: Tensor, onto: Tensor | None = None) -> Tensor:
        """Of d8 and W8."""
        dx = float8_linear_backward(dz_TO, self.w8_OI, self.scale_O)
        return dx if onto is None else onto + dx

    @staticmethod
    def shared_input(x_TI: Tensor) -> Any:
        """x8 (T, I) and its scales (T,), for x of two dimensions."""
        return quantize_rows(x_TI) if x_TI.dim() == 2 else None

    def rows(self, at: slice | Tensor = slice(None)) -> Tensor:
        """Dequantised."""
        return dequantized(self.w8_OI[at], self.scale_O[at], torch.float32)

    def norm_squared(self) -> Tensor:
        """Of W8's rows, times scale²."""
        return row_norm_squared(self.w8_OI) * self.scale_O.square()

    def dora_norm(self, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
        """By a kernel that reads W8 once."""
        return weight_norm.dora_norm(self.w8_OI, a_RI.detach(), b_OR.detach(), scale, w_norm_sq_O, self.scale_O)

    @classmethod
    def dora_norms(
        cls, weights: Sequence[Float8Weight], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
    ) -> Tensor:
        """On a GPU in few launches."""
        scale_NO = torch.stack([weight.scale_O for weight in weights])
        return weight_norm.dora_norms([weight.w8_OI for weight in weights], a_NRI, b_NOR, scale, w_norm_sq_NO, scale_NO)

    def split(self, outputs: int) -> list[BaseWeight]:
        """Views, of W8 and of the scales."""
        each = zip(self.w8_OI.split(outputs), self.scale_O.split(outputs), strict=True)
        return [Float8Weight(w8_OI, scale_O, self.plain_dtype) for w8_OI, scale_O in each]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """Dequantised, in float32 if no dtype is given, which holds every product of W8 and scale closely enough."""
        return dequantized(self.w8_OI, self.scale_O, dtype or torch.float32)

    def plain(self) -> Tensor | None:
        """None."""
        return None

    def tensors(self) -> tuple[Tensor, ...]:
        """W8 and its scales."""
        return self.tensor, self.scale_O

    def maker(self) -> Callable[..., BaseWeight]:
        """Of W8 and its scales."""
        return partial(Float8Weight, plain_dtype=self.plain_dtype, transposed=self.transposed)


class Stack(_TensorWeight):
    """Weights that read one x, one above the other, with spare rows behind them for the adapters' A.

    z = x [W₁; W₂; …]ᵀ is one product, and so is dx = [dz₁ | dz₂ | … | dzb] [W₁; W₂; …; A], low-rank branch included.
    """

    outputs: int
    """ΣO."""

    def dissolve(self) -> None:
        """Give each weight data of its own again, where it has none."""

    @abstractmethod
    def holds(self, weights: Sequence[BaseWeight], ranks: int) -> bool:
        """Whether the weights lie in it, in this order, and `ranks` rows of A fit behind them."""

    def columns(self, ranks: int) -> int:
        """ΣO + ΣR, rounded up: the width of [dz₁ | dz₂ | … | dzb]."""
        return self.outputs + -(-ranks // _ALIGNED) * _ALIGNED

    @abstractmethod
    def _top(self, rows: int) -> Tensor:
        """So many of its rows: all weights, and room behind them."""

    @property
    def weight_OI(self) -> Tensor:
        """All weights, (ΣO, I)."""
        return self._top(self.outputs)

    def with_a(self, all_a: Sequence[Tensor]) -> Tensor:
        """All weights and all A, each (R, I), behind them, (columns(ΣR), I)."""
        weights_and_a = self._top(self.columns(sum(a.shape[0] for a in all_a)))
        stacked_rows(all_a, weights_and_a[self.outputs :])
        return weights_and_a

    def tensors(self) -> tuple[Tensor, ...]:
        """All weights, as one tensor."""
        return (self.weight_OI,)

    def maker(self) -> Callable[..., BaseWeight]:
        """Of that tensor."""
        return PlainWeight


class StackedWeight(Stack):
    """A stack of plain weights that lie so in memory.

    The weights stay parameters of their own: their data are views of one buffer (ΣO + spare, I), which is their storage
    and held by nothing else: where they move (`model.to("cpu")`) its memory is free again. Whoever gives a parameter
    other data (a move to another device, a merge) takes it out of the buffer, which `holds` notices.
    """

    def __init__(self, weights: Sequence[nn.Parameter], ranks: int) -> None:
        """Move the data of `weights` (each (O, I), contiguous) into one buffer with room for `ranks` rows of A."""
        self.weights = list(weights)
        self.outputs = sum(w.shape[0] for w in weights)
        spare = -(-ranks // _ALIGNED) * _ALIGNED
        self._buffer, self._dtype = (self.outputs + spare, weights[0].shape[1]), weights[0].dtype
        with torch.inference_mode(False):  # they may train adapters later
            buffer, at = weights[0].data.new_zeros(self._buffer), 0
            for w in weights:
                buffer[at : at + w.shape[0]].copy_(w.data)
                w.data = buffer[at : at + w.shape[0]]
                at += w.shape[0]

    def dissolve(self) -> None:
        """Give each weight data of its own again."""
        if self._lie_here(self.weights):
            for w in self.weights:
                w.data = w.data.clone()

    def holds(self, weights: Sequence[BaseWeight], ranks: int) -> bool:
        """Whether they are views of the buffer."""
        if self.outputs + ranks > self._buffer[0]:
            return False
        tensors = [weight.plain() for weight in weights]
        return self._lie_here([t for t in tensors if t is not None]) and not any(t is None for t in tensors)

    def _lie_here(self, weights: Sequence[Tensor]) -> bool:
        start = at = self.weights[0].untyped_storage().data_ptr()
        for w in weights:
            # Storages of their own may lie one behind the other, too.
            if w.data_ptr() != at or w.untyped_storage().data_ptr() != start:
                return False
            if w.dtype != self._dtype or not w.is_contiguous() or w.dim() != 2:
                return False
            at += w.numel() * w.element_size()
        return at == start + self.outputs * self._buffer[1] * self._dtype.itemsize

    def columns(self, ranks: int) -> int:
        """Not beyond the buffer."""
        return min(super().columns(ranks), self._buffer[0])

    def _top(self, rows: int) -> Tensor:
        inputs = self._buffer[1]
        return self.weights[0].data.as_strided((rows, inputs), (inputs, 1))


def products(
    x_TI: Tensor, weights: Sequence[BaseWeight], biases: Sequence[Tensor | None] | None = None
) -> list[Tensor]:
    """`product` of one x, (…, I), with several weights and their biases; what weights of a kind share is made once."""
    kinds = [type(weight) for weight in weights]
    shared: dict[type[BaseWeight], Any] = {}
    for kind in kinds:
        if kind not in shared and kinds.count(kind) > 1:
            shared[kind] = kind.shared_input(x_TI)
    each = zip(weights, [None] * len(weights) if biases is None else biases, strict=True)
    return [weight.product(x_TI, bias, shared.get(type(weight))) for weight, bias in each]


def dora_norms(
    weights: Sequence[BaseWeight], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
) -> Tensor:
    """`dora_norm` of several weights of one kind and shape, (N, O), without gradient: on a GPU in few launches."""
    return type(weights[0]).dora_norms(weights, a_NRI, b_NOR, scale, w_norm_sq_NO)


def add_product(onto: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """onto + left @ right, in place: one pass, and no memory.

    Not under torch.compile, which does such things itself: torch 2.11 loses the gradients, without a word, of an
    autograd function that returns a tensor it wrote to (2.13 does not).
    """
    return torch.addmm(onto, left, right) if torch.compiler.is_compiling() else onto.addmm_(left, right)
