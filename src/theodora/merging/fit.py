"""Adapters that make a given weight out of the base's: exactly, or as well as a rank allows, with the error told.

    wanted   W' = c ⊙ W + B·A              c: one factor for each output row

Every adapted weight has this form: LoRA has c = 1, DoRA has c = g. So have weighted sums of them, and any dense weight,
with a B or A of full rank. As LoRA it is W + B'·A', of full rank where c is not 1; as DoRA it is c ⊙ (W + B·A / c), of
the same rank.

Experts each have their own, of one rank: the largest that one of them needs.

Computed in float64. Shapes: I in features, O out features, R rank; c is (O,). Of E experts all have an E before that.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from theodora.errors import CheckpointError
from theodora.files.finite import finite
from theodora.functional import dora_norm, dora_scale, merged_weight

_LEAST_SCALE = 2.0**-10  # of g: a row is g ⊙ (W + B·A / g), and B / g has to stay in float16's range
_EXACT_SVD = 1024  # above this rank singular vectors come from a randomised decomposition, which is far faster
_RANDOMISED = 1e-3  # relative accuracy of its remaining error
_PIECE = 1 << 22  # elements of a weight that are copied to float64 at once


class Wanted(NamedTuple):
    """A weight W' = c ⊙ W + B·A, in float64."""

    row_O: Tensor
    b_OR: Tensor
    a_RI: Tensor

    def update(self, w_OI: Tensor) -> Tensor:
        """W' − W, (O, I), float64."""
        return (self.row_O - 1)[..., None] * w_OI.to(self.row_O.dtype) + self.b_OR @ self.a_RI

    def of(self, expert: int) -> Wanted:
        """What is wanted of one of several experts."""
        return Wanted(self.row_O[expert], self.b_OR[expert], self.a_RI[expert])


@dataclass(frozen=True)
class Held:
    """The tensors of an adapter of scale 1, as they will be stored, and how far it is from what was wanted."""

    a_RI: Tensor
    b_OR: Tensor
    magnitude_O: Tensor | None
    squares: tuple[float, float, float]
    """‖held − W'‖², ‖W' − W‖² and ‖W‖² (Frobenius norms)."""

    @property
    def error(self) -> float:
        """‖held − W'‖ / ‖W' − W‖; against ‖W‖ where W' is W."""
        error, size, base = self.squares
        return (error / (size or base or 1.0)) ** 0.5


@dataclass(frozen=True)
class FitReport:
    """How well an adapter that was computed from others holds what was wanted of it."""

    name: str
    method: str
    """lora or dora."""
    ranks: dict[str, int] = field(default_factory=dict[str, int])
    """Module path → rank."""
    errors: dict[str, float] = field(default_factory=dict[str, float])
    """Module path, or path of a parameter trained in full → ‖held − wanted‖ / ‖wanted − W‖ (Frobenius norms)."""

    @property
    def worst(self) -> float:
        """The largest of the errors; 0 if there are none."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        ranks = sorted(set(self.ranks.values()))
        spread = f"{ranks[0]} to {ranks[-1]}" if len(ranks) > 1 else f"{ranks[0] if ranks else 0}"
        return f"{self.name}: {self.method} of rank {spread} on {len(self.ranks)} modules, error {self.worst:.1e}"


def exact_dtype(device: torch.device) -> torch.dtype:
    """float64, except on Apple's GPUs, which have none."""
    return torch.float32 if device.type == "mps" else torch.float64


def wanted_of(w_OI: Tensor, a_RI: Tensor, b_OR: Tensor, scale: float, magnitude_O: Tensor | None) -> Wanted:
    """What an adapter makes of W: c is g, and B·A is g ⊙ s·B·A."""
    if w_OI.dim() == 3:
        m = [None] * len(w_OI) if magnitude_O is None else magnitude_O
        each = [wanted_of(w, a, b, scale, own) for w, a, b, own in zip(w_OI, a_RI, b_OR, m, strict=True)]
        return Wanted(*(torch.stack(parts) for parts in zip(*each, strict=True)))
    exact = exact_dtype(w_OI.device)
    if not finite(w_OI):
        raise CheckpointError("The base model's own weight holds NaN or infinite values, and nothing is like it.")
    a, b = a_RI.detach().to(w_OI.device, exact), scale * b_OR.detach().to(w_OI.device, exact)
    if magnitude_O is None:
        return Wanted(torch.ones(w_OI.shape[0], dtype=exact, device=w_OI.device), b, a)
    norm = torch.cat([dora_norm(w_OI[rows].to(exact), a, b[rows], 1.0) for rows in _pieces(w_OI)])
    g = dora_scale(magnitude_O.detach().to(w_OI.device, exact), norm)
    return Wanted(g, g[:, None] * b, a)


def dense(update_OI: Tensor) -> Wanted:
    """Any weight W' = W + update, as two factors of full rank, one of which is the identity."""
    out, inside = update_OI.shape
    ones = torch.ones(out, dtype=update_OI.dtype, device=update_OI.device)
    eye = torch.eye(min(out, inside), dtype=update_OI.dtype, device=update_OI.device)
    return Wanted(ones, update_OI, eye) if inside <= out else Wanted(ones, eye, update_OI)


