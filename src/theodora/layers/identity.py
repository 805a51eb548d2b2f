"""A fresh adapter changes nothing, to the bit.

B is zero and g is 1, so nothing is added and nothing scaled, and the output has the base product's bits. Two things
stand in the way, and both are rounding: DoRA's bias comes after the scale, so that half precision rounds before it and
after it where the module rounds once; and start factors (PiSSA, OLoRA) are added and subtracted again. There the values
tell whether the adapter has moved yet. A look at them costs nothing on a CPU; elsewhere the host would have to wait.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from theodora import kernels
from theodora.kernels import Parts
from theodora.kernels.operators import runs_triton


def changes_nothing(parts: Parts, start: tuple[Tensor, Tensor] | None = None, rounds: bool = False) -> bool:
    """Whether the layer's output is its base's, but for rounding that `base_output` does without.

    Args:
        parts: the layer.
        start: A₀ (R, I) and B₀ (O, R), which the factors of `parts` hold behind A and B.
        rounds: whether the caller computes in a way that rounds elsewhere than the base does, in any case.
    """
    a, b, magnitude, norm = parts.a_RI, parts.b_OR, parts.magnitude_O, parts.norm_O
    rounds = rounds or start is not None or (norm is not None and parts.bias_O is not None)
    if a is None or b is None or not rounds or torch.compiler.is_compiling():
        return False
    if b.device.type != "cpu" or runs_triton(b) or (parts.weight.plain() is None and not kernels.fast()):
        return False  # (the reference does not quantise x, as a float8 module does)
    with torch.no_grad():
        if start is None:
            zero = not bool(b.any())
        else:
            rank = start[0].shape[0]
            zero = torch.equal(a[:rank], start[0]) and torch.equal(b[:, :rank], start[1])
        return zero and (norm is None or magnitude is None or torch.equal(magnitude.to(norm.dtype), norm))


def base_output(x: Tensor, parts: Parts) -> Tensor:
    """What the base module computes, (…, O), without gradient."""
    with torch.no_grad():
        return parts.weight.product(x, parts.bias_O)


def with_value_of(base: Tensor, y: Tensor) -> Tensor:
    """`base`, with the gradients of y."""
    return _ValueOf.apply(y, base)  # pyright: ignore[reportReturnType]


class _ValueOf(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, base: Tensor) -> Tensor:
        return base.view_as(base)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return dy, None
