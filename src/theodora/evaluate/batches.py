"""Rows of unequal length -> batches of nearly equal length."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from theodora.kernels.attention_backends import repeatable_attention

# A batch holds at most this many tokens, padding included, however short or long its rows are. It bounds memory: long
# documents come in batches of their own.
_MAX_TOKENS = 16 * 1024
USUAL_ROWS = 16
"""Rows of a batch unless told otherwise."""
# On a GPU the host takes as long to launch a pass over few rows as over many, and a pass over sixteen short ones is
# over before the next is launched: there as many go together as have so many logits, a gigabyte in half precision.
_LOGITS = 2**29


def rows_together(model: Any) -> int | Callable[[int], int]:
    """Rows whose losses are computed in one pass, for `batches_by_length`."""
    if model.device.type != "cuda":
        return USUAL_ROWS
    vocabulary = getattr(model.config.get_text_config(), "vocab_size", None) or 2**17
    return lambda length: max(USUAL_ROWS, _LOGITS // (vocabulary * max(1, length)))


def batches_by_length(
    lengths: Sequence[int], batch_size: int | Callable[[int], int], max_tokens: int = _MAX_TOKENS
) -> Iterator[list[int]]:
    """Group row indices, longest rows first (a batch that does not fit in memory fails at once, not at the end).

    Args:
        lengths: tokens of each row.
        batch_size: rows in a batch, at most; or of how many, by the length of its longest.
        max_tokens: rows times the longest row in a batch, at most; a single longer row still is a batch.
    """
    batch, most = list[int](), 0
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) >= most or (len(batch) + 1) * lengths[batch[0]] > max_tokens):
            yield batch
            batch = []
        if not batch:
            most = batch_size(lengths[index]) if callable(batch_size) else batch_size
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
        with torch.inference_mode(), without_router_loss(model), repeatable_attention():
            yield
    finally:
        for module, training in modes.items():
            module.training = training


@contextmanager
def without_router_loss(model: nn.Module) -> Iterator[None]:
    """While it lasts a mixture's configuration does not ask for the loss that keeps its experts balanced, as it does in
    training: tokens that are decoded one at a time do not fit the mask of all."""
    config: Any = getattr(model, "config", None)
    text: Any = config.get_text_config() if hasattr(config, "get_text_config") else None
    if not getattr(text, "output_router_logits", False):
        yield
        return
    text.output_router_logits = False
    try:
        yield
    finally:
        text.output_router_logits = True
