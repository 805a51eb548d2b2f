"""The oracle: LoRA and DoRA in plain float64, from the papers and from nothing of ours.

    LoRA   W' = W + s·B·A                                       arXiv 2106.09685, section 4.1
    DoRA   W' = m ⊙ (W + s·B·A) / ‖W + s·B·A‖                   arXiv 2402.09353, equation 5; norms of output rows
           the norm is a constant in the backward pass          section 4.3

This file imports no module that it judges. The gradients are written out by hand, so that autograd is judged, too.
Shapes: T tokens, I in features, O out features, R rank; an embedding is the product with one-hot rows.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from theodora.conformance.rounding import F64, Rounded


@dataclass(frozen=True)
class Numbers:
    """One adapted layer, in float64. Without A and B it is the base layer; without m it is LoRA."""

    weight_OI: Tensor
    bias_O: Tensor | None = None
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    magnitude_O: Tensor | None = None
    scale: float = 1.0
    start: tuple[Tensor, Tensor] | None = None
    """A₀ and B₀ where training started from factors of W (PiSSA, OLoRA): the update is s·(B·A − B₀·A₀)."""
    rounds: Literal["", "float8", "int8"] = ""
    """What inputs are rounded to before they are multiplied by the weight; with float8 output gradients are, too."""

    def base(self) -> Numbers:
        """The layer without its adapter."""
        return replace(self, a_RI=None, b_OR=None, magnitude_O=None, start=None)

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """A and B of the whole update, the start's among them."""
        if self.a_RI is None or self.b_OR is None:
            return None
        if self.start is None:
            return self.a_RI, self.b_OR
        return torch.cat([self.a_RI, self.start[0]]), torch.cat([self.b_OR, -self.start[1]], dim=1)


def direction(n: Numbers) -> Tensor:
    """V = W + s·B·A, (O, I)."""
    v = n.weight_OI
    if n.a_RI is not None and n.b_OR is not None:
        v = v + n.scale * (n.b_OR @ n.a_RI)
    if n.start is not None:
        v = v - n.scale * (n.start[1] @ n.start[0])
    return v


def row_scale(n: Numbers) -> Tensor:
    """g = m / ‖V‖, (O,). A row without direction has none to scale: g is 1 there, and the row acts as LoRA."""
    v = direction(n)
    if n.magnitude_O is None:
        return torch.ones(len(v), dtype=F64)
    norm = (v * v).sum(1).sqrt()
    return torch.where(norm > 0, n.magnitude_O / torch.where(norm > 0, norm, 1.0), 1.0)


def adapted_weight(n: Numbers) -> Tensor:
    """W', (O, I)."""
    return row_scale(n)[:, None] * direction(n)


def output(n: Numbers, x_TI: Tensor, x_lora_TI: Tensor | None = None) -> Tensor:
    """y = x W'ᵀ + bias, (T, O); `x_lora_TI` is what the low-rank update sees instead of x (x after dropout)."""
    x_lora = x_TI if x_lora_TI is None else x_lora_TI
    y = x_TI @ n.weight_OI.T + x_lora @ (direction(n) - n.weight_OI).T
    y = y * row_scale(n)
    return y if n.bias_O is None else y + n.bias_O


def output_of_dropped_base(n: Numbers, x_TI: Tensor, x_lora_TI: Tensor) -> Tensor:
    """y by the DoRA authors' code and PEFT: x Wᵀ + (g − 1) ⊙ x̃ Wᵀ + g ⊙ s·(x̃ Aᵀ) Bᵀ + bias.

    W is there what it is without the start's factors, and dropout acts on the base product that is scaled, too.
    """
    assert n.a_RI is not None
    assert n.b_OR is not None
    update = n.scale * n.b_OR @ n.a_RI
    base, g = direction(n) - update, row_scale(n)
    y = x_TI @ base.T + (g - 1) * (x_lora_TI @ base.T) + g * (x_lora_TI @ update.T)
    return y if n.bias_O is None else y + n.bias_O


def masked_output(n: Numbers, x_TI: Tensor, mask_TR: Tensor) -> Tensor:
    """y where dropout acts on x Aᵀ, as it does on an embedding's looked-up columns of A."""
    factors = n.factors()
    assert factors is not None
    y = row_scale(n) * (x_TI @ n.weight_OI.T + n.scale * (mask_TR * (x_TI @ factors[0].T)) @ factors[1].T)
    return y if n.bias_O is None else y + n.bias_O


