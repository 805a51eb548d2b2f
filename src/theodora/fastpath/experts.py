"""Frozen experts of a mixture on our kernels, beside adapters on other layers: see `theodora.kernels.experts`.

Adapted ones run there by themselves. Transformers' own grouped products lose more time around the products than in
them: most of all in the gradient of the gather, which adds up rows one by one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.autocast import without_autocast
from theodora.kernels.operators import runs_triton
from theodora.layers.experts import AdaptedExperts, declared, routing, run_fused
from theodora.layers.gates import KNOWN, gate_of
from theodora.layers.swap import Swapped, swap_back, swap_class


class FastExperts(Swapped):
    """Mixed in before an experts module's own class."""

    prefix = "Fast"

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own forward computes, (T, H) to (T, H), where gradients flow through it."""
        learns = torch.is_grad_enabled() and hidden_states.requires_grad
        if learns and kernels.fast() and runs_triton(hidden_states) and hidden_states.dim() == 2:
            with without_autocast(hidden_states.device):
                y = run_fused(self, hidden_states, *routing(args, kwargs))
            if y is not None:
                return y
        return super().forward(hidden_states, *args, **kwargs)


def speed_up_experts(module: Any) -> bool:
    """Make `module` run on our kernels, in place, if it is an experts module without adapters; say whether it does."""
    if isinstance(module, FastExperts | AdaptedExperts):
        return True
    parallel = getattr(module, "_is_expert_parallel", False)
    if not declared(module) or "forward" in module.__dict__ or parallel or gate_of(module) is None:
        return False
    swap_class(module, FastExperts)
    return True


def restore_experts(module: nn.Module) -> None:
    """Undo `speed_up_experts`."""
    swap_back(module, FastExperts)
    if not isinstance(module, AdaptedExperts):
        module.__dict__.pop(KNOWN, None)
