"""Rotary position embeddings by Liger-Kernel, in the models whose own function computes the same.

Attention modules call `apply_rotary_pos_emb` of the file they stand in. There is no hook, so the function itself is
replaced, once in a process; tensors that Liger's kernel is not for go to the original.
"""

from __future__ import annotations

import functools
import importlib.util
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_NAME = "apply_rotary_pos_emb"


def speed_up_rotary(module: nn.Module) -> bool:
    """Give the file of an attention module the faster function, if it is for its kind; say whether it has it now."""
    file = sys.modules.get(type(module).__module__)
    original = getattr(file, _NAME, None)
    if original is None or "ttention" not in type(module).__name__:
        return False
    if hasattr(original, "__theodora__"):
        return True
    if importlib.util.find_spec("liger_kernel") is None or not _computes_the_usual(original):
        return False
    setattr(file, _NAME, _dispatching(original))
    return True


def restore_rotary(module: nn.Module) -> None:
    """Put the file's own function back."""
    file = sys.modules.get(type(module).__module__)
    own = getattr(getattr(file, _NAME, None), "__theodora__", None)
    if own is not None:
        setattr(file, _NAME, own)


def rotate(q_BHTD: Tensor, k_BHTD: Tensor, cos_BTD: Tensor, sin_BTD: Tensor) -> tuple[Tensor, Tensor]:
    """The usual rotation: x·cos + rotate_half(x)·sin, for each head."""

    def turned(x: Tensor) -> Tensor:
        half = x.shape[-1] // 2
        return x * cos_BTD[:, None] + torch.cat((-x[..., half:], x[..., :half]), dim=-1) * sin_BTD[:, None]

    return turned(q_BHTD), turned(k_BHTD)


def _computes_the_usual(function: Callable[..., Any]) -> bool:
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(1, heads, 3, 8, generator=generator, device="cpu") for heads in (4, 2))
    angles = torch.randn(1, 3, 4, generator=generator, device="cpu").repeat(1, 1, 2)
    expected = rotate(q, k, angles.cos(), angles.sin())
    try:
        found = function(q, k, angles.cos(), angles.sin())
    except Exception:  # whatever a stranger's function raises: it is another one
        return False
    return len(found) == 2 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(found, expected, strict=True))


def _dispatching(original: Callable[..., Any]) -> Callable[..., Any]:
    from liger_kernel.transformers.rope import liger_rotary_pos_emb

    @functools.wraps(original)
    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        usual = q.is_cuda and not args and not kwargs and not torch.compiler.is_compiling() and q.dim() == 4
        if usual and q.dtype == cos.dtype and q.dtype in (torch.bfloat16, torch.float16) and cos.dim() == 3:
            return liger_rotary_pos_emb(q, k, cos, sin)
        return original(q, k, cos, sin, *args, **kwargs)

    apply.__theodora__ = original  # pyright: ignore[reportAttributeAccessIssue]
    return apply