def gradients(n: Numbers, x_TI: Tensor, dy_TO: Tensor) -> dict[str, Tensor]:
    """Gradients of Σ y ⊙ dy by x, A, B and m; the norm is a constant."""
    v, g = direction(n), row_scale(n)
    by_weight = dy_TO.T @ x_TI  # of W', (O, I)
    by_direction = g[:, None] * by_weight
    gradient_of = {"x": dy_TO @ (g[:, None] * v)}
    if n.a_RI is not None and n.b_OR is not None:
        gradient_of |= {"A": n.scale * n.b_OR.T @ by_direction, "B": n.scale * by_direction @ n.a_RI.T}
    if n.magnitude_O is not None:
        norm = (v * v).sum(1).sqrt()
        gradient_of["m"] = torch.where(norm > 0, (by_weight * v).sum(1) / torch.where(norm > 0, norm, 1.0), 0.0)
    return gradient_of


# Adapters made of adapters -------------------------------------------------------------------------------------------


def change(n: Numbers) -> Tensor:
    """W' − W, (O, I)."""
    return adapted_weight(n) - n.weight_OI


def summed(adapters: list[Numbers], weights: list[float]) -> Numbers:
    """One adapter that is W' = W + Σ wᵢ (W'ᵢ − W), of scale 1 and of the ranks added up.

    With W'ᵢ = gᵢ ⊙ (W + Uᵢ) the sum is c ⊙ (W + Σ wᵢ gᵢ ⊙ Uᵢ / c), c = 1 + Σ wᵢ (gᵢ − 1): DoRA with g = c.
    """
    c = torch.ones(len(adapters[0].weight_OI), dtype=F64)
    a: list[Tensor] = []
    b: list[Tensor] = []
    for n, weight in zip(adapters, weights, strict=True):
        factors = n.factors()
        assert factors is not None
        c = c + weight * (row_scale(n) - 1)
        a.append(factors[0])
        b.append(weight * n.scale * row_scale(n)[:, None] * factors[1])
    dora = any(n.magnitude_O is not None for n in adapters)
    whole = Numbers(
        adapters[0].weight_OI, adapters[0].bias_O, torch.cat(a), torch.cat(b, 1) / c[:, None], rounds=adapters[0].rounds
    )
    return replace(whole, magnitude_O=c * direction(whole).square().sum(1).sqrt()) if dora else whole


def dense(base: Numbers, change_OI: Tensor, dora: bool = False) -> Numbers:
    """An adapter of full rank and scale 1 that adds a change; as DoRA its g is 1."""
    out, inside = change_OI.shape
    eye = torch.eye(min(out, inside), dtype=F64)
    a, b = (eye, change_OI) if inside <= out else (change_OI, eye)
    whole = replace(base.base(), a_RI=a, b_OR=b, scale=1.0)
    return replace(whole, magnitude_O=direction(whole).square().sum(1).sqrt()) if dora else whole


