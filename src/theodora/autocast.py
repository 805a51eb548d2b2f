"""What autocast does to a linear layer, said once: products run and come out in its dtype, all else is left alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import Tensor

_Function = TypeVar("_Function", bound=Callable[..., Any])

# Asked once: torch.compile cannot follow the question (torch 2.11).
_DEVICES = frozenset(kind for kind in ("cpu", "cuda", "xpu", "mps", "hpu") if torch.amp.is_autocast_available(kind))


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """The dtype that `nn.Linear` would compute in and give back for x; None where autocast leaves it as it is.

    It does so outside `torch.autocast`, and with float64.
    """
    device = x.device.type
    if x.dtype == torch.float64 or device not in _DEVICES:
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def without_autocast(device: torch.device) -> AbstractContextManager[Any]:
    """A context in which everything on `device` is computed in the dtypes that its tensors have."""
    if device.type not in _DEVICES:
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def backward_without_autocast(backward: _Function) -> _Function:
    """For an autograd function's backward: its casts are written out, and a caller's autocast must add none."""

    @wraps(backward)
    def run(ctx: Any, *gradients: Tensor | None) -> Any:
        given = next((gradient for gradient in gradients if gradient is not None), None)
        if given is None or autocast_dtype(given) is None:
            return backward(ctx, *gradients)
        with without_autocast(given.device):
            return backward(ctx, *gradients)

    return run  # pyright: ignore[reportReturnType]
