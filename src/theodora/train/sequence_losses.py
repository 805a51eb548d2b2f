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
    tokens: TokenLosses
    """What was added up, (N,)."""
    at: Tensor
    """Where in the flattened batch each of these tokens stands, (N,) int64."""
    sequence: Tensor
    """The number of the sequence that each of them belongs to, (N,) int64."""
    balance: Tensor | None = None
    """The loss that keeps the experts of a mixture balanced, of the whole batch, a scalar with gradient; None where
    there is none."""


def summed(
    tokens: TokenLosses, at_N: Tensor, sequence_N: Tensor, sequences: int, balance: Tensor | None = None
) -> SequenceLosses:
    """Add up the losses of tokens by their sequences; arguments as of `SequenceLosses`, with S."""
    device = tokens.nats.device
    at_N, sequence_N = at_N.to(device), sequence_N.to(device)
    values = (tokens.nats, tokens.entropy, tokens.correct, tokens.learned)
    sums = (by_sequence(value, sequence_N, sequences) for value in values)
    return SequenceLosses(*sums, tokens=tokens, at=at_N, sequence=sequence_N, balance=balance)


def by_sequence(value_N: Tensor, sequence_N: Tensor, sequences: int) -> Tensor:
    """Sums over the tokens of each sequence, (S,).

    Not by `index_add_`, whose sums come out otherwise each time on a GPU.
    """
    own_SN = sequence_N == torch.arange(sequences, device=sequence_N.device)[:, None]
    return (value_N * own_SN).sum(1)
