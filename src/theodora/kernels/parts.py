"""What a fast path needs to know of one adapted linear layer, whoever made it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from theodora.kernels.base_weight import BaseWeight


@dataclass(frozen=True, slots=True)
class Parts:
    """One linear layer with its adapter, as it stands in this forward pass.

    y = g ⊙ (x Wᵀ + s·(x Aᵀ) Bᵀ) + bias, g = magnitude / norm; without a magnitude plain LoRA, without A and B the base
    layer alone. All tensors are on one device.
    """

    weight: BaseWeight
    """The frozen W, (O, I)."""
    bias_O: Tensor | None
    a_RI: Tensor | None = None
    b_OR: Tensor | None = None
    scale: float = 1.0
    magnitude_O: Tensor | None = None
    norm_O: Tensor | None = None
    """‖W + s·B·A‖ of each output row, float32 (with a magnitude)."""
    drops: bool = False
    """Whether dropout changes the adapter's input in this pass."""


@dataclass(frozen=True, slots=True)
class Update:
    """What turns z = x Wᵀ into the layer's output: g ⊙ (z + s·xa Bᵀ) + bias."""

    xa_TR: Tensor | None
    """x Aᵀ, rows contiguous, or None without a low-rank update."""
    b_OR: Tensor | None
    scale: float
    magnitude_O: Tensor | None
    norm_O: Tensor | None
    bias_O: Tensor | None

    @property
    def low(self) -> bool:
        """Whether there is a low-rank update."""
        return self.b_OR is not None

    @property
    def scaled(self) -> bool:
        """Whether there is a magnitude."""
        return self.norm_O is not None

    @property
    def rank(self) -> int:
        """R, 0 without an update."""
        return 0 if self.b_OR is None else self.b_OR.shape[1]


@dataclass(frozen=True, slots=True)
class Gate:
    """What stands between the products of a mixture's experts: h = act(gate) ⊙ (up + offset), act(x) = f(α·x)/α.

    With a limit, gate is cut off above it, and up above it and below its negative.
    """

    activation: str
    """f: one of `gated.ACTIVATIONS`."""
    in_turns: bool = False
    """Whether gate and up lie in turns, rather than one after the other."""
    alpha: float = 1.0
    limit: float = 0.0
    limited: bool = False
    offset: float = 0.0


MOST_FUSED_RANK = 128
"""Ranks up to which the Triton kernels hold a tile of B; a caller adds larger updates by a product of its own."""

LEAST_SCALE = 2.0**-40
"""|g| below which an output says nothing about z any more."""

TILE = 16
"""Tokens that a program of the kernel takes at once: what `tl.dot` needs."""
EXPERT_TILE, EXPERT_CHUNK = 64, 512
"""Rows of an expert that a program takes at once: where each is worked on for itself, and where they are added up."""
MOST_LAYERS = 3
"""Layers of one x that share the kernel's launches: q, k and v."""


class SlottedWeights(NamedTuple):
    """What the slots of one layer hold."""

    a_SRI: Tensor
    b_SRO: Tensor
    g_SO: Tensor | None
    """None where no slot holds a DoRA adapter."""
    bias_O: Tensor | None

    def to(self, dtype: torch.dtype) -> SlottedWeights:
        """The same for products of another dtype; g stays wide."""
        bias = None if self.bias_O is None else self.bias_O.to(dtype)
        return SlottedWeights(self.a_SRI.to(dtype), self.b_SRO.to(dtype), self.g_SO, bias)
