"""Which of torch's attention kernels may run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

_PAYS_FROM = 2048
"""Tokens from which cuDNN's attention saves more than it costs to plan it."""


def repeatable_attention() -> AbstractContextManager[None]:
    """While it lasts a forward pass of attention gives the same bits each time. cuDNN's, which torch takes first on new
    GPUs, does not where there is a single query, as in decoding (seen on an H200 with torch 2.11)."""
    return _without_cudnn()


def attention_of_new_lengths(tokens: int) -> AbstractContextManager[None]:
    """For passes of ever other lengths, this one of rows of so many tokens. cuDNN plans its attention anew for each
    shape, which took 0.15 s forward and as much backward, most of a step of short rows (H200, torch 2.11)."""
    # Which of the others are deterministic depends on the mask; cuDNN's choice was torch's.
    stays = tokens >= _PAYS_FROM or torch.are_deterministic_algorithms_enabled()
    return nullcontext() if stays else _without_cudnn()


@contextmanager
def _without_cudnn() -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
