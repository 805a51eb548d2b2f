"""The specimen's experts, and how the formula sees them: as one linear layer whose weight has a block for each expert.

An input has the features of all experts, (…, E·I), and is zero but for those of the expert that it goes to; an output
is zero but for those of the expert that made it. So W is (E·O, E·I) and has the experts' weights as its diagonal
blocks, A and B likewise, and m is (E·O,): every line of the formula holds as it stands.

Shapes: E experts, I in and O out features of each, R rank, T tokens.
"""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import use_experts_implementation

from theodora.conformance.formula import Numbers

EXPERTS, IN, OUT = 3, 16, 24
PARAMETER = "experts.fused.up_proj"
"""Path of the adapted parameter in the specimen."""


@use_experts_implementation(has_gate=False)
class FusedExperts(nn.Module):
    """Experts as transformers holds them; the second product is by the identity, so that one weight is judged."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.num_experts = EXPERTS
        self.up_proj = nn.Parameter(torch.empty(EXPERTS, OUT, IN))
        self.down_proj = nn.Parameter(torch.eye(OUT).repeat(EXPERTS, 1, 1))
        self.act_fn = nn.Identity()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """(T, I) to (T, O), with one expert for each token."""
        chosen = top_k_index[:, 0]
        y = self.down_proj[chosen] @ (self.up_proj[chosen] @ hidden_states[:, :, None])
        return y[:, :, 0] * top_k_weights


class Mixture(nn.Module):
    """Experts and their routing, by where an input is not zero."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = FusedExperts(SimpleNamespace(_experts_implementation="eager"))

    def forward(self, x: Tensor) -> Tensor:
        """(…, E·I) to (…, E·O)."""
        rows, chosen = x.reshape(-1, EXPERTS, IN), experts_of(x)
        at = torch.arange(len(rows), device=x.device)
        y = self.fused(rows[at, chosen], chosen[:, None], torch.ones(len(rows), 1, device=x.device, dtype=x.dtype))
        outputs = torch.zeros(len(rows), EXPERTS, OUT, device=x.device, dtype=y.dtype)
        return outputs.index_put((at, chosen), y).view(*x.shape[:-1], EXPERTS * OUT)

    @property
    def weight(self) -> Tensor:
        """The weight that it computes with, (E, O, I); beneath PEFT's wrapper, the one of its base."""
        fused: Any = self.fused
        while hasattr(fused, "base_layer"):
            fused = fused.base_layer
        return fused.up_proj


def experts_of(x: Tensor) -> Tensor:
    """Which expert each input goes to, (T,)."""
    return x.detach().reshape(-1, EXPERTS, x.shape[-1] // EXPERTS).abs().sum(-1).argmax(-1)


def spread(x_TI: Tensor) -> Tensor:
    """Inputs (…, I) of experts in turn as (…, E·I)."""
    rows = x_TI.reshape(-1, x_TI.shape[-1])
    chosen = torch.arange(len(rows)) % EXPERTS
    wide = torch.zeros(len(rows), EXPERTS, rows.shape[1], dtype=x_TI.dtype)
    return wide.index_put((torch.arange(len(rows)), chosen), rows).view(*x_TI.shape[:-1], -1)


def only_of_own(dy_TO: Tensor, x_TI: Tensor) -> Tensor:
    """Gradients of outputs (T, E·O) without those of experts that an input does not go to."""
    own = nn.functional.one_hot(experts_of(x_TI), EXPERTS).to(dy_TO)
    return (dy_TO.reshape(len(own), EXPERTS, -1) * own[:, :, None]).flatten(1)


def blocked(tensor: Tensor) -> Tensor:
    """Experts' weights or factors (E, …, …) as the blocks of a matrix; magnitudes (E, O) as (E·O,)."""
    return torch.block_diag(*tensor) if tensor.dim() == 3 else tensor.flatten()


def shaped(part: str, tensor: Tensor) -> Tensor:
    """A (E, R, I), B (E, O, R) or m (E, O), however a library holds it."""
    if tensor.dim() == 3 or part == "m":
        return tensor
    if part == "A":
        return tensor.unflatten(0, (EXPERTS, -1))
    return tensor.unflatten(1, (-1, EXPERTS)).permute(2, 0, 1)


def as_held(part: str, value: Tensor, like: Tensor) -> Tensor:
    """The inverse: a value in the shape in which a library holds it."""
    if like.dim() == 3 or part == "m":
        return value
    return value.flatten(0, 1) if part == "A" else value.permute(1, 2, 0).flatten(1)


def blocks(n: Numbers) -> list[Numbers]:
    """The numbers of each expert by itself."""
    parts = (n.weight_OI, n.a_RI, n.b_OR, n.magnitude_O, *(n.start or (None, None)))
    each = zip(*([None] * EXPERTS if part is None else diagonal(part) for part in parts), strict=True)
    return [
        replace(n, weight_OI=w, a_RI=a, b_OR=b, magnitude_O=m, start=None if a0 is None else (a0, b0))
        for w, a, b, m, a0, b0 in each
    ]


def diagonal(matrix: Tensor) -> list[Tensor]:
    """The diagonal blocks of a matrix, or the parts of a vector."""
    sizes = [size // EXPERTS for size in matrix.shape]
    return [matrix[tuple(slice(e * size, (e + 1) * size) for size in sizes)] for e in range(EXPERTS)]