def best_of_rank(matrix_OI: Tensor, rank: int) -> Tensor:
    """The nearest matrix of that rank, by its singular values (Eckart and Young)."""
    u, s, vh = torch.linalg.svd(matrix_OI, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def ties(changes: list[Tensor], weights: list[float], left: int) -> Tensor:
    """Trim each change to its `kept` largest, elect the sign of the weighted sum, average what agrees (2306.01708)."""
    trimmed: list[Tensor] = []
    for delta, weight in zip(changes, weights, strict=True):
        least = delta.abs().flatten().sort(descending=True).values[left - 1]
        trimmed.append(weight * torch.where(delta.abs() >= least, delta, 0.0))
    stack = torch.stack(trimmed)
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    return torch.where(agrees, stack, 0.0).sum(0) / agrees.sum(0).clamp_min(1)


# The same, walked as it may be computed, for the bounds -------------------------------------------------------------


@dataclass(frozen=True)
class Walk:
    """A layer's steps in the dtype that it computes in, with what rounding adds at each."""

    z: Rounded
    xa: Rounded | None
    y: Rounded


def _row_scale(n: Numbers, wide: torch.dtype = torch.float32) -> tuple[Rounded, Rounded] | None:
    """(g, ‖V‖), rounded to float32 at each step."""
    factors = n.factors()
    if n.magnitude_O is None or factors is None:
        return None
    norm = _norm(n, Rounded.exact(factors[0]), Rounded.exact(factors[1]), wide)
    there = norm.value > 0
    g = (Rounded.exact(n.magnitude_O).to(wide) / norm.where(there, 1.0)).where(there, 1.0)
    return g.to(wide), norm


def _norm(n: Numbers, a: Rounded, b: Rounded, wide: torch.dtype) -> Rounded:
    """‖V‖ of each row, from V itself or from ‖W‖² + 2s·rowsum(B ⊙ (W Aᵀ)) + s²·rowsum((B·(A Aᵀ)) ⊙ B): the noisier.

    (The second way, arXiv 2603.22276, forms no V; its terms may be larger than their sum.)
    """
    w = Rounded.exact(n.weight_OI)
    formed = (w + ((b @ a).to(wide) * n.scale).to(wide)).to(wide).row_norm()
    cross = (b * (w @ a.T).to(wide)).sum(1).to(wide) * (2 * n.scale)
    update = ((b @ (a @ a.T).to(wide)).to(wide) * b).sum(1).to(wide) * n.scale**2
    square = ((w * w).sum(1).to(wide) + cross + update).to(wide)
    norm = direction(n).square().sum(1).sqrt()
    factored = square.variance / (4 * torch.where(norm > 0, norm, 1.0).square())
    return Rounded(norm, torch.maximum(formed.variance, factored)).to(wide)


def walk(
    n: Numbers,
    x_TI: Tensor,
    dtype: torch.dtype,
    x_lora_TI: Tensor | None = None,
    mask_TR: Tensor | None = None,
) -> Walk:
    """Forward: x Wᵀ, x Aᵀ, (x Aᵀ) Bᵀ, s, the sum, g and the bias, each rounded to `dtype` once."""
    x = Rounded.exact(x_TI)
    if n.rounds:
        x = x.to_float8_rows() if n.rounds == "float8" else x.to_int8_rows()
    z = (x @ Rounded.exact(n.weight_OI).to(dtype).T).to(dtype)
    factors, xa = n.factors(), None
    if factors is not None:
        a, b = (Rounded.exact(f).to(dtype) for f in factors)
        xa = (Rounded.exact(x_TI if x_lora_TI is None else x_lora_TI) @ a.T).to(dtype)
        if mask_TR is not None:
            xa = xa * mask_TR
        z = (z + ((xa @ b.T).to(dtype) * n.scale).to(dtype)).to(dtype)
    scaled = _row_scale(n)
    y = z if scaled is None else (z * scaled[0]).to(dtype)
    if n.bias_O is not None:
        y = (y + Rounded.exact(n.bias_O).to(dtype)).to(dtype)
    return Walk(z, xa, y)


def walk_back(n: Numbers, x_TI: Tensor, dy_TO: Tensor, dtype: torch.dtype) -> dict[str, Rounded]:
    """Backward: dz = g ⊙ dy, dx = dz W + s·(dz B) A, dA = s·(dz B)ᵀ x, dB = s·dzᵀ (x Aᵀ), dm = Σ dy ⊙ z / ‖V‖."""
    forward, x, dy = walk(n, x_TI, dtype), Rounded.exact(x_TI), Rounded.exact(dy_TO)
    scaled = _row_scale(n)
    dz = dy if scaled is None else (dy * scaled[0]).to(dtype)
    base = dz.to_float8_rows() if n.rounds == "float8" else dz
    gradient_of = {"x": (base @ Rounded.exact(n.weight_OI).to(dtype)).to(dtype)}
    factors = n.factors()
    if factors is not None and n.a_RI is not None and n.b_OR is not None and forward.xa is not None:
        a, b = (Rounded.exact(f).to(dtype) for f in factors)
        dzb = ((dz @ b).to(dtype) * n.scale).to(dtype)
        gradient_of["x"] = (gradient_of["x"] + (dzb @ a).to(dtype)).to(dtype)
        rank = len(n.a_RI)
        gradient_of["A"] = _head(dzb.T @ x, rank, 0).to(dtype)
        gradient_of["B"] = ((dz.T @ _head(forward.xa, rank, 1)).to(dtype) * n.scale).to(dtype)
    if scaled is not None:
        norm, there = scaled[1], scaled[1].value > 0
        gradient_of["m"] = ((dy * forward.z).to(dtype).sum(0) / norm.where(there, 1.0)).where(there, 0.0).to(dtype)
    return gradient_of


def walk_merge(n: Numbers, dtype: torch.dtype) -> Rounded:
    """W' computed in float32 and rounded to `dtype` once."""
    wide = torch.float32
    merged = Rounded.exact(n.weight_OI)
    factors = n.factors()
    if factors is not None:
        a, b = (Rounded.exact(f) for f in factors)
        merged = (merged + ((b @ a).to(wide) * n.scale).to(wide)).to(wide)
    scaled = _row_scale(n)
    if scaled is not None:
        merged = (merged * scaled[0].column()).to(wide)
    return merged.to(dtype)


def walk_merged(n: Numbers, x_TI: Tensor, dtype: torch.dtype, stored: torch.dtype) -> Rounded:
    """Forward through the merged weight, stored in `stored`."""
    y = (Rounded.exact(x_TI) @ walk_merge(n, stored).to(dtype).T).to(dtype)
    return y if n.bias_O is None else (y + Rounded.exact(n.bias_O).to(dtype)).to(dtype)


def _head(r: Rounded, count: int, dim: int) -> Rounded:
    return Rounded(r.value.narrow(dim, 0, count), r.variance.narrow(dim, 0, count))
