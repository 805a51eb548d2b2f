"""The losses of each sequence of a batch, which objectives that compare answers weigh.

Legend: S sequences, N learned tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from theodora.kernels.cross_entropy import TokenLosses


@dataclass(frozen=True)
class SequenceLosses:
    """Sums over the learned tokens of each sequence, (S,); float32 (float64 for float64)."""

    nats: Tensor
    """Negative log-likelihood, with gradient."""
    entropy: Tensor
    """Of the predicted distributions, in nats."""
    correct: Tensor
    """Tokens that were the likeliest one."""
    count: Tensor
    """Learned tokens; 0 of a sequence that only fills up a batch."""
    balance: Tensor | None = None
    """The loss that keeps the experts of a mixture balanced, of the whole batch, a scalar with gradient; None where
    there is none."""


def summed(tokens: TokenLosses, sequence_N: Tensor, sequences: int, balance: Tensor | None = None) -> SequenceLosses:
    """Add up the losses of tokens by the number of the sequence that each belongs to, (N,) int64.

    Not by `index_add_`, whose sums come out otherwise each time on a GPU.
    """
    numbers = torch.arange(sequences, device=sequence_N.device)
    own_SN = sequence_N.to(tokens.nats.device) == numbers.to(tokens.nats.device)[:, None]
    sums = [(value * own_SN).sum(1) for value in (tokens.nats, tokens.entropy, tokens.correct, tokens.learned)]
    return SequenceLosses(*sums, balance=balance)
