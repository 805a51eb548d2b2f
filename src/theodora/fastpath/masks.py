"""Telling transformers what the host knows about a batch, so that it need not ask the GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor
from transformers import PreTrainedModel, masking_utils

from theodora.patches import replaced


@contextmanager
def whole_rows() -> Iterator[None]:
    """Inside the block every row of a batch is one sequence, from its first token to its last, and has no mask.

    Without an attention mask, transformers 5 looks in each forward pass whether the positions start anew within a row
    (packing), for which the host waits for the GPU. While a CUDA graph is captured, where it cannot look, it assumes
    so and builds a full mask, with which attention takes twice as long. Nothing public says "no".
    """
    no_search = {"find_packed_sequence_indices": lambda position_ids: None, "is_tracing": lambda tensor=None: False}
    with replaced(masking_utils, **no_search), _no_look_for_padding():
        yield


@contextmanager
def packed_rows() -> Iterator[None]:
    """Inside the block positions start anew within a row, where another sequence begins, and there is no mask.

    transformers builds the same mask as always, and does not ask the GPU whether it is needed.
    """
    search = masking_utils.find_packed_sequence_indices

    def search_unasked(position_ids: Tensor) -> Tensor | None:
        with replaced(masking_utils, is_tracing=lambda tensor=None: True):
            return search(position_ids)

    with replaced(masking_utils, find_packed_sequence_indices=search_unasked), _no_look_for_padding():
        yield


def _no_look_for_padding() -> AbstractContextManager[None]:
    """Inside the block GPT-2 does not read its first and last tokens, for a warning of padding without a mask."""
    return replaced(PreTrainedModel, warn_if_padding_and_no_attention_mask=lambda *_: None)
