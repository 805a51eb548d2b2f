"""What a GPU asks of each process before its first product, done on a thread while the host reads models and rows.

That is the context and the library of products: C, which leaves Python to others meanwhile.
"""

from __future__ import annotations

import threading
from contextlib import suppress

import torch


def begin_with_gpu(device: torch.device) -> threading.Thread | None:
    """Begin, if `device` is a GPU of CUDA. Whatever fails fails again where it is needed, and is told there.

    Returns:
        The thread, for those who want to wait.
    """
    if device.type != "cuda":
        return None
    # No daemon: Python must not end while the driver is at work.
    thread = threading.Thread(target=_begin, args=(device,), name="theodora-begin")
    thread.start()
    return thread


def _begin(device: torch.device) -> None:
    with suppress(Exception):
        ones = torch.ones(16, 16, dtype=torch.bfloat16, device=device)
        torch.mm(ones, ones)
