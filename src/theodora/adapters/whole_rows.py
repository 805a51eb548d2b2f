"""Telling transformers what the host knows about a batch, so that it need not ask the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import masking_utils


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside the block every row of a batch is one sequence, from its first token to its last.

    Without an attention mask, transformers 5 looks in each forward pass whether the positions start anew within a row
    (packing): the host waits for the GPU, and while a CUDA graph is captured, where it cannot look, it assumes so and
    builds a full mask. Nothing public says "no".
    """
    own: Any = masking_utils.find_packed_sequence_indices
    masking_utils.find_packed_sequence_indices = lambda position_ids: None
    try:
        yield
    finally:
        masking_utils.find_packed_sequence_indices = own
