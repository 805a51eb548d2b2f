"""How a kernel becomes an operator of torch, and when it runs.

An operator `theodora::name` has one implementation for all devices, which picks the Triton kernel or the plain torch
reference by `runs_triton`, and a fake one that knows shapes and dtypes only. So it passes through torch.compile,
activation checkpointing, DDP and FSDP2. Gradients are the business of the autograd functions that call it.

`torch.library.custom_op` does the same at several times the cost of a call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("theodora", "FRAGMENT")
# Read once: torch.compile guards on constants, and traces no look at the environment.
_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
_PAPER: ContextVar[str | None] = ContextVar("paper", default=None)


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `theodora::<schema>` and give the operator back.

    Args:
        schema: as in `"compose(Tensor z, Tensor? bias) -> Tensor"`.
        implementation: for real tensors, on any device.
        fake: empty tensors of the right shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, _in_its_own_terms(implementation), "CompositeExplicitAutograd")
    torch.library.register_fake(f"theodora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.theodora, name).default


def _in_its_own_terms(implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Run on the tensors' own device, where Triton launches, and without autocast, which would change references."""

    @wraps(implementation)
    def run(*args: Any) -> Any:
        first = args[0]
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return run(*args)
        if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
            return implementation(*args)
        with torch.autocast("cuda", enabled=False), torch.autocast("cpu", enabled=False):
            return implementation(*args)

    return run


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can take `tensor`: on a GPU, or anywhere under Triton's interpreter."""
    return (_TRITON or tensor.is_meta) and tensor.dtype != torch.float64 and (on_gpu(tensor) or _INTERPRETED)


def on_gpu(tensor: Tensor) -> bool:
    """Whether the tensor is on a GPU, or stands for one that is (`on_paper`)."""
    return tensor.is_cuda or (tensor.is_meta and _PAPER.get() == "cuda")


@contextmanager
def on_paper(device: str) -> Iterator[None]:
    """Let tensors on the meta device take the code that a "cuda" or "cpu" would take: only sizes come of it."""
    token = _PAPER.set(device)
    try:
        yield
    finally:
        _PAPER.reset(token)


def is_on_paper() -> bool:
    """Whether a pass is run for its sizes alone (`on_paper`)."""
    return _PAPER.get() is not None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return _INTERPRETED
