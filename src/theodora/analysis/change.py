"""How one weight changed between base and trained model: the measures of section 3 of the DoRA paper.

    ΔM = mean over the rows of | ‖w'‖ − ‖w‖ |         ΔD = mean over the rows of 1 − cos(w', w)     (arXiv 2402.09353)

The paper writes weights transposed and speaks of columns; rows are the output features here, as everywhere in
Theodora. Everything is computed in float64. 1 − cos is computed as half the squared distance between the unit rows:
the difference itself would lose all digits where a row hardly turned.

Shapes: O out features, I in features, R rank; `w_OI` is (O, I).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from theodora.files.adapter import AdapterTensors
from theodora.files.finite import finite
from theodora.functional import merged_weight

# Rows are widened to float64 in pieces of this many elements (32 MB).
_PIECE = 1 << 22
# The difference of a larger weight (an embedding of 256,000 tokens by 4,096) is not formed: it would take gigabytes.
_LARGEST = 1 << 28


@dataclass(frozen=True)
class WeightChange:
    """What happened to one weight."""

    magnitude: float
    """ΔM: mean change of a row's length, without sign, in the weight's own units."""
    relative_magnitude: float
    """ΔM against the mean length of a row in the base."""
    direction: float
    """ΔD: mean of 1 − cos between a row and what it was; 0 (the same) to 2 (turned round)."""
    size: float
    """‖W' − W‖ / ‖W‖, Frobenius norms."""
    effective_rank: float | None
    """Of W' − W: e to the entropy of its singular values, as shares of their sum (Roy and Vetterli, 2007). 0 if nothing
    changed; None if it was not asked for, or the weight is too large."""


def tuned_change(w_OI: Tensor, tuned_OI: Tensor, *, rank: bool = True) -> WeightChange:
    """Compare a weight with what training made of it; both (O, I), any float dtype."""
    pieces = zip(_pieces(w_OI), _pieces(tuned_OI), strict=True)
    change = _change((w.double(), tuned.double()) for w, tuned in pieces)
    difference = tuned_OI.double() - w_OI.double() if rank and w_OI.numel() <= _LARGEST else None
    return _with_rank(change, difference)


def adapter_change(w_OI: Tensor, tensors: AdapterTensors, *, rank: bool = True) -> WeightChange:
    """Compare a base weight, (O, I), with base and adapter merged, in float64."""
    a_RI, m = tensors.a.double(), tensors.magnitude
    pieces = _pieces(w_OI)
    magnitudes = [None] * len(pieces) if m is None else m.split(_rows(w_OI))
    rows = zip(pieces, tensors.b.split(_rows(w_OI)), magnitudes, strict=True)
    merged = ((w.double(), merged_weight(w.double(), a_RI, b.double(), tensors.scale, part)) for w, b, part in rows)
    if not rank:
        return _change(merged)
    if m is None:
        change = _change(merged)
        return replace(change, effective_rank=effective_rank(low_rank_values(tensors)))
    if w_OI.numel() > _LARGEST:
        return _change(merged)
    differences: list[Tensor] = []
    return _with_rank(_change(_noting(merged, differences)), torch.cat(differences))


def effective_rank(values_R: Tensor) -> float:
    """e to the entropy of singular values as shares of their sum: 3 for three equal ones; 0 if all are zero."""
    if not finite(values_R):
        return math.nan
    positive = values_R[values_R > 0]
    shares = positive / positive.sum()
    return float((-(shares * shares.log()).sum()).exp()) if len(positive) else 0.0


def low_rank_values(tensors: AdapterTensors) -> Tensor:
    """The singular values of s·B·A that are not zero by its shape, (R,), float64, without forming B·A."""
    _, a_core = torch.linalg.qr(tensors.a.double().T)
    _, b_core = torch.linalg.qr(tensors.b.double())
    return abs(tensors.scale) * torch.linalg.svdvals(b_core @ a_core.T)


def singular_values(difference_OI: Tensor) -> Tensor:
    """All singular values of a matrix, (min(O, I),), by the eigenvalues of the smaller of D·Dᵀ and Dᵀ·D.

    Several times faster than an SVD. Those below 1e-7 of the largest, which squaring has drowned, are given as 0.
    """
    tall = difference_OI.shape[0] > difference_OI.shape[1]
    largest = difference_OI.abs().max() if difference_OI.numel() else difference_OI.new_zeros(())
    if not finite(largest) or not bool(largest):
        return difference_OI.new_full((min(difference_OI.shape),), float(largest))
    d = (difference_OI / largest).T if tall else difference_OI / largest  # so that no square leaves float64
    squares = torch.linalg.eigvalsh(d @ d.T)
    squares[squares < len(squares) * torch.finfo(squares.dtype).eps * squares.max()] = 0
    return largest * squares.sqrt()


def _change(pairs: Iterator[tuple[Tensor, Tensor]]) -> WeightChange:
    """The measures, from pieces of rows before and after, in float64. Rows of zeros have no direction."""
    rows, turned = 0, 0
    lengths = moved = away = before_sq = difference_sq = 0.0
    for before, after in pairs:
        norm, norm_after = before.norm(dim=1), after.norm(dim=1)
        alive = (norm > 0) & (norm_after > 0)
        rows, turned = rows + len(norm), turned + int(alive.sum())
        lengths += float(norm.sum())
        moved += float((norm_after - norm).abs().sum())
        units = before[alive] / norm[alive, None] - after[alive] / norm_after[alive, None]
        away += float(units.square().sum()) / 2
        before_sq += float(norm.square().sum())
        difference_sq += float((after - before).square().sum())
    return WeightChange(
        magnitude=_ratio(moved, rows),
        relative_magnitude=_ratio(moved, lengths),
        direction=_ratio(away, turned),
        size=math.sqrt(_ratio(difference_sq, before_sq)),
        effective_rank=None,
    )


def _with_rank(change: WeightChange, difference_OI: Tensor | None) -> WeightChange:
    rank = None if difference_OI is None else effective_rank(singular_values(difference_OI))
    return replace(change, effective_rank=rank)


def _noting(pairs: Iterator[tuple[Tensor, Tensor]], differences: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """Pass the pieces on, and note the difference of each."""
    for before, after in pairs:
        differences.append(after - before)
        yield before, after


def _rows(w_OI: Tensor) -> int:
    return max(1, _PIECE // max(1, w_OI.shape[1]))


def _pieces(w_OI: Tensor) -> tuple[Tensor, ...]:
    return w_OI.split(_rows(w_OI))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else math.nan
