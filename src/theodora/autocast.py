"""In which dtype products run: what autocast does to a linear layer, said once (they run and come out in its dtype, all
else is left alone), and whether a device has instructions for bfloat16."""

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


def computes_in_bf16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16, rather than emulating it: with them they are used, too."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        found = torch.cpu.get_capabilities()
        has_them = any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
        return has_them and (found.get("architecture") != "x86_64" or _onednn_takes_bf16())
    return device.type in ("xpu", "npu", "hpu")


def _onednn_takes_bf16() -> bool:
    """Whether oneDNN, which alone uses x86's instructions, is there, switched on, and not held below them.

    `ONEDNN_MAX_CPU_ISA` holds it, and without it a product takes up to a hundred times as long.
    """
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )
