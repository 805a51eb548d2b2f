"""The order of rows that are grouped by length."""

from __future__ import annotations

import torch
from transformers.trainer_pt_utils import LengthGroupedSampler


class SeededByEpoch(LengthGroupedSampler):
    """Groups drawn from a seed and the epoch. transformers' own draws from the random state at hand, which is another
    one in a run that is resumed within an epoch."""

    def __init__(self, drawn_at_hand: LengthGroupedSampler, seed: int) -> None:
        super().__init__(drawn_at_hand.batch_size, lengths=drawn_at_hand.lengths)
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Called by accelerate before each epoch."""
        self.generator = torch.Generator().manual_seed(self._seed + epoch)