def hold(w_OI: Tensor, wanted: Wanted, *, dora: bool, rank: int | None, dtype: torch.dtype) -> Held:
    """The LoRA or DoRA of scale 1 that comes nearest to `wanted`.

    Args:
        w_OI: the base weight.
        wanted: what base and adapter are to be together.
        dora: whether it may have a magnitude, which may be negative.
        rank: the largest rank, or None for as much as exactness needs, at most min(O, I).
        dtype: that A and B are stored in.
    """
    if w_OI.dim() == 3:
        each = (hold(w, wanted.of(e), dora=dora, rank=rank, dtype=dtype) for e, w in enumerate(w_OI))
        return of_experts(list(each))
    if not all(finite(part) for part in wanted):
        raise CheckpointError("What the adapter makes of its base's weight holds NaN or infinite values: it overflows.")
    if dora:
        factors = _within_reach(w_OI, wanted)
    elif bool((wanted.row_O == 1).all()):
        factors = wanted
    else:
        factors = dense(wanted.update(w_OI))
    row, b, a = factors
    if b.shape[1] > min(w_OI.shape):
        _, b, a = dense(b @ a)
    if rank is not None and b.shape[1] > rank:
        b, a = truncated(b, a, rank)
    if not b.shape[1]:  # an adapter has a rank of at least 1
        b, a = b.new_zeros(b.shape[0], 1), a.new_zeros(1, a.shape[1])
    if dora:
        b = torch.where(b == 0, b, b / row[:, None])
    return _stored(w_OI, wanted, a.to(dtype), b.to(dtype), dora)


def of_experts(each: Sequence[Held]) -> Held:
    """One adapter of several experts, of the largest of their ranks: the others are filled up with zeros."""
    rank = max(len(held.a_RI) for held in each)
    a = torch.stack([F.pad(held.a_RI, (0, 0, 0, rank - len(held.a_RI))) for held in each])
    b = torch.stack([F.pad(held.b_OR, (0, rank - held.b_OR.shape[1])) for held in each])
    magnitudes = [held.magnitude_O for held in each if held.magnitude_O is not None]
    error, size, base = (sum(squares) for squares in zip(*(held.squares for held in each), strict=True))
    return Held(a, b, torch.stack(magnitudes) if magnitudes else None, (error, size, base))


def truncated(b_OR: Tensor, a_RI: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of B·A of a lower rank, by its singular values: B (O, rank) and A (rank, I)."""
    full = b_OR.shape[1]
    if full > _EXACT_SVD and 4 * rank < full:
        u, s, vh = _randomised(b_OR @ a_RI, rank)
    else:
        (q_b, r_b), (q_a, r_a) = torch.linalg.qr(b_OR), torch.linalg.qr(a_RI.T)
        u, s, vh = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
        u, vh = q_b @ u[:, :rank], vh[:rank] @ q_a.T
    root = s[:rank].sqrt()
    return u * root, root[:, None] * vh


def _randomised(matrix_OI: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Leading singular vectors (arXiv 0909.4061), with more passes over the matrix until the error settles."""
    size, before = matrix_OI.square().sum(), None
    u = s = v = matrix_OI
    for passes in (2, 4, 8, 16):
        with torch.random.fork_rng(devices=[matrix_OI.device] if matrix_OI.is_cuda else []):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(matrix_OI, q=rank + 16, niter=passes)
        left = float((size - s[:rank].square().sum()).clamp_min(0))
        if before is not None and before - left <= _RANDOMISED * left:
            break
        before = left
    return u[:, :rank], s[:rank], v[:, :rank].T


def _within_reach(w_OI: Tensor, wanted: Wanted) -> Wanted:
    """The same weight with no c so small that B·A / c cannot be stored.

    c = 0 has no DoRA of its own. Such a row is c' ⊙ W + B·A − (c' − c) ⊙ W, and the last term is one more rank.
    """
    row, b, a = wanted
    near = (row.abs() < _LEAST_SCALE) & (b != 0).any(1)
    if not bool(near.any()):
        return wanted
    at = near.nonzero()[:, 0]
    least = torch.where(row[at] < 0, -_LEAST_SCALE, _LEAST_SCALE).to(row)
    extra = b.new_zeros(b.shape[0], len(at))
    extra[at, torch.arange(len(at), device=at.device)] = row[at] - least
    return Wanted(row.index_put((at,), least), torch.cat([b, extra], 1), torch.cat([a, w_OI[at].to(a)]))


def _stored(w_OI: Tensor, wanted: Wanted, a_RI: Tensor, b_OR: Tensor, dora: bool) -> Held:
    """The adapter with its magnitude, which takes up what it can of what rank and rounding left over."""
    exact = wanted.row_O.dtype
    a, b = a_RI.to(exact), b_OR.to(exact)
    magnitudes: list[Tensor] = []
    error = size = base = 0.0
    for rows in _pieces(w_OI):
        w = w_OI[rows].to(exact)
        target = wanted.row_O[rows, None] * w + wanted.b_OR[rows] @ wanted.a_RI
        magnitude = None
        if dora:
            adapted = w + b[rows] @ a
            norm = torch.linalg.vector_norm(adapted, dim=1)
            # The best g for each row, ⟨V, W'⟩ / ‖V‖², times the norm; c itself where nothing was left over.
            best = (adapted * target).sum(1) / norm
            magnitude = torch.where(norm == 0, torch.zeros_like(norm), best).to(torch.float32)
            magnitude = magnitude if w_OI.dtype != torch.float64 else best.nan_to_num(0)
            magnitudes.append(magnitude)
        held = merged_weight(w, a, b[rows], 1.0, None if magnitude is None else magnitude.to(exact))
        error += float((held - target).square().sum())
        size += float((target - w).square().sum())
        base += float(w.square().sum())
    return Held(a_RI, b_OR, torch.cat(magnitudes) if dora else None, (error, size, base))


def _pieces(w_OI: Tensor) -> Iterator[slice]:
    """Rows of W in pieces, so that a large weight needs no float64 copy of itself."""
    step = max(1, _PIECE // max(1, w_OI.shape[1]))
    return (slice(start, start + step) for start in range(0, w_OI.shape[0], step))
