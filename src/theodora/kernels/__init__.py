"""Faster ways to run `theodora.functional`, with the same signatures; one switch chooses.

y = kernels.dora_linear(x, w, bias, a, b, scale, magnitude, norm)     # fast where it can be
with kernels.reference():                                             # everything through functional.py
    ...
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from theodora import functional
from theodora.kernels import fused

__all__ = ["dora_linear", "lora_linear", "reference"]

# A plain global, because torch.compile can guard on one and breaks its graph at anything finer.
_use_reference = False


@contextmanager
def reference() -> Iterator[None]:
    """Run the plain formulas of `functional.py` inside the block, whatever could be faster."""
    global _use_reference
    before, _use_reference = _use_reference, True
    try:
        yield
    finally:
        _use_reference = before


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
    """`functional.lora_linear`, by the fastest way that fits the inputs."""
    run = fused.lora_linear if _fits(x_TI, w_OI, bias_O) else functional.lora_linear
    return run(x_TI, w_OI, bias_O, a_RI, b_OR, scale, x_lora_TI=x_lora_TI)


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
    """`functional.dora_linear`, by the fastest way that fits the inputs."""
    run = fused.dora_linear if _fits(x_TI, w_OI, bias_O) else functional.dora_linear
    return run(x_TI, w_OI, bias_O, a_RI, b_OR, scale, magnitude_O, norm_O, x_lora_TI=x_lora_TI)


def _fits(x_TI: Tensor, w_OI: Tensor, bias_O: Tensor | None) -> bool:
    """Whether the fused path, whose base weight and bias are frozen, can take these inputs."""
    trained = w_OI.requires_grad or (bias_O is not None and bias_O.requires_grad)
    return not (_use_reference or trained or x_TI.numel() == 0 or x_TI.dtype != w_OI.dtype)
