"""What of a conversation the chat template does not show."""

from __future__ import annotations

from datasets import Dataset

from theodora.data.left_out import LeftOut


def left_out_of(dataset: Dataset) -> tuple[LeftOut, ...]:
    """What the chat template left out of the rows of `tokenize`."""
    return ()
