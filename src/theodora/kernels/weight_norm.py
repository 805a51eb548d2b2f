"""‖W + s·B·A‖ of each output row in one pass over W: `functional.dora_norm` as an operator.

Plain torch widens W to float32 piece by piece, which moves five times the bytes. The Triton kernel reads W once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from theodora import functional
from theodora.functional import wide_dtype
from theodora.kernels.float8 import dequantized
from theodora.kernels.operators import operator, runs_triton
from theodora.kernels.packed import DTYPES, Packed


def dora_norm_reference(
    w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor, w_scale_O: Tensor | None
) -> Tensor:
    """‖W + s·B·A‖ of each output row, (O,), float32 or float64; `w_norm_sq_O` is ‖W‖² of each row.

    With `w_scale_O` the weight is float8, and W its rows times that scale.
    """
    w_OI = w_OI if w_scale_O is None else dequantized(w_OI, w_scale_O, torch.float32)
    return functional.dora_norm(w_OI, a_RI, b_OR, scale, w_norm_sq_O)


def _dora_norm(w: Tensor, a: Tensor, b: Tensor, scale: float, w_norm_sq: Tensor, w_scale: Tensor | None) -> Tensor:
    if not runs_triton(w):
        return dora_norm_reference(w, a, b, scale, w_norm_sq, w_scale)
    from theodora.kernels.triton import weight_norm as triton

    return triton.dora_norm(w, a, b, scale, w_norm_sq, w_scale)


dora_norm = operator(
    "dora_norm(Tensor w, Tensor a, Tensor b, float scale, Tensor w_norm_sq, Tensor? w_scale) -> Tensor",
    _dora_norm,
    lambda w, a, b, scale, w_norm_sq, w_scale: w.new_empty(w.shape[0], dtype=wide_dtype(w.dtype)),
)


def dora_norms(
    ws: Sequence[Tensor],
    a_NRI: Tensor,
    b_NOR: Tensor,
    scale: float,
    w_norm_sq_NO: Tensor,
    w_scale_NO: Tensor | None = None,
) -> Tensor:
    """`dora_norm` of several weights of one shape, (N, O), without gradient: on a GPU in few launches."""
    if runs_triton(ws[0]) and (ws[0].dtype == torch.bfloat16 or w_scale_NO is not None):
        from theodora.kernels.triton import weight_norm as triton

        found = triton.dora_norms(ws, a_NRI, b_NOR, scale, w_norm_sq_NO, w_scale_NO)
        if found is not None:
            return found
    scales = [None] * len(ws) if w_scale_NO is None else w_scale_NO
    each = zip(ws, a_NRI, b_NOR, w_norm_sq_NO, scales, strict=True)
    return torch.stack([dora_norm(w, a, b, scale, w_norm_sq, w_scale) for w, a, b, w_norm_sq, w_scale in each])


def _stack_norms(w: Tensor, a: Tensor, b: Tensor, scale: float, w_norm_sq: Tensor) -> Tensor:
    if w.dtype != torch.bfloat16 or not runs_triton(w):
        return functional.dora_norm(w, a, b, scale, w_norm_sq)
    from theodora.kernels.triton import weight_norm as triton

    return triton.stack_norms(w, a, b, scale, w_norm_sq)


_stack = operator(
    "dora_norm_stack(Tensor w, Tensor a, Tensor b, float scale, Tensor w_norm_sq) -> Tensor",
    _stack_norms,
    lambda w, a, b, scale, w_norm_sq: w.new_empty(w.shape[:2], dtype=wide_dtype(w.dtype)),
)


def stack_norms(w_NOI: Tensor, a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor) -> Tensor:
    """`dora_norm` of several weights that lie in one tensor, (N, O), without gradient: on a GPU in few launches."""
    return _stack(w_NOI, a_NRI, b_NOR, scale, w_norm_sq_NO)


def _dora_norm_packed(
    a: Tensor, b: Tensor, scale: float, w_norm_sq: Tensor, w: list[Tensor], form: list[int], table: str, dtype: int
) -> Tensor:
    from theodora.kernels.triton import packed as triton

    weight = Packed(tuple(w), tuple(form), table, DTYPES[dtype])
    return triton.dora_norms([weight], a[None], b[None], scale, w_norm_sq[None])[0]


_packed = operator(
    "dora_norm_packed(Tensor a, Tensor b, float scale, Tensor w_norm_sq, Tensor[] w, int[] form, str table, int dtype)"
    " -> Tensor",
    _dora_norm_packed,
    lambda a, b, scale, w_norm_sq, *_: torch.empty_like(w_norm_sq),
)


def dora_norm_packed(weight: Packed, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor) -> Tensor:
    """`dora_norm` of a packed weight that `runs`, (O,) float32, by a kernel that reads its numbers once."""
    rest = list(weight.tensors), list(weight.form), weight.table, DTYPES.index(weight.dtype)
    return _packed(a_RI, b_OR, scale, w_norm_sq_O, *rest)


def dora_norms_packed(
    weights: Sequence[Packed], a_NRI: Tensor, b_NOR: Tensor, scale: float, w_norm_sq_NO: Tensor
) -> Tensor:
    """`dora_norm_packed` of several weights of one shape and form, (N, O): in few launches."""
    from theodora.kernels.triton import packed as triton

    return triton.dora_norms(weights, a_NRI, b_NOR, scale, w_norm_sq_NO)
