"""Slotted layers that read one x (q, k and v; gate and up): on a GPU they share the launches of the low-rank branch.

The first layer of a group computes the outputs of all, and the others hand theirs out when they are called with the
very same tensor. A group whose layers turn out to read different tensors dissolves itself, and each layer runs alone.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from theodora.fastpath.groups import SIBLINGS
from theodora.kernels.base_weight import products
from theodora.kernels.parts import MOST_LAYERS
from theodora.kernels.routed import Routes, routed_together
from theodora.serve.slotted import SlottedLinear

_MOST_MISSES = 3


class SlottedGroup:
    """Up to `MOST_LAYERS` slotted layers of one x. For one thread, as batches are run."""

    def __init__(self, layers: Sequence[SlottedLinear]) -> None:
        self.layers = list(layers)
        self._x: Tensor | None = None
        self._version = 0
        self._ready: dict[int, Tensor] = {}
        self._misses = 0

    def output(self, layer: SlottedLinear, x: Tensor, to: Routes) -> Tensor | None:
        """The layer's output for x, (T, O), or None if the layer is to compute it by itself."""
        if to.groups is not None or not self.layers:  # on a CPU nothing is launched
            return None
        ready = self._ready.pop(id(layer), None)
        if ready is not None and self._x is x and self._version == _version(x):
            if not self._ready:
                self._x = None
            return ready
        if ready is not None or self._ready:  # they read different tensors, or a batch has failed
            self._x, self._ready, self._misses = None, {}, self._misses + 1
            if self._misses > _MOST_MISSES:
                self.layers = []
                return None
        if layer is not self.layers[0]:
            return None
        flat = x.reshape(-1, x.shape[-1])
        zs = products(flat, [each.current_weight for each in self.layers])
        first, *others = routed_together(zs, flat, [each.slotted_weights() for each in self.layers], to)
        self._ready = {id(each): y for each, y in zip(self.layers[1:], others, strict=True)}
        self._x, self._version = x, _version(x)
        return first


def group_slotted(model: nn.Module) -> None:
    """Join the slotted layers of `model` that read one x, and part what was joined before."""
    for module in model.modules():
        if isinstance(module, SlottedLinear):
            module.group = None
    for module in model.modules():
        for layers in _siblings(module):
            group = SlottedGroup(layers)
            for layer in layers:
                layer.group = group


def _siblings(module: nn.Module) -> Iterator[list[SlottedLinear]]:
    for names in SIBLINGS:
        found: list[Any] = [getattr(module, name, None) for name in names]
        layers = [layer for layer in found if isinstance(layer, SlottedLinear) and not layer.is_head]
        sizes = {layer.current_weight.shape[1] for layer in layers}
        if 2 <= len(layers) <= MOST_LAYERS and len(sizes) == 1:
            yield layers


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version
