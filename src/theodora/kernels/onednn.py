"""Products of backward passes on a CPU, in the ways of torch's libraries that are fast there.

In float32 torch takes MKL, which is Intel's. On AMD's CPUs it is half as fast as oneDNN where there is AVX-512, and
somewhat slower without. The choice goes by the maker, not by a measurement: a resumed run needs the same bits.
Forward passes stay with what the base model's own modules take, so that a fresh adapter changes no bit.

Shapes: T tokens, I in features, O out features, R rank.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

_FEW = 16  # rows; with fewer, reading the weight takes the time


def input_gradient(dz_TO: Tensor, weight_OI: Tensor, onto: Tensor | None = None) -> Tensor | None:
    """dz W, (…, I), without gradient, added `onto` in place; None where oneDNN is not the faster one."""
    if not _better(dz_TO, weight_OI):
        return None
    dx = torch.ops.mkldnn._linear_pointwise(dz_TO, weight_OI.T, None, "none", [], "")
    return dx if onto is None else onto.add_(dx)


def thin_product(left_TO: Tensor, right_OR: Tensor) -> Tensor:
    """left @ right, (T, R), for a small R.

    On a CPU it is the transpose of rightᵀ leftᵀ: libraries cut the longer side of a result into blocks, and a few
    columns fill none (up to five times as fast).
    """
    if left_TO.device.type != "cpu":
        return left_TO @ right_OR
    return (right_OR.T @ left_TO.T).T.contiguous()


def _better(dz_TO: Tensor, weight_OI: Tensor) -> bool:
    return (
        dz_TO.dtype == weight_OI.dtype == torch.float32
        and dz_TO.device.type == weight_OI.device.type == "cpu"
        and not torch.compiler.is_compiling()
        and not torch.is_grad_enabled()
        and dz_TO.numel() >= _FEW * dz_TO.shape[-1] > 0
        and weight_OI.numel() > 0
        and type(dz_TO) is Tensor
        and type(weight_OI) in (Tensor, nn.Parameter)
        and _mkl_is_slow()
        and torch.backends.mkldnn.enabled
        and not torch.is_autocast_enabled("cpu")
    )


@functools.cache
def _mkl_is_slow() -> bool:
    """Whether torch computes with MKL on a CPU of AMD's, and has oneDNN beside it."""
    return (
        torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and "AMD" in str(torch.cpu.get_capabilities().get("cpu_name", ""))
    )
