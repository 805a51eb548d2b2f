"""How several changes of one weight become one, element by element: weighted sum, TIES, DARE.

A change is W'_i − W, float64, of any shape. Adapters that leave a weight alone have none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def weighted_sum(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Σ wᵢ Δᵢ."""
    total = torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        total += weight * change
    return total


def trim(change: Tensor, density: float) -> Tensor:
    """Keep the share `density` of the elements, the largest by absolute value, and set the others to zero."""
    count = round(density * change.numel())
    if count >= change.numel():
        return change
    flat = change.flatten()
    at = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_put((at,), flat[at]).view_as(change)


def merge_by_sign(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """TIES's election and disjoint merge (arXiv 2306.01708): the mean of the wᵢ Δᵢ whose sign is that of Σ wᵢ Δᵢ.

    The mean is over the adapters that agree, element by element; those that were trimmed to zero have no say.
    """
    weighted = [weight * change for weight, change in zip(weights, changes, strict=True)]
    elected = torch.stack(weighted).sum(0).sign()
    total, agreeing = torch.zeros_like(elected), torch.zeros_like(elected)
    for change in weighted:
        agrees = (change.sign() == elected) & (change != 0)
        total += torch.where(agrees, change, 0)
        agreeing += agrees
    return total / agreeing.clamp_min(1)


def drop_and_rescale(change: Tensor, density: float, seed: int, key: str) -> Tensor:
    """DARE (arXiv 2311.03099): keep each element with probability `density`, divided by it, and drop the others."""
    return torch.where(dare_mask(change.shape, density, seed, key).to(change.device), change / density, 0)


def dare_mask(shape: Sequence[int], density: float, seed: int, key: str) -> Tensor:
    """Which elements DARE leaves (True): drawn on the CPU, so that a seed and a key give the same ones on any device.

    Args:
        shape: of the change.
        density: the share that stays.
        seed: of all draws.
        key: tells the draws of one seed from each other; `combine_adapters` takes "<adapter>/<path>", the module's
            path, or that of a parameter trained in full.
    """
    digest = hashlib.sha256(f"{seed}/{key}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8]) >> 1)
    return torch.rand(*shape, generator=generator, dtype=torch.float64) < density


def combined(
    method: str, changes: Sequence[Tensor], weights: Sequence[float], density: float, seed: int, keys: Sequence[str]
) -> Tensor:
    """One change out of several, by a method of `combine_adapters`."""
    if method.startswith("dare"):
        changes = [drop_and_rescale(d, density, seed, key) for d, key in zip(changes, keys, strict=True)]
    elif method == "ties":
        changes = [trim(change, density) for change in changes]
    return merge_by_sign(changes, weights) if method.endswith("ties") else weighted_sum(changes, weights)
