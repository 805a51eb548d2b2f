"""The mathematics of LoRA and DoRA, once, in plain torch, readable beside the papers.

    LoRA   W' = W + s·B·A                                 (arXiv 2106.09685)
    DoRA   W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖             (arXiv 2402.09353)

Everything else in Theodora is a way to run these lines: faster, on other weights, in other places; a test holds each
against this file in float64.

Shapes: T tokens (any leading dimensions), I in features, O out features, R rank; `w_OI` is (O, I).
The norm is of each output row: (O,). (The paper's "column-wise" is of the transposed weight.)
Norms, scales, updates and merged weights take several weights of one shape at once, too: (E, O, I) with A (E, R, I),
B (E, O, R) and m (E, O), as the experts of a mixture are held.
Norms and the row scale g = m / norm are computed in float32, or in float64 for float64 weights: g lies within about
one per cent of 1, where bfloat16 has steps of 0.4 to 0.8 %.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.autocast import without_autocast

# Rows of the weight are widened to float32 in pieces of this many elements, so that a large layer needs no
# float32 copy of itself.
_PIECE = 1 << 22
# Where the factored norm² falls below this share of its terms, rounding has eaten its digits: see `dora_norm`.
CANCELLED = 1e-2
Convolution = Callable[[Tensor, Tensor, Tensor | None], Tensor]


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which norms and merged weights are computed: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def lora_delta(a_RI: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """The low-rank update s·B·A, (O, I), in the dtype of A and B."""
    return scale * (b_OR @ a_RI)


def row_norm_squared(w_OI: Tensor) -> Tensor:
    """‖W‖² of each output row, (O,), float32 or float64. A constant of the frozen weight."""
    wide = wide_dtype(w_OI.dtype)
    return torch.cat([w_OI[at].to(wide).square().sum(-1) for at in slices_of(w_OI.shape)])


def dora_norm(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, w_norm_sq_O: Tensor | None = None) -> Tensor:
    """‖W + s·B·A‖ of each output row, (O,), float32 or float64, without ever forming B·A.

    ‖W + sBA‖² = ‖W‖² + 2s·rowsum(B ⊙ (W Aᵀ)) + s²·rowsum((B·(A Aᵀ)) ⊙ B)      (arXiv 2603.22276)

    The three terms cancel where an update nearly erases its row; such rows, which training hardly ever meets, are
    formed after all, in float64. (On the CPU only: on a GPU the look would make the host wait, and under torch.compile
    it would break the graph.)

    The result carries no gradient: the norm is a constant in the backward pass (DoRA paper, section 4.3).
    """
    wide = wide_dtype(w_OI.dtype)
    with torch.no_grad(), without_autocast(w_OI.device):
        w_norm_sq = row_norm_squared(w_OI) if w_norm_sq_O is None else w_norm_sq_O.to(wide)

        def times_a(a_RI: Tensor) -> Tensor:
            own = w_OI.dim() > 2  # each weight has an A of its own
            pieces = slices_of(w_OI.shape)
            return torch.cat([w_OI[at].to(wide) @ (a_RI[at] if own else a_RI).mT for at in pieces])

        return dora_norm_of(times_a, lambda at: w_OI[at], a_RI, b_OR, scale, w_norm_sq)


def dora_norm_of(
    times_a: Callable[[Tensor], Tensor],
    rows: Callable[[Tensor], Tensor],
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    w_norm_sq_O: Tensor,
) -> Tensor:
    """`dora_norm` of a weight that need not be one tensor.

    Args:
        times_a: gives W Aᵀ, (O, R), in the dtype of `w_norm_sq_O`, which A comes in.
        rows: gives the rows of W, (…, I), that a mask (O,) picks.
        a_RI: A.
        b_OR: B.
        scale: s.
        w_norm_sq_O: ‖W‖² of each row, float32 or float64.
    """
    wide = w_norm_sq_O.dtype
    with torch.no_grad(), without_autocast(a_RI.device):
        a, b = a_RI.to(wide), b_OR.to(wide)
        norm_sq, terms = factored_norm_squared(w_norm_sq_O, times_a(a), a, b, scale)
        if norm_sq.device.type == "cpu" and not torch.compiler.is_compiling():
            cancelled = norm_sq < CANCELLED * terms
            if bool(cancelled.any()):
                whole = rows(cancelled).double() + _delta_rows(a.double(), b.double(), scale, cancelled)
                norm_sq[cancelled] = whole.square().sum(1).to(wide)
        return norm_sq.clamp_min(0).sqrt()


def factored_norm_squared(
    w_norm_sq_O: Tensor, w_a_OR: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """‖W + s·B·A‖² of each output row, (O,), from ‖W‖² and W Aᵀ; and what it is made of without the mixed term.

    Where the first is far below the second, the terms have cancelled and rounding has eaten the digits of the first.
    All in one dtype, float32 or float64.
    """
    update = scale**2 * ((b_OR @ (a_RI @ a_RI.mT)) * b_OR).sum(-1)
    return w_norm_sq_O + 2 * scale * (b_OR * w_a_OR).sum(-1) + update, w_norm_sq_O + update


def update_products(w_a_OR: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """⟨w, d⟩ and |d|² of each output row, (O,), where d is the row of s·B·A, from W Aᵀ; all in one dtype."""
    update_sq = scale**2 * ((b_OR @ (a_RI @ a_RI.mT)) * b_OR).sum(-1)
    return scale * (b_OR * w_a_OR).sum(-1), update_sq.clamp_min(0)


def row_angles(w_norm_O: Tensor, dot_O: Tensor, update_sq_O: Tensor) -> Tensor:
    """The angle between each row w and w + d, (O,), in radians, from |w|, ⟨w, d⟩ and |d|².

    It is taken from the part of d across w, not from the cosine: 1 - cos loses all digits below a tenth of a degree.
    """
    along = dot_O / w_norm_O
    across = (update_sq_O - along.square()).clamp_min(0).sqrt()
    return torch.atan2(across, w_norm_O + along)


def _delta_rows(a_RI: Tensor, b_OR: Tensor, scale: float, at: Tensor) -> Tensor:
    """The rows of s·B·A, (N, I), that the mask `at` picks."""
    if a_RI.dim() == 2:
        return lora_delta(a_RI, b_OR[at], scale)
    return torch.cat([lora_delta(a, b[picked], scale) for a, b, picked in zip(a_RI, b_OR, at, strict=True)])


def dora_scale(magnitude_O: Tensor, norm_O: Tensor) -> Tensor:
    """g = m / norm, (O,), in the dtype of the norm; differentiable in m.

    A row whose adapted weight is exactly zero has no direction. Its g is 1: the row acts as plain LoRA until it has
    one, so that it neither divides by zero nor stays dead.
    """
    zero = norm_O == 0
    return torch.where(zero, torch.ones_like(norm_O), magnitude_O.to(norm_O.dtype) / norm_O.masked_fill(zero, 1))


def merged_weight(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None = None) -> Tensor:
    """The one dense weight that does what base and adapter do together, (O, I), float32 or float64.

    Without a magnitude this is LoRA, with one it is DoRA.
    """
    wide = wide_dtype(w_OI.dtype)
    with without_autocast(w_OI.device):
        adapted = w_OI.to(wide) + lora_delta(a_RI.to(wide), b_OR.to(wide), scale)
    if magnitude_O is None:
        return adapted
    return dora_scale(magnitude_O, torch.linalg.vector_norm(adapted, dim=-1))[..., None] * adapted


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
    """y = x Wᵀ + bias + s·(x Aᵀ) Bᵀ, (T, O), in the dtype of x.

    `x_lora_TI` is what the low-rank branch sees instead of x (x after dropout).
    """
    x_lora = x_TI if x_lora_TI is None else x_lora_TI
    a, b = a_RI.to(x_TI.dtype), b_OR.to(x_TI.dtype)
    return F.linear(x_TI, w_OI, bias_O) + scale * F.linear(F.linear(x_lora, a), b)


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
    """y = g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias with g = m / norm, (T, O), in the dtype of x. The bias is not scaled.

    `norm_O` is `dora_norm(...)`. `x_lora_TI` is what the low-rank branch sees instead of x (x after dropout).
    """
    z = lora_linear(x_TI, w_OI, None, a_RI, b_OR, scale, x_lora_TI=x_lora_TI)
    y = (z * dora_scale(magnitude_O, norm_O)).to(x_TI.dtype)
    return y if bias_O is None else y + bias_O


def lora_embedding(rows_TO: Tensor, a_rows_TR: Tensor, b_OR: Tensor, scale: float) -> Tensor:
    """Embedding lookup with LoRA, (T, O): the looked-up rows of W plus s·B times the looked-up columns of A.

    An embedding is a linear map from one-hot tokens: its weight is stored transposed, (vocabulary, O), so A is
    (R, vocabulary) and `a_rows_TR` are the rows of Aᵀ that the tokens pick.
    """
    return rows_TO + scale * F.linear(a_rows_TR.to(rows_TO.dtype), b_OR.to(rows_TO.dtype))


def dora_embedding(
    rows_TO: Tensor, a_rows_TR: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor, norm_O: Tensor
) -> Tensor:
    """Embedding lookup with DoRA, (T, O): g ⊙ `lora_embedding(...)`, g for each output feature."""
    z = lora_embedding(rows_TO, a_rows_TR, b_OR, scale)
    return (z * dora_scale(magnitude_O, norm_O)).to(rows_TO.dtype)


def lora_experts(
    x_SI: Tensor,
    counts: Sequence[int],
    w_EOI: Tensor,
    bias_EO: Tensor | None,
    a_ERI: Tensor,
    b_EOR: Tensor,
    scale: float,
    *,
    x_lora_SI: Tensor | None = None,
) -> Tensor:
    """`lora_linear` of each expert on its own rows, (S, O), in the dtype of x.

    `x_SI` holds the rows of expert 0, then those of expert 1, …; `counts` says how many each has.
    """
    x, x_lora, bias = _of_each(x_SI, x_lora_SI, bias_EO, counts)
    each = zip(x, w_EOI, bias, a_ERI, b_EOR, x_lora, strict=True)
    return torch.cat([lora_linear(x, w, bias, a, b, scale, x_lora_TI=dropped) for x, w, bias, a, b, dropped in each])


def dora_experts(
    x_SI: Tensor,
    counts: Sequence[int],
    w_EOI: Tensor,
    bias_EO: Tensor | None,
    a_ERI: Tensor,
    b_EOR: Tensor,
    scale: float,
    magnitude_EO: Tensor,
    norm_EO: Tensor,
    *,
    x_lora_SI: Tensor | None = None,
) -> Tensor:
    """`dora_linear` of each expert on its own rows, (S, O); see `lora_experts`. `norm_EO` is `dora_norm(...)`."""
    x, x_lora, bias = _of_each(x_SI, x_lora_SI, bias_EO, counts)
    each = zip(x, w_EOI, bias, a_ERI, b_EOR, magnitude_EO, norm_EO, x_lora, strict=True)
    return torch.cat(
        [
            dora_linear(x, w, bias, a, b, scale, m, norm, x_lora_TI=dropped)
            for x, w, bias, a, b, m, norm, dropped in each
        ]
    )


def _of_each(
    x_SI: Tensor, x_lora_SI: Tensor | None, bias_EO: Tensor | None, counts: Sequence[int]
) -> tuple[Sequence[Tensor], Sequence[Tensor | None], Sequence[Tensor | None]]:
    """Rows, rows after dropout, and bias of each expert."""
    none = [None] * len(counts)
    x_lora = none if x_lora_SI is None else x_lora_SI.split(list(counts))
    return x_SI.split(list(counts)), x_lora, none if bias_EO is None else list(bias_EO)


def lora_conv(
    x: Tensor,
    w: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    conv: Convolution,
    groups: int = 1,
    *,
    x_lora: Tensor | None = None,
) -> Tensor:
    """y = conv(x, W) + bias + s·conv(x, B·A), (…, O, L, …), in the dtype of x, (…, C, L, …).

    The weight (O, C / groups, k, …) is seen as a matrix, whose rows are all that makes one output: I = C / groups · k.
    A are R filters of that size, and B weighs what they give at each place; each group's channels go through all of
    them. Where the update has fewer filters than that, as where each channel is its own group, it is formed instead.

    `conv(x, weight, bias)` is the convolution as the module runs it: stride, padding, dilation, groups. `x_lora` is
    what the low-rank branch sees instead of x (x after dropout).
    """
    x_lora = x if x_lora is None else x_lora
    outputs, rank = b_OR.shape
    if rank * groups >= outputs:
        update = conv(x_lora, (b_OR @ a_RI).to(x.dtype).view(w.shape), None)
    else:
        filters = a_RI.to(x.dtype).repeat(groups, 1).view(groups * rank, *w.shape[1:])
        at_each_place = (F.conv1d, F.conv2d, F.conv3d)[w.dim() - 3]
        b = b_OR.to(x.dtype).view(outputs, rank, *(1 for _ in w.shape[2:]))
        update = at_each_place(conv(x_lora, filters, None), b, groups=groups)
    return conv(x, w, bias_O) + scale * update


def dora_conv(
    x: Tensor,
    w: Tensor,
    bias_O: Tensor | None,
    a_RI: Tensor,
    b_OR: Tensor,
    scale: float,
    magnitude_O: Tensor,
    norm_O: Tensor,
    conv: Convolution,
    groups: int = 1,
    *,
    x_lora: Tensor | None = None,
) -> Tensor:
    """y = g ⊙ (conv(x, W) + s·conv(x, B·A)) + bias with g = m / norm of each output channel; as `lora_conv`."""
    z = lora_conv(x, w, None, a_RI, b_OR, scale, conv, groups, x_lora=x_lora)
    each = (-1, *(1 for _ in w.shape[2:]))
    y = (z * dora_scale(magnitude_O, norm_O).view(each)).to(x.dtype)
    return y if bias_O is None else y + bias_O.view(each)


def row_slices(rows: int, columns: int) -> list[slice]:
    """All rows of a matrix, some at a time, for what widens them."""
    some = max(1, _PIECE // max(1, columns))
    return [slice(at, at + some) for at in range(0, max(1, rows), some)]


def slices_of(shape: Sequence[int]) -> list[slice]:
    """`row_slices` of a weight: rows of (O, I), whole weights of (E, O, I)."""
    return row_slices(shape[0], math.prod(shape[1:]))
