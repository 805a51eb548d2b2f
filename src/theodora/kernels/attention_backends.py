"""Which of torch's attention kernels may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def repeatable_attention() -> Iterator[None]:
    """While it lasts a forward pass of attention gives the same bits each time. cuDNN's, which torch takes first on new
    GPUs, does not where there is a single query, as in decoding (seen on an H200 with torch 2.11)."""
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
