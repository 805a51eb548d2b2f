"""Rows of unequal length -> batches of nearly equal length."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# A batch holds at most this many tokens, padding included, however short or long its rows are. It bounds memory: long
# documents come in batches of their own.
_MAX_TOKENS = 16 * 1024


def batches_by_length(lengths: Sequence[int], batch_size: int, max_tokens: int = _MAX_TOKENS) -> Iterator[list[int]]:
    """Group row indices, longest rows first (a batch that does not fit in memory fails at once, not at the end).

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch, at most.
        max_tokens: rows times the longest row in a batch, at most; a single longer row still is a batch.
    """
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) == batch_size or (len(batch) + 1) * lengths[batch[0]] > max_tokens):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def pad(rows: Sequence[Sequence[int]], value: int, *, left: bool = False) -> Tensor:
    """Stack rows of integers into one (rows, longest) tensor."""
    width = max(map(len, rows))
    stacked = torch.full((len(rows), width), value, dtype=torch.long)
    for i, row in enumerate(rows):
        start = width - len(row) if left else 0
        stacked[i, start : start + len(row)] = torch.as_tensor(row, dtype=torch.long)
    return stacked


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode it was in before."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module, training in modes.items():
            module.training = training
