"""Faster ways to run `theodora.functional`, with the same signatures; one switch chooses.

y = kernels.dora_linear(x, w, bias, a, b, scale, magnitude, norm)     # fast where it can be
with kernels.reference():                                             # everything through functional.py
    ...
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from theodora import functional
from theodora.kernels import decode, fused
from theodora.kernels.base_weight import BaseWeight, PlainWeight, StackedWeight
from theodora.kernels.parts import Parts
from theodora.kernels.shared_outputs import SharedOutputs

__all__ = [
    "BaseWeight",
    "Parts",
    "PlainWeight",
    "SharedOutputs",
    "StackedWeight",
    "adapted_linears",
    "decode",
    "dora_linear",
    "fast",
    "fits",
    "lora_linear",
    "reference",
]

# A plain global, because torch.compile can guard on one and breaks its graph at anything finer.
_use_reference = False


@contextmanager
def reference() -> Iterator[None]:
    """Inside the block every layer runs `theodora.functional` itself, line by line."""
    global _use_reference
    before, _use_reference = _use_reference, True
    try:
        yield
    finally:
        _use_reference = before


def fast() -> bool:
    """Whether the fast ways are on, which `reference` turns off."""
    return not _use_reference


def adapted_linears(
    x_TI: Tensor,
    layers: Sequence[Parts],
    x_lora_TI: Tensor | None = None,
    stack: StackedWeight | None = None,
    shared: SharedOutputs | None = None,
) -> list[Tensor]:
    """The outputs of layers that read the same x, each (…, O), by the fastest way that fits the inputs.

    `x_lora_TI` is what the low-rank branches see instead of x (x after dropout); `stack` may hold the weights; with
    `shared`, somebody else keeps the outputs (see `shared_outputs.py`).
    """
    if all(fits(x_TI, layer) for layer in layers):
        return fused.adapted_linears(x_TI, layers, x_lora_TI, stack, shared)
    return [_reference_linear(x_TI, layer, x_lora_TI) for layer in layers]


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
    return adapted_linears(x_TI, [Parts(PlainWeight(w_OI), bias_O, a_RI, b_OR, scale)], x_lora_TI)[0]


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
    layer = Parts(PlainWeight(w_OI), bias_O, a_RI, b_OR, scale, magnitude_O, norm_O)
    return adapted_linears(x_TI, [layer], x_lora_TI)[0]


def fits(x_TI: Tensor, layer: Parts) -> bool:
    """Whether the fused path, whose base weight and bias are frozen, can take these inputs."""
    frozen = not any(t.requires_grad for t in (*layer.weight.tensors(), layer.bias_O) if t is not None)
    return not _use_reference and frozen and x_TI.numel() > 0 and layer.weight.takes(x_TI.dtype)


def _reference_linear(x_TI: Tensor, layer: Parts, x_lora_TI: Tensor | None) -> Tensor:
    w = layer.weight.plain()
    w = layer.weight.dense(x_TI.dtype) if w is None else w
    a, b, magnitude, norm = layer.a_RI, layer.b_OR, layer.magnitude_O, layer.norm_O
    if a is None or b is None:
        return torch.nn.functional.linear(x_TI, w, layer.bias_O)
    if magnitude is None or norm is None:
        return functional.lora_linear(x_TI, w, layer.bias_O, a, b, layer.scale, x_lora_TI=x_lora_TI)
    return functional.dora_linear(x_TI, w, layer.bias_O, a, b, layer.scale, magnitude, norm, x_lora_TI=x_lora_TI)
