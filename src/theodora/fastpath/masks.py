"""Telling transformers what the host knows about a batch, so that it need not ask the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from transformers import masking_utils


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside the block every row of a batch is one sequence, from its first token to its last, and has no mask.

    Without an attention mask, transformers 5 looks in each forward pass whether the positions start anew within a row
    (packing), for which the host waits for the GPU. While a CUDA graph is captured, where it cannot look, it assumes
    so and builds a full mask, with which attention takes twice as long. Nothing public says "no".
    """
    with _replaced(find_packed_sequence_indices=lambda position_ids: None, is_tracing=lambda tensor=None: False):
        yield


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside the block positions start anew within a row, where another sequence begins, and there is no mask.

    transformers builds the same mask as always, and does not ask the GPU whether it is needed.
    """
    search = masking_utils.find_packed_sequence_indices

    def found(position_ids: Tensor) -> Tensor | None:
        with _replaced(is_tracing=lambda tensor=None: True):
            return search(position_ids)

    with _replaced(find_packed_sequence_indices=found):
        yield


@contextmanager
def _replaced(**functions: Any) -> Iterator[None]:
    before: dict[str, Any] = {name: getattr(masking_utils, name) for name in functions}
    for name, function in functions.items():
        setattr(masking_utils, name, function)
    try:
        yield
    finally:
        for name, own in before.items():
            setattr(masking_utils, name, own)
