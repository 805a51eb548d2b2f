"""Linear layers whose frozen weight lives in float8, with one float32 scale for each output row.

    quantize(module)          # in place: half the memory of bfloat16, and float8 products where the GPU has them

The module keeps its name, its hooks and its meaning: `state_dict` gives the weight that it computes with, in the dtype
it had, loading one quantises it, and moving the model to another device or dtype leaves the numbers alone. The weight
gets no gradient; the input does.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from theodora.autocast import autocast_dtype
from theodora.kernels.base_weight import BaseWeight, Float8Weight
from theodora.kernels.float8 import FLOAT8, quantize_rows
from theodora.layers.swap import Swapped, swap_class


class Float8Layer(Swapped):
    """Mixed in before a linear layer's own class by `quantize`."""

    prefix = "Float8"

    weight: nn.Parameter
    """W8, of float8_e4m3fn, as the module's own class stores it; a plain weight while an adapter is merged into it."""
    weight_scale: Tensor
    """(O,) float32: W = scale ⊙ W8."""
    bias: nn.Parameter | None
    plain_dtype: torch.dtype
    """What the weight was stored in."""
    stored_transposed: bool
    """Whether the module stores its weight as (I, O)."""

    @property
    def float8_weight(self) -> Float8Weight:
        """The weight, while it is float8."""
        return Float8Weight(self.weight, self.weight_scale, self.plain_dtype, self.stored_transposed)

    def forward(self, x: Tensor) -> Tensor:
        """x Wᵀ + bias, (…, O), in the dtype of x, or in autocast's."""
        if self.weight.dtype != FLOAT8:
            return super().forward(x)
        x = x.to(autocast_dtype(x) or x.dtype)
        weight = self.float8_weight
        z: Any = _Product.apply(x, weight.maker(), *weight.tensors())
        return z if self.bias is None else z + self.bias.to(z.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True):
        # `.to(torch.bfloat16)` would turn W8 into numbers without their scale.
        return super()._apply(lambda t: move_bits(fn, t) if t is self.weight_scale else move(fn, t), recurse)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.dtype == FLOAT8:
            destination[prefix + "weight"] = plain_weight(self, self.plain_dtype)

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        given = state_dict.get(prefix + "weight")
        if self.weight.dtype != FLOAT8 or not isinstance(given, Tensor) or given.shape != self.weight.shape:
            super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        w8, scale = _quantized(given.to(self.weight.device), self.stored_transposed)
        self.weight_scale.copy_(scale)
        super()._load_from_state_dict({**state_dict, prefix + "weight": w8}, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """As the module's own, and what it is stored in."""
        return f"{super().extra_repr()}, float8 of {str(self.plain_dtype).removeprefix('torch.')}"


class _Product(torch.autograd.Function):
    """x Wᵀ."""

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, weight_of: Callable[..., BaseWeight], *tensors: Tensor) -> Tensor:
        ctx.weight_of = weight_of
        ctx.save_for_backward(*tensors)
        return weight_of(*tensors).product(x_TI)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dz_TO: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        tensors = ctx.saved_tensors
        return ctx.weight_of(*tensors).product_backward(dz_TO), None, *(None for _ in tensors)


def quantize(module: nn.Module, stored_transposed: bool = False) -> None:
    """Put a linear layer's weight into float8, in place; each output row gets the scale that its largest value fills.

    Args:
        module: computes x Wᵀ + bias, by its own class's forward.
        stored_transposed: whether it stores its weight as (I, O).
    """
    weight: Any = module.weight
    w8, scale = _quantized(weight.detach(), stored_transposed)
    swap_class(module, Float8Layer)
    assert isinstance(module, Float8Layer)
    module.plain_dtype, module.stored_transposed = weight.dtype, stored_transposed
    module.register_buffer("weight_scale", scale, persistent=False)
    module.weight = nn.Parameter(w8, requires_grad=False)


def plain_weight(module: Float8Layer, dtype: torch.dtype) -> Tensor:
    """The weight that the module computes with, as it is stored: (O, I), or (I, O)."""
    w_OI = module.float8_weight.dense(dtype)
    return w_OI.T.contiguous() if module.stored_transposed else w_OI


def move(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn` of a tensor that `nn.Module._apply` hands on; float8 stays float8."""
    return move_bits(fn, tensor) if tensor.dtype == FLOAT8 else fn(tensor)


def move_bits(fn: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
    """`fn` of a tensor disguised as whole numbers, which no change of dtype touches."""
    disguise = {1: torch.uint8, 4: torch.int32}[tensor.element_size()]
    return fn(tensor.view(disguise)).view(tensor.dtype)


def _quantized(weight: Tensor, stored_transposed: bool) -> tuple[Tensor, Tensor]:
    """W8, in the shape of `weight`, and its scales. In memory W8 always lies as (O, I), which the products want."""
    if not stored_transposed:
        return quantize_rows(weight)
    w8_OI, scale = quantize_rows(weight.T)
    return w8_OI.T, scale
