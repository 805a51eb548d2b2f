"""The factors of several layers beside one another, so that what several thin products would do is one.

    [A₁; A₂; …]            x with it is x Aᵀ of all layers that read one x
    [s₁B₁      ]
    [     s₂B₂ ]           [dz₁ | dz₂ | …] with it is dzb of all of them, side by side
    [         …]

Both are written in one launch, rounded once to the dtype of the products, where a copy for each factor, a scaling for
each B and what joins them would be a launch each. On a GPU a launch costs more than what these move.

Legend: T tokens, I in features, O out features, R rank, C columns of all ranks and spare ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from theodora.kernels.operators import operator, runs_triton

_TOGETHER = 3
"""Layers that share a launch: q, k and v."""


def stacked_rows(all_a: Sequence[Tensor], into_RI: Tensor) -> Tensor:
    """Write all A, each (R, I), one above the other into (ΣR or more, I); what is left below them becomes zero."""
    _stacked_rows(into_RI, list(all_a))
    return into_RI


def times_scaled_b(dz_TO: Tensor, all_b: Sequence[Tensor], scales: Sequence[float], into_TC: Tensor) -> Tensor:
    """dzb = s·dz B of layers whose dz lie side by side, (T, ΣO), into the columns of (T, ΣR or more).

    What is left of the columns becomes zero.
    """
    b = dz_TO.new_empty(dz_TO.shape[1], into_TC.shape[1])
    _diagonal(b, list(all_b), list(scales))
    if not dz_TO.is_cuda:
        # In bfloat16 oneDNN's AMX kernels read on into the columns beside dz, which may hold NaN, and multiply by zero.
        dz_TO = dz_TO.contiguous()
    return torch.mm(dz_TO, b, out=into_TC)


def _run_stacked_rows(into: Tensor, all_a: Sequence[Tensor]) -> None:
    if len(all_a) <= _TOGETHER and runs_triton(into):
        from theodora.kernels.triton import beside as triton

        triton.stacked_rows(into, all_a)
        return
    at = 0
    for a in all_a:
        into[at : at + a.shape[0]].copy_(a)
        at += a.shape[0]
    into[at:].zero_()


def _run_diagonal(into: Tensor, all_b: Sequence[Tensor], scales: Sequence[float]) -> None:
    if len(all_b) <= _TOGETHER and runs_triton(into):
        from theodora.kernels.triton import beside as triton

        triton.diagonal(into, all_b, scales)
        return
    into.zero_()
    row = column = 0
    for b, scale in zip(all_b, scales, strict=True):
        # s goes in before rounding, so that it costs no precision.
        into[row : row + b.shape[0], column : column + b.shape[1]].copy_(b * scale)
        row, column = row + b.shape[0], column + b.shape[1]


_stacked_rows = operator(
    "stacked_rows(Tensor(a!) into, Tensor[] all_a) -> ()", _run_stacked_rows, lambda into, all_a: None
)
_diagonal = operator(
    "diagonal(Tensor(a!) into, Tensor[] all_b, float[] scales) -> ()", _run_diagonal, lambda into, all_b, scales: None
)
