"""Frozen weights that read one x, one above the other in memory, with spare rows behind them for the adapters' A.

    z = x [W₁; W₂; …]ᵀ is one product, and so is dx = [dz₁ | dz₂ | … | dzb] [W₁; W₂; …; A], low-rank branch included.

The weights stay parameters of their own: their data are views of the buffer. Whoever gives a parameter other data
(a move to another device, a merge) takes it out of the buffer, which `fits` notices.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from theodora.kernels.parts import Parts

_ALIGNED = 16  # columns; what the tensor cores read at once


class Stack:
    """A buffer (ΣO + spare, I) that holds the data of several weights."""

    def __init__(self, weights: Sequence[nn.Parameter], ranks: int) -> None:
        """Move the data of `weights` (each (O, I), contiguous) into one buffer with room for `ranks` rows of A."""
        self.weights = list(weights)
        self.rows = sum(w.shape[0] for w in weights)
        spare = -(-ranks // _ALIGNED) * _ALIGNED
        self.buffer = weights[0].data.new_zeros(self.rows + spare, weights[0].shape[1])
        at = 0
        for w in weights:
            self.buffer[at : at + w.shape[0]].copy_(w.data)
            w.data = self.buffer[at : at + w.shape[0]]
            at += w.shape[0]

    def dissolve(self) -> None:
        """Give each weight data of its own again."""
        if self._holds(self.weights):
            for w in self.weights:
                w.data = w.data.clone()

    def fits(self, layers: Sequence[Parts]) -> bool:
        """Whether the layers' weights lie in the buffer, and their A fit behind them."""
        ranks = sum(layer.a_RI.shape[0] for layer in layers if layer.a_RI is not None)
        return self.rows + ranks <= self.buffer.shape[0] and self._holds([layer.weight_OI for layer in layers])

    def _holds(self, weights: Sequence[Tensor]) -> bool:
        buffer, at = self.buffer, self.buffer.data_ptr()
        for w in weights:
            if w.data_ptr() != at or w.dtype != buffer.dtype or not w.is_contiguous() or w.dim() != 2:
                return False
            at += w.numel() * w.element_size()
        return at == buffer.data_ptr() + self.rows * buffer.shape[1] * buffer.element_size()

    @property
    def weight(self) -> Tensor:
        """All weights, (ΣO, I)."""
        return self.buffer[: self.rows]

    def columns(self, ranks: int) -> int:
        """ΣO + ΣR, rounded up: the width of [dz₁ | dz₂ | … | dzb]."""
        return min(self.rows + -(-ranks // _ALIGNED) * _ALIGNED, self.buffer.shape[0])

    def with_a(self, a_RI: Tensor) -> Tensor:
        """All weights and A behind them, (columns(ΣR), I)."""
        end = self.columns(a_RI.shape[0])
        self.buffer[self.rows : self.rows + a_RI.shape[0]].copy_(a_RI)
        self.buffer[self.rows + a_RI.shape[0] : end].zero_()
        return self.buffer[:end]
