"""Frozen weights that read one x, one above the other in memory, with spare rows behind them for the adapters' A.

    z = x [W₁; W₂; …]ᵀ is one product, and so is dx = [dz₁ | dz₂ | … | dzb] [W₁; W₂; …; A], low-rank branch included.

The weights stay parameters of their own: their data are views of the buffer. Whoever gives a parameter other data
(a move to another device, a merge) takes it out of the buffer, which `fits` notices.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from theodora.kernels.parts import Parts

_ALIGNED = 16  # columns; what the tensor cores read at once


class Stack:
    """A buffer (ΣO + spare, I) that holds the data of several weights.

    It is their storage, and nothing else holds it: where they move (`model.to("cpu")`) its memory is free again.
    """

    def __init__(self, weights: Sequence[nn.Parameter], ranks: int) -> None:
        """Move the data of `weights` (each (O, I), contiguous) into one buffer with room for `ranks` rows of A."""
        self.weights = list(weights)
        self.rows = sum(w.shape[0] for w in weights)
        spare = -(-ranks // _ALIGNED) * _ALIGNED
        self._shape, self._dtype = (self.rows + spare, weights[0].shape[1]), weights[0].dtype
        with torch.inference_mode(False):  # they may train adapters later
            buffer, at = weights[0].data.new_zeros(self._shape), 0
            for w in weights:
                buffer[at : at + w.shape[0]].copy_(w.data)
                w.data = buffer[at : at + w.shape[0]]
                at += w.shape[0]

    def dissolve(self) -> None:
        """Give each weight data of its own again."""
        if self._holds(self.weights):
            for w in self.weights:
                w.data = w.data.clone()

    def fits(self, layers: Sequence[Parts]) -> bool:
        """Whether the layers' weights lie in the buffer, and their A fit behind them."""
        ranks = sum(layer.a_RI.shape[0] for layer in layers if layer.a_RI is not None)
        return self.rows + ranks <= self._shape[0] and self._holds([layer.weight_OI for layer in layers])

    def _holds(self, weights: Sequence[Tensor]) -> bool:
        start = at = self.weights[0].untyped_storage().data_ptr()
        for w in weights:
            # Storages of their own may lie one behind the other, too.
            if w.data_ptr() != at or w.untyped_storage().data_ptr() != start:
                return False
            if w.dtype != self._dtype or not w.is_contiguous() or w.dim() != 2:
                return False
            at += w.numel() * w.element_size()
        return at == start + self.rows * self._shape[1] * self._dtype.itemsize

    def _top(self, rows: int) -> Tensor:
        inputs = self._shape[1]
        return self.weights[0].data.as_strided((rows, inputs), (inputs, 1))

    @property
    def weight(self) -> Tensor:
        """All weights, (ΣO, I)."""
        return self._top(self.rows)

    def columns(self, ranks: int) -> int:
        """ΣO + ΣR, rounded up: the width of [dz₁ | dz₂ | … | dzb]."""
        return min(self.rows + -(-ranks // _ALIGNED) * _ALIGNED, self._shape[0])

    def with_a(self, a_RI: Tensor) -> Tensor:
        """All weights and A behind them, (columns(ΣR), I)."""
        end = self.columns(a_RI.shape[0])
        found = self._top(end)
        found[self.rows : self.rows + a_RI.shape[0]].copy_(a_RI)
        found[self.rows + a_RI.shape[0] :].zero_()
        return found
