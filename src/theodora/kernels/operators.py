"""How a kernel becomes an operator of torch, and when it runs.

An operator `theodora::name` has one implementation for all devices, which picks the Triton kernel or the plain torch
reference by `runs_triton`, and a fake one that knows shapes and dtypes only. So it passes through torch.compile,
activation checkpointing, DDP and FSDP2. Gradients are the business of the autograd functions that call it.

`torch.library.custom_op` does the same at several times the cost of a call.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("theodora", "FRAGMENT")


def operator(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Register `theodora::<schema>` and give the operator back.

    Args:
        schema: as in `"compose(Tensor z, Tensor? bias) -> Tensor"`.
        implementation: for real tensors, on any device.
        fake: empty tensors of the right shapes and dtypes.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"theodora::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.theodora, name).default


def runs_triton(tensor: Tensor) -> bool:
    """Whether Triton kernels can take `tensor`: on a GPU, or anywhere under Triton's interpreter."""
    return tensor.dtype != torch.float64 and (tensor.is_cuda or interpreted()) and _has_triton()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU (TRITON_INTERPRET=1)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@cache
def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None
