"""GELU by its tanh approximation in one pass, where a model's own module (GPT-2's `NewGELUActivation`) takes eight."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from theodora import kernels
from theodora.kernels.operators import runs_triton
from theodora.layers.swap import CHANGED, Swapped, autocast_changes, swap_back, swap_class

_IN_STEPS = ("NewGELUActivation", "FastGELUActivation")


class FastGELU(Swapped):
    """Mixed in before an activation's own class."""

    prefix = "Fast"

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own forward computes, for the same argument."""
        (x,) = (*args, *kwargs.values())
        # torch.compile makes one pass of either.
        if torch.compiler.is_compiling() or not kernels.fast() or not runs_triton(x):
            return super().forward(x)
        if autocast_changes(self, super().forward, x):
            return super().forward(x)
        return F.gelu(x, approximate="tanh")


def speed_up_gelu(module: nn.Module) -> bool:
    """Make `module` run in one pass, in place, if it computes the approximation in steps; say whether it does."""
    if isinstance(module, FastGELU):
        return True
    if not _is_gelu_in_steps(module):
        return False
    swap_class(module, FastGELU)
    return True


def restore_gelu(module: FastGELU) -> None:
    """Undo `speed_up_gelu`."""
    swap_back(module, FastGELU)
    module.__dict__.pop(CHANGED, None)


def _is_gelu_in_steps(module: nn.Module) -> bool:
    """Whether it is an activation of transformers, without state, that equals the approximation."""
    own = type(module)
    in_steps = own.__module__ == "transformers.activations" and own.__name__ in _IN_STEPS
    if not in_steps or vars(module)["_parameters"] or vars(module)["_buffers"]:
        return False
    x = torch.linspace(-6, 6, 49, dtype=torch.float64, device="cpu")
    return torch.allclose(own.forward(module, x), F.gelu(x, approximate="tanh"), atol=1e-6)
