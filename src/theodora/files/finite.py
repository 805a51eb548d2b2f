"""Whether tensors hold finite numbers, asked cheaply: many small ones, or whole models.

This is the one place that says what "not finite" is. Whatever is saved as finite was asked here, in the dtype that it
is saved in: a value may be fine in float32 and infinite in float16.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

import numpy as np
import torch
from torch import Tensor

from theodora.files.distrust import FLOAT_DTYPES

DTYPES = tuple(FLOAT_DTYPES.values())
"""Safetensors files know more kinds of numbers; no adapter is stored in them."""
_TOGETHER = 2**24  # numbers that are asked about at once: they are copied for it, 64 MiB of float32


def finite(tensor: Tensor) -> bool:
    """Whether all values are finite numbers.

    NumPy answers for tensors on the CPU: an adapter has hundreds of small ones, and on a busy machine torch, whose
    threads wait for one another, took milliseconds for each.
    """
    tensor = tensor.detach()
    if tensor.dtype not in DTYPES:
        return _finite_otherwise(tensor)
    if tensor.device.type != "cpu" or _is_spread(tensor):
        return bool(tensor.isfinite().all())
    if tensor.dtype == torch.bfloat16:  # which NumPy does not know: its exponent's bits, all set
        return bool((tensor.view(torch.int16).numpy() & 0x7F80 != 0x7F80).all())
    return bool(np.isfinite(tensor.numpy()).all())


def _finite_otherwise(tensor: Tensor) -> bool:
    """The same for whole numbers, and for kinds of floats that know few operations."""
    if not tensor.is_floating_point() or "float4" in str(tensor.dtype):  # four bits have no NaN
        return True
    return bool(tensor.float().isfinite().all())


def _is_spread(tensor: Tensor) -> bool:
    """Whether processes have a share of it each, and answer together."""
    return hasattr(tensor, "to_local")


def not_finite(tensors: Iterable[tuple[str, Tensor]]) -> list[str]:
    """The names of those that hold NaN or infinite values."""
    named = list(tensors)
    if all_finite_on_gpu([tensor for _, tensor in named]):
        return []
    return [name for name, tensor in named if not finite(tensor)]


def all_finite_on_gpu(tensors: Collection[Tensor]) -> bool:
    """Whether all are on a GPU and finite: asked at once, because each answer has to be waited for."""
    if not tensors or not all(t.is_cuda and t.dtype in DTYPES and not _is_spread(t) for t in tensors):
        return False
    answers: list[Tensor] = []
    for dtype in {t.dtype for t in tensors}:
        flat = [t.detach().flatten() for t in tensors if t.dtype == dtype]
        pieces, size = [[]], 0
        for t in flat:
            if size > _TOGETHER:
                pieces.append([])
                size = 0
            pieces[-1].append(t)
            size += t.numel()
        answers += [torch.cat(piece).isfinite().all() for piece in pieces]
    return bool(torch.stack(answers).all())
