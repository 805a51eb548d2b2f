"""RMSNorm modules of any model family, recognised by what they compute, on our kernel."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from theodora import kernels
from theodora.kernels.operators import runs_triton
from theodora.kernels.rms_norm import NormStyle, fast_forward, is_rms_norm
from theodora.layers.swap import CHANGED, Swapped, autocast_changes, swap_back, swap_class


class FastRMSNorm(Swapped):
    """Mixed in before a norm's own class. Its output tells the layers that read it how to do without it."""

    prefix = "Fast"
    _theodora_style: NormStyle

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """What the module's own forward computes, for the same argument."""
        (x,) = (*args, *kwargs.values())  # `is_rms_norm` has seen that there is one
        if torch.compiler.is_compiling() or not kernels.fast() or not runs_triton(x):
            return super().forward(x)
        if autocast_changes(self, super().forward, x):
            return super().forward(x)
        return fast_forward(self, self._theodora_style, x, super().forward)


def speed_up_norm(module: nn.Module) -> bool:
    """Make `module` run on our kernel, in place, if it is an RMSNorm; say whether it is one."""
    if isinstance(module, FastRMSNorm):
        return True
    style = is_rms_norm(module)
    if style is None:
        return False
    swap_class(module, FastRMSNorm)
    module._theodora_style = style  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    return True


def restore_norm(module: FastRMSNorm) -> None:
    """Undo `speed_up_norm`."""
    swap_back(module, FastRMSNorm)
    module.__dict__.pop(CHANGED, None)
    del module._theodora_style  # pyright: ignore[reportPrivateUsage]
