"""Where training starts: A, B and, for starts taken from the weight itself, the frozen start factors.

Every start leaves the model's output unchanged: either B·A is zero, or B₀·A₀ is subtracted again (see `LowRank`).
Random numbers are drawn on the CPU from torch's global generator, so that a seed gives the same start on any device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from theodora.kernels.base_weight import BaseWeight, PlainWeight
from theodora.kernels.experts_weight import ExpertsWeight
from theodora.kernels.operators import is_on_paper

# Above this size the principal singular vectors come from a randomised decomposition, which is far faster.
_EXACT_SVD = 2048


def start_values(
    init: str, weight: BaseWeight | Tensor, rank: int, scale: float, embedding: bool = False
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    """A (R, I), B (O, R) and the start factors (A₀, B₀) or None; float32, on the weight's device.

    Of experts (E, O, I) each starts by itself: A (E, R, I), B (E, O, R).

    The values of the weight (O, I) are read for starts that are taken from it (pissa, olora), and for no others.

    Raises:
        ValueError: the rank is larger than the weight has singular values (pissa, olora).
    """
    if isinstance(weight, ExpertsWeight):
        return _of_experts(init, weight, rank, scale)
    weight = PlainWeight(weight) if isinstance(weight, Tensor) else weight
    out_features, in_features = weight.shape
    if init in ("pissa", "olora"):
        if rank > min(weight.shape):
            raise ValueError(f"init={init!r} needs a rank of at most {min(weight.shape)} here, found {rank}")
        if is_on_paper():
            a, b = _sizes(rank, *weight.shape)
            return a, b, _sizes(rank, *weight.shape)
        with torch.no_grad():
            w_OI = weight.dense().float()
            a, b = _principal(w_OI, rank, scale) if init == "pissa" else _qr(w_OI, rank)
            # Rounding leaves about 1e-9 in the rows of B where W has zeros: DoRA would take it for a direction.
            b[(w_OI == 0).all(1)] = 0
        return a.clone(), b.clone(), (a, b)
    if is_on_paper():
        return *_sizes(rank, *weight.shape), None
    if init == "orthogonal":
        # Both factors differ from zero, yet B·A = 0: their rank dimensions lie in orthogonal subspaces.
        q = torch.linalg.qr(torch.randn(rank, rank))[0]
        a = (torch.randn(in_features, rank // 2) @ q[0::2]).T / 10
        b = torch.randn(out_features, rank // 2) @ q[1::2] / 10
    elif embedding:
        # A lookup's gradient reaches only the tokens of a batch: it is B that must differ from zero (as in PEFT).
        a, b = torch.zeros(rank, in_features), torch.randn(out_features, rank)
    else:
        b = torch.zeros(out_features, rank)
        if init == "gaussian":
            a = torch.randn(rank, in_features) / rank
        else:
            a = torch.nn.init.kaiming_uniform_(torch.empty(rank, in_features), a=math.sqrt(5))
    return a.contiguous().to(weight.device), b.contiguous().to(weight.device), None


def _of_experts(
    init: str, weight: ExpertsWeight, rank: int, scale: float
) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor] | None]:
    a, b, starts = zip(*(start_values(init, w_OI, rank, scale) for w_OI in weight.dense()), strict=True)
    starting = [start for start in starts if start is not None]
    first, second = (torch.stack(factors) for factors in zip(*starting, strict=True)) if starting else (None, None)
    start = None if first is None or second is None else (first, second)
    return torch.stack(a), torch.stack(b), start


def _sizes(rank: int, outputs: int, inputs: int) -> tuple[Tensor, Tensor]:
    return torch.empty(rank, inputs, device="meta"), torch.empty(outputs, rank, device="meta")


def _principal(w_OI: Tensor, rank: int, scale: float) -> tuple[Tensor, Tensor]:
    """PiSSA: s·B·A is the best rank-R approximation of W (arXiv 2404.02948)."""
    if min(w_OI.shape) <= _EXACT_SVD:
        u, s, vh = torch.linalg.svd(w_OI, full_matrices=False)
        u, s, vh = u[:, :rank], s[:rank], vh[:rank]
    else:
        u, s, v = torch.svd_lowrank(w_OI, q=rank + 8, niter=8)
        u, s, vh = u[:, :rank], s[:rank], v[:, :rank].T
    root = (s / scale).sqrt()
    return (root[:, None] * vh).contiguous(), (u * root).contiguous()


def _qr(w_OI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """OLoRA: B spans the first R orthonormal directions of W = Q·R (arXiv 2406.01775)."""
    q, r = torch.linalg.qr(w_OI)
    return r[:rank].contiguous(), q[:, :rank].contiguous()
